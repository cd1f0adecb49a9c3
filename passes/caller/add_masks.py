"""Make boolean attention masks additive, once for all layers: kernels want them so.

before   o = attention(q, k, v, mask)                    mask bool, in every layer
after    added = where(mask, 0.0, lowest)
         o = attention(q, k, v, added)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from eepass.passes.graph_walk import hoist_placeholders
from eepass.passes.report import PassReport
from eepass.segments import DecoderGraph

aten = torch.ops.aten


def add_masks(decoder: DecoderGraph, report: PassReport) -> DecoderGraph:
    made: dict[tuple[Node, torch.dtype], Node] = {}
    for node in decoder.graph.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    ):
        args: tuple[Any, ...] = node.args
        if len(args) < 4 or args[3] is None or args[3].meta["val"].dtype is not torch.bool:
            continue
        mask, dtype = args[3], args[0].meta["val"].dtype
        if (mask, dtype) not in made:
            given = {"dtype": dtype, "device": mask.meta["val"].device}
            lowest = _after(mask, mask, aten.full.default, (), torch.finfo(dtype).min, **given)
            zero = _after(lowest, mask, aten.full.default, (), 0.0, **given)
            made[mask, dtype] = _after(zero, mask, aten.where.self, mask, zero, lowest)
        node.args = (*args[:3], made[mask, dtype], *args[4:])
        report.rewritten += 1
    # a mask may be an input, with others after it
    hoist_placeholders(decoder.graph.graph, list(decoder.roles))
    return decoder


def _after(place: Node, mask: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A call right after ``place``, with its example value."""
    with place.graph.inserting_after(place):
        node = place.graph.call_function(target, args, kwargs)
    with mask.meta["val"].fake_mode:
        values = (arg.meta["val"] if isinstance(arg, Node) else arg for arg in args)
        node.meta["val"] = target(*values, **kwargs)
    return node
