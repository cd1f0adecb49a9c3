"""Take the head apart: final norm, LM head, transform of the logits.

    before   logits = head(hidden)
    after    logits = transform(linear(norm(hidden), weight, bias))

Early exits read single rows of the LM head, so it must be one linear layer over a parameter, with
nothing after it but elementwise work. Otherwise the head stays whole, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

import eepass.ops.quantized  # noqa: F401  the operator must be defined before it is looked for
from eepass.passes.graph_walk import ancestors, descendants
from eepass.segments import Head, Input, Segment

aten = torch.ops.aten
QUANTIZED = torch.ops.eepass.quantized_linear.default

BuildSegment = Callable[[Sequence[Node], Sequence[Node], Mapping[Node, Input]], Segment]

# on logits these act on each row of the LM head by itself
ELEMENTWISE = {
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.tanh.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.alias.default,
}


def split_head(
    nodes: Sequence[Node], logits: Node, role: Mapping[Node, Input], build_segment: BuildSegment
) -> Head:
    head = Head(build_segment(nodes, [logits], role))
    linears = [node for node in nodes if node.target in (aten.linear.default, QUANTIZED)]
    if len(linears) != 1:
        head.reason = f"the head has {len(linears)} linear layers, expected one"
        return head
    linear = linears[0]
    args: tuple[Any, ...] = linear.args
    weight, bias, scales, mins = args[1], args[2] if len(args) > 2 else None, None, None
    if linear.target is QUANTIZED:
        _, weight, scales, mins, bias, head.dynamic = args
    for operand in (weight, bias, scales, mins):
        if operand is not None and (operand not in role or role[operand].kind != "parameter"):
            head.reason = "the LM head's weight is computed, not a parameter"
            return head
    after = [n for n in nodes if n in descendants(linear.graph, [linear]) and n is not linear]
    for node in after:
        if node.target not in ELEMENTWISE:
            head.reason = f"{node.target} follows the LM head: it mixes logits"
            return head
    hidden = args[0]
    needed = ancestors([hidden])
    head.norm = build_segment([node for node in nodes if node in needed], [hidden], role)
    head.weight = role[weight].name
    head.bias, head.scales, head.mins = (
        role[operand].name if isinstance(operand, Node) else "" for operand in (bias, scales, mins)
    )
    if after:
        head.transform = build_segment(after, [logits], {**role, linear: Input("hidden", "logits")})
    return head
