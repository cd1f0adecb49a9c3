"""Let layers attend to a few selected slots of the cache.

    before   o = scaled_dot_product_attention(q, k, v, mask)
    after    o = scaled_dot_product_attention(q, k, v, eepass.allow_selected(mask, slots))

``slots`` [R, K] is one side input of all layers: for each row the slots it may attend to, of those
that the mask allows. Keys and values of all tokens stay in the cache. Compiled for the CPU, such
attention reads the selected keys and values alone (``codegen/lower_attention.py``). For the layers
that select, the part of them that computes q is taken out as a segment of its own.

Left alone: layers whose own window is no wider than the selection. Refused: a layer that reads its
cache in another way than by that function with a mask over its slots.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

import eepass.ops.rows  # noqa: F401  the operator must be defined before it is used
from eepass.errors import PassError
from eepass.passes.graph_walk import ancestors
from eepass.passes.report import PassReport
from eepass.passes.split.split_segments import build_segment, structure_of
from eepass.segments import (
    CONTEXT,
    HIDDEN,
    ContextLayers,
    ContextQuery,
    Input,
    Segment,
    SplitDecoder,
)

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
# how keys are repeated for the query heads of their group; what writes to the cache returns it
VIEWS = {
    aten.reshape.default, aten.expand.default, aten.unsqueeze.default, aten.clone.default,
    aten.index_copy_.default,
}  # fmt: skip


def select_context(
    split: SplitDecoder, report: PassReport, *, width: int, depths: Sequence[float]
) -> ContextLayers:
    """The layers of ``split`` attending to up to ``width`` selected slots; ``depths``: where slots
    are selected, in shares of the layers. ``PassError`` where attention is not recognised."""
    if split.stepwise:
        raise PassError("recurrent layers carry states, not keys that could be selected")
    windows = _windows(split)
    made: dict[str, Segment] = {}
    layers, able = [], []
    for number, layer in enumerate(split.layers):
        sides = [role.name for role in layer.inputs if role.kind == "side"]
        window = min((windows[name] for name in sides if name in windows), default=None)
        if window is not None and window <= width:
            report.skip(f"layer {number}", f"it attends to a window of {window} tokens")
            layers.append(layer)
            continue
        if layer.structure not in made:
            made[layer.structure] = _selecting(layer, number, split, width)
            report.rewritten += 1
        # isomorphic segments share the graph, each with the roles of its own inputs
        layers.append(replace(made[layer.structure], inputs=(*layer.inputs, CONTEXT)))
        able.append(number)
    if not able:
        raise PassError(f"every layer attends to a window of at most {width} tokens by itself")
    at = {next((n for n in able if n >= depth * len(layers)), able[-1]) for depth in depths}
    queries = {n: _query(split.layers[n], n, split.cache_length) for n in sorted(at)}
    return ContextLayers(tuple(layers), queries)


def _selecting(layer: Segment, number: int, split: SplitDecoder, width: int) -> Segment:
    graph = copy.deepcopy(layer.graph)
    placeholders = graph.graph.find_nodes(op="placeholder")
    inputs = dict(zip(placeholders, layer.inputs, strict=True))
    calls = _attention(Segment(graph, layer.inputs), inputs, number, split.cache_length)
    with graph.graph.inserting_after(placeholders[-1]):
        slots = graph.graph.placeholder(f"side_{len(placeholders)}")
    slots.meta["val"] = torch.empty(split.rows, width, dtype=torch.int32, device="meta")
    for call in calls:
        mask: Any = call.args[3]
        with graph.graph.inserting_before(call):
            allowed = graph.graph.call_function(
                torch.ops.eepass.allow_selected.default, (mask, slots)
            )
        allowed.meta = dict(mask.meta)
        call.update_arg(3, allowed)
    graph.recompile()
    roles = (*layer.inputs, CONTEXT)
    return Segment(graph, roles, structure_of(graph, roles))


def _attention(
    layer: Segment, inputs: Mapping[Node, Input], number: int, cache_length: int
) -> list[Node]:
    """The calls through which the layer reads its keys and values; ``PassError`` where it reads
    them in another way."""
    graph = layer.graph.graph
    cache = {node for node, role in inputs.items() if role.kind in ("keys", "values")}
    calls = graph.find_nodes(op="call_function", target=ATTENTION)
    # what is computed from the cache, up to attention
    read = set(cache)
    for node in graph.nodes:
        if node not in calls and not read.isdisjoint(node.all_input_nodes):
            read.add(node)
    found = [call for call in calls if not read.isdisjoint(call.all_input_nodes)]
    if not found or not read.isdisjoint(layer.outputs):
        raise PassError(
            f"layer {number} reads its keys or values otherwise than by "
            "scaled_dot_product_attention, so nothing can be selected for it"
        )
    for call in found:
        mask: Any = call.args[3] if len(call.args) > 3 else None
        if mask is None or mask.meta["val"].shape[-1] != cache_length:
            raise PassError(f"layer {number} attends without a mask over the slots of its cache")
    return found


def _query(layer: Segment, number: int, cache_length: int) -> ContextQuery:
    """What a layer computes its queries by; ``PassError`` where they are not multiplied with the
    keys as they lie in the cache."""
    role = layer.roles
    call, *others = _attention(layer, role, number, cache_length)
    q: Any = call.args[0]
    keys: Any = call.args[1]
    while keys not in role and keys.target in VIEWS:
        keys = keys.args[0]
    if others or role.get(keys, HIDDEN).kind != "keys":
        raise PassError(f"layer {number} computes its keys anew from what lies in the cache")
    needed = ancestors([q]) - set(role)
    nodes = [node for node in layer.graph.graph.nodes if node in needed]
    scale: Any = call.kwargs.get("scale") or q.meta["val"].shape[-1] ** -0.5
    return ContextQuery(build_segment(nodes, [q], role), role[keys], scale)


def _windows(split: SplitDecoder) -> dict[str, int]:
    """By side input that is made of a mask with a window, or chunks, how many tokens wide it is."""
    roles, found = split.positional.roles, dict[str, int]()
    for name, output in zip(split.side_outputs, split.positional.outputs, strict=True):
        for node in ancestors([output]) & set(roles):
            if roles[node].kind == "mask" and (window := split.windows[roles[node].name]):
                found[name] = abs(window)
    return found
