"""Split the decoder graph at its layer boundaries.

    before   logits = decoder(ids, positions, masks, parameters, cache)
    after    hidden        = embed(ids, positions)
             side          = positional(positions, masks)
             hidden        = layers[i](hidden, side, keys_i, values_i, start_i)     i = 0 .. L-1
             logits        = head(hidden)

What depends on ids, positions or masks but on no boundary is prelude; what depends on parameters
or cache state alone goes with the layer that uses it. A layer that reads anything of an earlier
one besides the boundary is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
    roles,
)
from eepass.passes.report import PassReport
from eepass.passes.split.split_head import split_head
from eepass.passes.trace.slot_masks import counts_slots
from eepass.segments import DecoderGraph, Input, Segment, SplitDecoder


def split_segments(
    decoder: DecoderGraph, boundaries: Sequence[Node], report: PassReport
) -> SplitDecoder:
    """Segments of ``decoder``, cut at ``boundaries`` 0..L; raises ``PassError`` if they leak."""
    graph = decoder.graph.graph
    role = roles(decoder)
    _merge_equal_prelude(graph, role, boundaries)
    home = _homes(graph, boundaries)
    _refuse_leaks(graph, home, boundaries)

    from_ids = descendants(graph, [n for n, r in role.items() if r.kind == "ids"])
    outside = {n for n, r in role.items() if r.kind in ("ids", "positions", "mask")}
    prelude = {n for n in descendants(graph, outside) if n not in home} | outside
    sides = [
        node
        for node in graph.nodes
        if node in prelude
        and node is not boundaries[0]
        and any(user in home for user in node.users)
    ]
    embedded = [node for node in sides if node in from_ids and node not in role]
    positional = [node for node in sides if node not in embedded]
    side_role = {node: Input("side", f"side.{i}") for i, node in enumerate(positional)}
    side_role |= {node: Input("side", f"token.{i}") for i, node in enumerate(embedded)}

    num_layers = len(boundaries) - 1
    layers = []
    for layer in range(num_layers):
        nodes = [node for node in graph.nodes if home.get(node) == layer]
        known_roles = {**role, **side_role, boundaries[layer]: Input("hidden", "hidden")}
        layers.append(build_segment(nodes, [boundaries[layer + 1]], known_roles))
    head_nodes = [n for n in graph.nodes if home.get(n) == num_layers and n.op != "output"]
    head_roles = {**role, **side_role, boundaries[-1]: Input("hidden", "hidden")}
    logits = graph.output_node().all_input_nodes[0]

    split = SplitDecoder(
        rows=decoder.rows,
        cache_length=decoder.cache_length,
        tensors=decoder.tensors,
        embed=build_segment([], [boundaries[0], *embedded], role),
        embed_outputs=("hidden", *(side_role[node].name for node in embedded)),
        positional=build_segment([], positional, role),
        side_outputs=tuple(side_role[node].name for node in positional),
        layers=tuple(layers),
        kv_fills=tuple(kv_fill(layer) for layer in layers),
        head=split_head(head_nodes, logits, head_roles, build_segment),
        windows=decoder.windows,
        how="; ".join(report.notes),
        counts_slots=any(counts_slots(layer, decoder.cache_length) for layer in layers),
        positions=decoder.positions,
    )
    report.rewritten = num_layers
    report.note(f"{num_layers} layers, {split.distinct_layers} distinct")
    if split.head.reason:
        report.skip("head", split.head.reason)
    return split


def build_segment(
    nodes: Sequence[Node], outputs: Sequence[Node], role: dict[Node, Input]
) -> Segment:
    """A graph of ``nodes``, and of whatever they need that has no role yet."""
    graph = Graph()
    known: dict[Node, Node] = {}
    inputs: list[Input] = []
    placeholders: list[Node] = []

    def resolve(node: Node) -> Node:
        if node in role:
            with graph.inserting_before(first) if first else graph.inserting_before():
                placeholder = graph.placeholder(f"{role[node].kind}_{len(inputs)}")
            placeholder.meta = dict(node.meta)
            inputs.append(role[node])
            placeholders.append(placeholder)
            return placeholder
        copy_nodes([node], graph, known, resolve)
        return known[node]

    first = graph.output(None)
    with graph.inserting_before(first):
        for node in [*nodes, *outputs]:
            if node not in known:
                if node in role:
                    known[node] = resolve(node)
                else:
                    copy_nodes([node], graph, known, resolve)
    results = tuple(known[node] for node in outputs)
    first.args = (results[0] if len(results) == 1 else results,)
    hoist_placeholders(graph, placeholders)
    module = GraphModule(torch.nn.Module(), graph)
    module.graph.lint()
    return Segment(module, tuple(inputs), structure_of(module, inputs))


def kv_fill(layer: Segment) -> Segment:
    """The part of a layer that writes its keys and values (from whatever boundary it is given)."""
    graph = layer.graph.graph
    role = dict(zip(graph.find_nodes(op="placeholder"), layer.inputs, strict=True))
    writes = [node for nodes in kv_writes(role, graph).values() for node in nodes]
    needed = ancestors(writes)
    nodes = [node for node in graph.nodes if node in needed and node not in role]
    return build_segment(nodes, writes, role)


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


def _homes(graph: Graph, boundaries: Sequence[Node]) -> dict[Node, int]:
    """Index of the segment each node computed from boundary 0 belongs to; L is the head."""
    starts = {node: index for index, node in enumerate(boundaries)}
    home: dict[Node, int] = {}
    for node in graph.nodes:
        found = [
            starts[arg] if arg in starts else home[arg]
            for arg in node.all_input_nodes
            if arg in starts or arg in home
        ]
        if found and node is not boundaries[0]:
            home[node] = max(found)
    return home


def _refuse_leaks(graph: Graph, home: dict[Node, int], boundaries: Sequence[Node]) -> None:
    starts = {node: index for index, node in enumerate(boundaries)}
    for node in graph.nodes:
        if node not in home or node.op == "output":
            continue
        for arg in node.all_input_nodes:
            source = starts[arg] if arg in starts else home.get(arg)
            if source is not None and source != home[node]:
                raise PassError(
                    f"layer {home[node]} reads {arg.name} of layer {source} "
                    "besides the hidden state between them"
                )


def _merge_equal_prelude(graph: Graph, role: dict[Node, Input], boundaries: Sequence[Node]) -> None:
    """Common subexpressions of what no boundary reaches (rotary tables are built per layer)."""
    inside = descendants(graph, [boundaries[0]])
    outside = {node for node, r in role.items() if r.kind in ("ids", "positions", "mask")}
    prelude = descendants(graph, outside)
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node in inside or node not in prelude or node.op != "call_function":
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node
