"""Split the decoder graph at the hidden states between its layers.

    before   logits = decoder(ids, positions, masks, parameters, cache)
    after    hidden        = embed(ids, positions)
             side          = positional(positions, masks)
             hidden        = layers[i](hidden, side, keys_i, values_i, slots_i)     i = 0 .. L-1
             logits        = head(hidden), and transform(linear(norm(hidden), weight, bias))

What depends on ids, positions or masks but on no hidden state is prelude; what depends on
parameters or cache state alone goes with the layer that uses it, so that layers stay isomorphic. A
layer that reads anything of an earlier one besides the hidden state between them is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

import eepass.ops.packed  # noqa: F401  the operator must be defined before it is looked for
from eepass.errors import PassError
from eepass.passes.graph_walk import (
    ancestors,
    copy_nodes,
    descendants,
    hoist_placeholders,
    kv_writes,
    replace_node,
)
from eepass.passes.report import PassReport
from eepass.segments import HIDDEN, DecoderGraph, Head, Input, Segment, SplitDecoder

aten = torch.ops.aten
ARANGE = {aten.arange.default, aten.arange.start, aten.arange.start_step}
PACKED = torch.ops.eepass.packed_linear.default
# on logits these act on each row of the LM head by itself
ELEMENTWISE = {
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.tanh.default,
    aten.to.dtype, aten._to_copy.default, aten.alias.default,
}  # fmt: skip


def merge_equal_prelude(decoder: DecoderGraph, report: PassReport) -> DecoderGraph:
    """Compute once what several layers compute alike before they read the hidden state.

    before   table_0 = cos(positions * f); table_1 = cos(positions * f)      one for each layer
    after    table_0 = cos(positions * f)                                    read by both
    """
    graph = decoder.graph.graph
    prelude = _prelude(decoder) - descendants(graph, decoder.hidden_states[:1])
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node in prelude and node.op == "call_function":
            first = seen.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
            if first is not node:
                replace_node(node, first)
                report.rewritten += 1
    return decoder


def split_segments(decoder: DecoderGraph, report: PassReport) -> SplitDecoder:
    graph, role, hidden_states = decoder.graph.graph, decoder.roles, decoder.hidden_states
    index = _segment_indices(graph, hidden_states)
    prelude = _prelude(decoder) - set(index) - {hidden_states[0]}
    sides = [n for n in graph.nodes if n in prelude and any(user in index for user in n.users)]
    from_ids = descendants(graph, [n for n, r in role.items() if r.kind == "ids"])
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
        kv_fills=tuple(_kv_fill(layer) for layer in layers),
        head=_split_head(nodes[-1], decoder.outputs[0], roles[-1]),
        windows=decoder.windows,
        layers_found_by=decoder.layers_found_by,
        counts_slots=any(_counts_slots(layer, decoder.cache_length) for layer in layers),
        positions=decoder.positions,
    )
    report.rewritten = len(layers)
    report.note(f"{len(layers)} layers, {split.distinct_layers} distinct")
    if split.head.reason:
        report.skip("head", split.head.reason)
    return split


def _prelude(decoder: DecoderGraph) -> set[Node]:
    """What depends on the step's inputs, of which the prelude is a part."""
    given = [n for n, r in decoder.roles.items() if r.kind in ("ids", "positions", "mask")]
    return descendants(decoder.graph.graph, given)


def _segment_indices(graph: Graph, hidden_states: Sequence[Node]) -> dict[Node, int]:
    """Which layer each node computed from hidden state 0 belongs to; L is the head."""
    # a hidden state is of the layer that makes it, and read as the input of the next
    read_as = {node: index for index, node in enumerate(hidden_states)}
    found: dict[Node, int] = {}
    for node in graph.nodes:
        known = {arg: read_as[arg] for arg in node.all_input_nodes if arg in read_as}
        if not known or node is hidden_states[0]:
            continue
        found[node] = max(known.values())
        read_as.setdefault(node, found[node])
        for arg, index in known.items():
            if index != found[node] and node.op != "output":
                raise PassError(
                    f"layer {found[node]} reads {arg.name} of layer {index} "
                    "besides the hidden state between them"
                )
    return found


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
    module, roles = GraphModule(torch.nn.Module(), graph), tuple(inputs.values())
    return Segment(module, roles, structure_of(module, roles))


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


def _kv_fill(layer: Segment) -> Segment:
    """The part of a layer that writes its keys and values, from any hidden state."""
    role = layer.roles
    writes = [node for nodes in kv_writes(layer).values() for node in nodes]
    needed = ancestors(writes) - set(role)
    return build_segment([n for n in layer.graph.graph.nodes if n in needed], writes, role)


def _split_head(nodes: Sequence[Node], logits: Node, role: Mapping[Node, Input]) -> Head:
    """The head, taken apart into final norm, LM head and transform of the logits.

    Early exits read single rows of the LM head, so it must be one linear layer over a parameter,
    with nothing after it but elementwise work. Otherwise the head stays whole, with the reason.
    """
    head = Head(build_segment(nodes, [logits], role))
    linears = [node for node in nodes if node.target in (aten.linear.default, PACKED)]
    if len(linears) != 1:
        head.reason = f"the head has {len(linears)} linear layers, expected one"
        return head
    linear = linears[0]
    args: tuple[Any, ...] = linear.args
    hidden, weight, bias = *args[:2], args[2] if len(args) > 2 else None
    if linear.target is PACKED:
        _, _, head.form, head.outputs, bias, head.activations = args
    operands = [node for node in (weight, bias) if node is not None]
    if any(node not in role or role[node].kind != "parameter" for node in operands):
        head.reason = "the LM head's weight is computed, not a parameter"
        return head
    after = [n for n in nodes if n in descendants(linear.graph, [linear]) and n is not linear]
    for node in after:
        if node.target not in ELEMENTWISE:
            head.reason = f"{node.target} follows the LM head: it mixes logits"
            return head
    needed = ancestors([hidden])
    head.norm = build_segment([node for node in nodes if node in needed], [hidden], role)
    head.weight, head.bias = (
        role[node].name if node is not None else "" for node in (weight, bias)
    )
    if after:
        head.transform = build_segment(after, [logits], {**role, linear: Input("hidden", "logits")})
    return head


def _counts_slots(layer: Segment, cache_length: int) -> bool:
    """Whether ``layer`` makes something of the numbers of the cache's slots by itself."""
    role = layer.roles
    # of the nodes that no token reaches: whether they hold slot numbers
    numbered: dict[Node, bool] = {}
    for node in layer.graph.graph.nodes:
        if node in role:
            kind, name = role[node].kind, role[node].name
            if kind in ("parameter", "slots"):
                numbered[node] = kind == "slots" or name.startswith("constant.")
        elif node.op == "call_function" and all(arg in numbered for arg in node.all_input_nodes):
            made_of = [numbered[arg] for arg in node.all_input_nodes]
            numbered[node] = node.target in ARANGE or any(made_of)
            shape = tuple(node.meta["val"].shape) if "val" in node.meta else ()
            if numbered[node] and shape[-1:] == (cache_length,):
                return True
    return False
