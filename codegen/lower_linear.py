"""Give linear layers over few rows the form that reads each weight once, at memory speed.

    before   q, k, v = linear(x, wq), linear(x, wk), linear(x, wv)          x [..., R, I], R <= 64
    after    q, k, v = eepass.linear_rows(x, [wq, wk, wv], [...])

Layers that read the same value go into one call. More rows stay matrix products. Prepacking would
tie compiled code to one layer's weights; this form takes them as inputs, so all layers share it.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten
MOST_ROWS = 64


def lower_linear(gm: GraphModule) -> int:
    """Rewrite the linear layers of ``gm`` in place; returns how many."""
    by_input: dict[Node, list[Node]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        x: Any = node.args[0]
        if row_count(x) <= MOST_ROWS and _placeholder_operands(node):
            by_input.setdefault(x, []).append(node)
    for x, linears in by_input.items():
        _rewrite(gm, x, linears)
    return sum(len(linears) for linears in by_input.values())


def lower_logits(gm: GraphModule) -> int:
    """Keep the sums of the linear layers of a head in float32: ``eepass.logits_rows``."""
    linears = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    for node in linears:
        args: tuple[Any, ...] = node.args
        x, weight = args[:2]
        bias = args[2] if len(args) > 2 else None
        value: Tensor = x.meta["val"]
        with gm.graph.inserting_before(node):
            call = gm.graph.call_function
            flat = call(aten.reshape.default, (x, [row_count(x), value.shape[-1]]))
            logits = call(torch.ops.eepass.logits_rows.default, (flat, weight, bias))
            new = call(aten.reshape.default, (logits, list(node.meta["val"].shape)))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    return len(linears)


def row_count(x: Node) -> int:
    value = x.meta["val"]
    return int(value.numel() // value.shape[-1])


def _placeholder_operands(linear: Node) -> bool:
    """Weights that are inputs are there from the start, so the layers can move together."""
    operands: tuple[Any, ...] = linear.args[1:]
    return all(arg is None or arg.op == "placeholder" for arg in operands)


def _rewrite(gm: GraphModule, x: Node, linears: list[Node]) -> None:
    weights = [linear.args[1] for linear in linears]
    biases = [linear.args[2] if len(linear.args) > 2 else None for linear in linears]
    make_together(gm, x, linears, torch.ops.eepass.linear_rows.default, (weights, biases))


def make_together(
    gm: GraphModule, x: Node, linears: list[Node], operator_of_rows: Any, operands: Sequence[Any]
) -> None:
    """One call of ``operator_of_rows`` over rows of ``x`` and ``operands`` for all ``linears``."""
    call = gm.graph.call_function
    value: Tensor = x.meta["val"]
    with gm.graph.inserting_before(linears[0]):
        flat = call(aten.reshape.default, (x, [row_count(x), value.shape[-1]]))
        products = call(operator_of_rows, (flat, *operands))
        for index, linear in enumerate(linears):
            product = call(operator.getitem, (products, index))
            shape = [*value.shape[:-1], linear.meta["val"].shape[-1]]
            new = call(aten.reshape.default, (product, shape))
            new.meta = dict(linear.meta)
            linear.replace_all_uses_with(new)
    # only now: what is inserted stands before the first of them
    for linear in linears:
        gm.graph.erase_node(linear)
