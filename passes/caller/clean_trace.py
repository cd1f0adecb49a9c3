"""Bring a caller's traced step into the form that other passes expect, each pass one habit less.

    inline_constants     before  c = self._tensor_constant0
                         after   c = full([], 1.0)
    drop_conversions     before  x = to(placeholder, the dtype it has); x.add_(1)
                         after   placeholder.add_(1)
    strip_advance        before  at = arange(1) + length; ...; length.add_(1)
                         after   at = arange(1) + length; ...
    add_masks            before  o = attention(q, k, v, mask)              mask bool, in every layer
                         after   added = where(mask, 0.0, lowest); o = attention(q, k, v, added)

Writes to a view of an input would go unseen: ``refuse_writes_through_views`` finds them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from eepass.errors import PassError
from eepass.passes.graph_walk import hoist_placeholders, mutated_arguments, replace_node
from eepass.passes.report import PassReport
from eepass.segments import DecoderGraph

aten = torch.ops.aten


def inline_constants(decoder: DecoderGraph, report: PassReport) -> DecoderGraph:
    """Constant tensors of one element become operators: layers that hold them stay isomorphic."""
    graph = decoder.graph.graph
    for node in graph.find_nodes(op="get_attr"):
        value = getattr(decoder.graph, str(node.target))
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise PassError(f"it holds a constant of shape {tuple(getattr(value, 'shape', ()))}")
        given: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
        with graph.inserting_before(node):
            full = graph.call_function(aten.full.default, (list(value.shape), value.item()), given)
        example = next(iter(decoder.roles)).meta["val"]
        full.meta = {"val": example.fake_mode.from_tensor(value), **node.meta}
        replace_node(node, full)
        report.rewritten += 1
    return decoder


def drop_conversions(decoder: DecoderGraph, report: PassReport) -> DecoderGraph:
    """A conversion to what an input already is gives the input itself, which may be written to."""
    for node in decoder.roles:
        for user in list(node.users):
            name = getattr(getattr(user.target, "_schema", None), "name", "")
            if name != "aten::to" or user.args[0] is not node or user.kwargs.get("copy"):
                continue
            mine, other = node.meta["val"], user.meta["val"]
            if (mine.dtype, mine.device) == (other.dtype, other.device):
                replace_node(user, node)
                report.rewritten += 1
    return decoder


def refuse_writes_through_views(decoder: DecoderGraph, report: PassReport) -> DecoderGraph:
    """What is written must be an input itself."""
    for node in decoder.graph.graph.nodes:
        for target in mutated_arguments(node):
            root = target
            while root.op == "call_function" and (source := _viewed(root)) is not None:
                root = source
            if root is not target and root.op == "placeholder":
                raise PassError(f"it writes to a view of its input {root.name} ({node.target})")
    return decoder


def _viewed(node: Node) -> Node | None:
    """What ``node`` may be a view of."""
    schema = getattr(node.target, "_schema", None)
    for argument, value in zip(schema.arguments if schema else (), node.args, strict=False):
        if argument.alias_info is not None and isinstance(value, Node):
            return value
    return None


def strip_advance(decoder: DecoderGraph, report: PassReport) -> DecoderGraph:
    """Additions to the lengths go: who runs the step adds when all layers have read them."""
    graph = decoder.graph.graph
    place_of = {node: place for place, node in enumerate(decoder.roles)}
    order = {node: number for number, node in enumerate(graph.nodes)}
    advance = []
    for node in list(graph.nodes):
        for target in mutated_arguments(node):
            if target not in place_of or target.meta["val"].is_floating_point():
                continue
            place, rows = place_of[target], node.args[1]
            if node.target is not aten.add_.Tensor or not isinstance(rows, int) or node.users:
                raise PassError(f"it changes its input {place} by {node.target}")
            if any(order[user] > order[node] for user in target.users):
                raise PassError(f"it reads the length at input {place} after adding to it")
            advance.append((place, rows))
            graph.erase_node(node)
    report.rewritten = len(advance)
    return replace(decoder, advance=tuple(advance))


def add_masks(decoder: DecoderGraph, report: PassReport) -> DecoderGraph:
    """Make boolean attention masks additive, once for all layers: kernels want them so."""
    made: dict[tuple[Node, torch.dtype], Node] = {}
    graph, attention = decoder.graph.graph, aten.scaled_dot_product_attention.default
    for node in graph.find_nodes(op="call_function", target=attention):
        args: tuple[Any, ...] = node.args
        if len(args) < 4 or args[3] is None or args[3].meta["val"].dtype is not torch.bool:
            continue
        mask, dtype = args[3], args[0].meta["val"].dtype
        if (mask, dtype) not in made:
            given = {"dtype": dtype, "device": mask.meta["val"].device}
            with graph.inserting_before(mask.next):
                lowest = graph.call_function(aten.full.default, ((), torch.finfo(dtype).min), given)
                zero = graph.call_function(aten.full.default, ((), 0.0), given)
                made[mask, dtype] = graph.call_function(aten.where.self, (mask, zero, lowest))
            with mask.meta["val"].fake_mode:
                for new in (lowest, zero, made[mask, dtype]):
                    target: Any = new.target
                    values = map_arg(new.args, lambda arg: arg.meta["val"])
                    new.meta["val"] = target(*values, **new.kwargs)
        node.args = (*args[:3], made[mask, dtype], *args[4:])
        report.rewritten += 1
    # a mask may be an input, with others after it
    hoist_placeholders(graph, list(decoder.roles))
    return decoder
