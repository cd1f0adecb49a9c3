"""Split the decoder graph at the hidden states between its layers.

    before   logits = decoder(ids, positions, masks, parameters, cache)
    after    hidden        = embed(ids, positions)
             side          = positional(positions, masks)
             hidden        = layers[i](hidden, side, keys_i, values_i, slots_i)     i = 0 .. L-1
             logits        = head(hidden)

What depends on ids, positions or masks but on no hidden state is prelude; what depends on
parameters or cache state alone goes with the layer that uses it. A layer that reads anything of an
earlier one besides the hidden state between them is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from eepass.errors import PassError
from eepass.passes.graph_walk import (
    ancestors,
    copy_nodes,
    descendants,
    hoist_placeholders,
    kv_writes,
)
from eepass.passes.report import PassReport
from eepass.passes.split.split_head import split_head
from eepass.passes.trace.read_masks_by_slot import counts_slots
from eepass.segments import HIDDEN, DecoderGraph, Input, Segment, SplitDecoder


def split_segments(decoder: DecoderGraph, report: PassReport) -> SplitDecoder:
    graph, role, hidden_states = decoder.graph.graph, decoder.roles, decoder.hidden_states
    index = _segment_indices(graph, hidden_states)

    from_ids = descendants(graph, [n for n, r in role.items() if r.kind == "ids"])
    given = {n for n, r in role.items() if r.kind in ("ids", "positions", "mask")}
    prelude = descendants(graph, given) - set(index)
    sides = [
        node
        for node in graph.nodes
        if node in prelude
        and node is not hidden_states[0]
        and any(user in index for user in node.users)
    ]
    embedded = [node for node in sides if node in from_ids and node not in role]
    positional = [node for node in sides if node not in embedded]
    side_role = {node: Input("side", f"side.{i}") for i, node in enumerate(positional)}
    side_role |= {node: Input("side", f"token.{i}") for i, node in enumerate(embedded)}

    nodes: list[list[Node]] = [[] for _ in hidden_states]
    for node, number in index.items():
        if node.op != "output":
            nodes[number].append(node)
    roles = [{**role, **side_role, hidden: HIDDEN} for hidden in hidden_states]
    layers = tuple(
        build_segment(nodes[number], [output], roles[number])
        for number, output in enumerate(hidden_states[1:])
    )
    split = SplitDecoder(
        rows=decoder.rows,
        cache_length=decoder.cache_length,
        tensors=decoder.tensors,
        embed=build_segment([], [hidden_states[0], *embedded], role),
        embed_outputs=("hidden", *(side_role[node].name for node in embedded)),
        positional=build_segment([], positional, role),
        side_outputs=tuple(side_role[node].name for node in positional),
        layers=layers,
        kv_fills=tuple(kv_fill(layer) for layer in layers),
        head=split_head(nodes[-1], decoder.outputs[0], roles[-1], build_segment),
        windows=decoder.windows,
        layers_found_by=decoder.layers_found_by,
        counts_slots=any(counts_slots(layer, decoder.cache_length) for layer in layers),
        positions=decoder.positions,
    )
    report.rewritten = len(layers)
    report.note(f"{len(layers)} layers, {split.distinct_layers} distinct")
    if split.head.reason:
        report.skip("head", split.head.reason)
    return split


def build_segment(
    nodes: Sequence[Node], outputs: Sequence[Node], role: Mapping[Node, Input]
) -> Segment:
    """A graph of ``nodes``, and of whatever they need that has no role."""
    graph = Graph()
    known: dict[Node, Node] = {}
    inputs: dict[Node, Input] = {}

    def resolve(node: Node) -> Node:
        if node not in role:
            copy_nodes([node], graph, known, resolve)
            return known[node]
        placeholder = graph.placeholder(f"{role[node].kind}_{len(inputs)}")
        placeholder.meta = dict(node.meta)
        inputs[placeholder] = role[node]
        return placeholder

    for node in (*nodes, *outputs):
        if node not in known:
            known[node] = resolve(node)
    results = tuple(known[node] for node in outputs)
    graph.output(results[0] if len(results) == 1 else results)
    hoist_placeholders(graph, list(inputs))
    module = GraphModule(torch.nn.Module(), graph)
    return Segment(module, tuple(inputs.values()), structure_of(module, tuple(inputs.values())))


def kv_fill(layer: Segment) -> Segment:
    """The part of a layer that writes its keys and values, from any hidden state."""
    role = layer.roles
    writes = [node for nodes in kv_writes(layer).values() for node in nodes]
    needed = ancestors(writes) - set(role)
    return build_segment([n for n in layer.graph.graph.nodes if n in needed], writes, role)


def structure_of(module: GraphModule, inputs: Sequence[Input]) -> str:
    """Hash of code, roles, shapes, strides and dtypes: equal segments compile once."""
    described: list[Any] = [module.code]
    for placeholder, role in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        value = placeholder.meta.get("val")
        described.append(
            (role.kind, tuple(value.shape), tuple(value.stride()), str(value.dtype))
            if value is not None
            else role.kind
        )
    return hashlib.sha256(repr(described).encode()).hexdigest()[:16]


def _segment_indices(graph: Graph, hidden_states: Sequence[Node]) -> dict[Node, int]:
    """Which layer each node computed from hidden state 0 belongs to; L is the head."""
    start = {node: index for index, node in enumerate(hidden_states)}
    found: dict[Node, int] = {}
    for node in graph.nodes:
        sources = {arg: start.get(arg, found.get(arg)) for arg in node.all_input_nodes}
        known = {arg: index for arg, index in sources.items() if index is not None}
        if not known or node is hidden_states[0]:
            continue
        found[node] = max(known.values())
        for arg, index in known.items():
            if index != found[node] and node.op != "output":
                raise PassError(
                    f"layer {found[node]} reads {arg.name} of layer {index} "
                    "besides the hidden state between them"
                )
    return found
