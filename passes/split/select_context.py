"""Let each layer attend to a few selected slots of the cache.

    before   o = scaled_dot_product_attention(q, k, v, mask)
    after    o = scaled_dot_product_attention(q, k, v, eepass.allow_selected(mask, slots))

``slots`` [R, K] is one side input of all layers: for each row the slots it may attend to, of those
that the mask allows. Keys and values of all tokens stay in the cache. Compiled for the CPU, such
attention reads the selected keys and values alone (``codegen/lower_attention.py``). One selection
serves all heads and layers, after SpeContext (arXiv 2512.00722), which selects by head.

Left alone: layers whose own window is no wider than the selection. Refused: a layer that attends
in another way than by that function with a mask over its slots.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

import eepass.ops.rows  # noqa: F401  the operator must be defined before it is used
from eepass.errors import PassError
from eepass.passes.graph_walk import ancestors
from eepass.passes.report import PassReport
from eepass.passes.split.split_segments import structure_of
from eepass.segments import CONTEXT, Input, Segment, SplitDecoder

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default


def select_context(split: SplitDecoder, report: PassReport, *, tokens: int) -> SplitDecoder:
    """``split`` with layers that attend to ``tokens`` selected slots; raises ``PassError`` where a
    layer's attention is not recognised."""
    if split.stepwise:
        raise PassError("recurrent layers carry states, not keys that could be selected")
    windows = _windows(split)
    made: dict[tuple[str, bool], Segment] = {}
    layers = []
    for number, layer in enumerate(split.layers):
        sides = [role.name for role in layer.inputs if role.kind == "side"]
        window = next((windows[name] for name in sides if windows.get(name)), None)
        if window is not None and abs(window) <= tokens:
            report.skip(f"layer {number}", f"it attends to a window of {abs(window)} tokens")
            layers.append(layer)
            continue
        if layer.structure not in made:
            made[layer.structure] = _selecting(layer, number, split, tokens)
            report.rewritten += 1
        # isomorphic segments share the graph, each with the roles of its own inputs
        layers.append(replace(made[layer.structure], inputs=(*layer.inputs, CONTEXT)))
    if not report.rewritten:
        raise PassError(f"every layer attends to a window of at most {tokens} tokens by itself")
    return replace(split, layers=tuple(layers))


def _selecting(layer: Segment, number: int, split: SplitDecoder, tokens: int) -> Segment:
    graph = copy.deepcopy(layer.graph)
    placeholders = graph.graph.find_nodes(op="placeholder")
    inputs = dict(zip(placeholders, layer.inputs, strict=True))
    calls = _attention(Segment(graph, layer.inputs), inputs, number, split.cache_length)
    with graph.graph.inserting_after(placeholders[-1]):
        slots = graph.graph.placeholder(f"side_{len(placeholders)}")
    slots.meta["val"] = torch.empty(split.rows, tokens, dtype=torch.int32, device="meta")
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
    if not read.isdisjoint(layer.outputs):
        raise PassError(
            f"layer {number} reads its keys or values otherwise than by "
            "scaled_dot_product_attention, so nothing can be selected for it"
        )
    found = [call for call in calls if not read.isdisjoint(call.all_input_nodes)]
    for call in found:
        mask: Any = call.args[3] if len(call.args) > 3 else None
        if mask is None or mask.meta["val"].shape[-1] != cache_length:
            raise PassError(f"layer {number} attends without a mask over the slots of its cache")
    return found


def _windows(split: SplitDecoder) -> dict[str, int | None]:
    """By side input that is made of a mask, the window of that mask."""
    segment, found = split.positional, {}
    roles = segment.roles
    for name, output in zip(split.side_outputs, segment.outputs, strict=True):
        for node in ancestors([output]) & set(roles):
            if roles[node].kind == "mask":
                found[name] = split.windows[roles[node].name]
    return found
