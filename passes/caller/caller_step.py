"""Trace a decode step over a cache that is the caller's, and tie its segments to the call.

    before   Dynamo's graph of one call: ids [B, 1], masks, parameters, keys, values, lengths
    traced   caller.0, caller.1, ...          one for each tensor of the call, in order
    named    ids, parameters by name, keys and values by layer, slots, caller.<place> for the rest
    placed   the segments of ``split_segments``, and which of the call's tensors each one reads

Nobody says which input is what. Parameters are known by identity; a cache is what the graph writes
to, its floating-point tensors in pairs of keys and values, one pair a layer; the ids are whole
numbers that look up an embedding; a scalar that only places one layer's rows is its ``slots``. What
else the caller brings, as masks and positions, belongs to the prelude.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from eepass.errors import PassError
from eepass.passes.graph_walk import descendants, mutated_arguments
from eepass.passes.report import PassReport
from eepass.passes.split.check import refuse_difference
from eepass.passes.split.split_segments import build_segment
from eepass.passes.trace.capture import trace_to_aten
from eepass.segments import CallerStep, DecoderGraph, Input, InputKind, SplitDecoder

aten = torch.ops.aten


def trace_caller_step(step: Callable[..., Tensor], tensors: Sequence[Tensor]) -> DecoderGraph:
    """``step``, a function of ``tensors`` to logits [B, 1, V]; inputs are numbered, not named."""
    try:
        traced = trace_to_aten(step, tensors)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PassError(f"its graph cannot be traced to ATen: {first}") from error
    # a float that has changed once between calls comes as a tensor, and may change with every call
    for node in traced.graph.nodes:
        if isinstance(node.meta.get("val"), (torch.SymFloat, torch.SymInt, torch.SymBool)):
            raise PassError("it computes with a number that changes from call to call")
    inputs = tuple(Input("positions", f"caller.{place}") for place in range(len(tensors)))
    return DecoderGraph(traced, inputs, rows=1, cache_length=0, tensors={}, windows={})


def name_inputs(
    decoder: DecoderGraph, report: PassReport, *, tensors: Sequence[Tensor],
    weights: Mapping[int, str],
) -> DecoderGraph:  # fmt: skip
    """``tensors``: those of the call; ``weights``: names of parameters and buffers by ``id``."""
    targets = (t for node in decoder.graph.graph.nodes for t in mutated_arguments(node))
    written = [node for node in dict.fromkeys(targets) if node in decoder.roles]
    if not written or len(written) % 2:
        raise PassError("it writes no keys and values in pairs to a static cache")
    ids = _token_ids(decoder, tensors, weights)
    inputs: list[Input] = []
    for (node, role), tensor in zip(decoder.roles.items(), tensors, strict=True):
        weight = weights.get(id(tensor))
        if node in written:
            layer, second = divmod(written.index(node), 2)
            if weight is not None:
                raise PassError(f"it writes to {weight}, which is a weight")
            if tensor.ndim != 4:
                raise PassError(f"its cache is of shape {tuple(tensor.shape)}, not [B, G, C, D]")
            kind: InputKind = "values" if second else "keys"
            role = Input(kind, f"{kind}.{layer}", layer)
        elif node is ids:
            role = Input("ids", "ids")
        elif weight is not None:
            role = Input("parameter", weight)
        elif _places_rows(node):
            role = Input("slots", f"slots.{len(inputs)}")
        inputs.append(role)
    report.rewritten = len(inputs)
    named = dict(zip(inputs, tensors, strict=True))
    return replace(
        decoder,
        inputs=tuple(inputs),
        cache_length=next(int(t.shape[2]) for role, t in named.items() if role.kind == "keys"),
        tensors={role.name: t for role, t in named.items() if role.kind == "parameter"},
    )


def _places_rows(node: Node) -> bool:
    """Whether a scalar serves to place one layer's rows, so that its arithmetic goes with it."""
    value = node.meta["val"]
    writes = (aten.index_copy_.default, aten.index_put_.default)
    return (
        value.ndim == 0
        and not value.is_floating_point()
        and all(
            user.target is aten.add.Tensor and all(after.target in writes for after in user.users)
            for user in node.users
        )
    )


def _token_ids(
    decoder: DecoderGraph, tensors: Sequence[Tensor], weights: Mapping[int, str]
) -> Node:
    """The input [B, 1] that looks up the table with a row for each logit, or else the largest."""
    logits = decoder.outputs[0].meta["val"]
    if logits.ndim != 3 or logits.shape[1] != 1 or not logits.is_floating_point():
        raise PassError(f"its result is {tuple(logits.shape)}, not logits of one token a sequence")
    found: dict[Node, int] = {}
    for node, tensor in zip(decoder.roles, tensors, strict=True):
        value = node.meta["val"]
        if value.is_floating_point() or value.ndim != 2 or id(tensor) in weights:
            continue
        tables: list[Any] = [
            reader.args[0]
            for reader in descendants(node.graph, [node])
            if reader.target is aten.embedding.default and _is_index(node, reader)
        ]
        rows = [int(table.meta["val"].shape[0]) for table in tables]
        if rows and value.shape[1] == 1:
            found[node] = (1 << 40) if logits.shape[-1] in rows else max(rows)
    if not found:
        raise PassError("no input of one token a sequence looks up an embedding")
    return max(found, key=found.__getitem__)


def _is_index(ids: Node, embedding: Node) -> bool:
    index: Any = embedding.args[1]
    while index is not ids and isinstance(index, Node) and len(index.all_input_nodes) == 1:
        index = index.all_input_nodes[0]
    return index is ids


def place_inputs(split: SplitDecoder, report: PassReport, *, decoder: DecoderGraph) -> CallerStep:
    """Tie the inputs of ``split`` to places in the call, as ``decoder`` has them.

    Side inputs that are inputs of the call are not passed through the prelude.
    """
    places = {role: place for place, role in enumerate(decoder.inputs)}
    caches = [role for role in decoder.inputs if role.layer >= 0]
    # keys before values, layer by layer
    caches.sort(key=lambda role: (role.layer, role.kind))
    role = split.positional.roles
    sides = dict(zip(split.side_outputs, split.positional.outputs, strict=True))
    passed = {name: places[role[node]] for name, node in sides.items() if node in role}
    made = {name: node for name, node in sides.items() if node not in role}
    report.rewritten = len(passed)
    positional = build_segment([], list(made.values()), role)
    return CallerStep(
        split=replace(split, positional=positional, side_outputs=tuple(made)),
        places=places,
        passed=passed,
        caches=tuple(places[role] for role in caches),
        advance=decoder.advance,
        batch=int(decoder.examples[caches[0]].shape[0]),
        logits=decoder.outputs[0].meta["val"],
        stacked={},
    )


def check_caller_step(
    step: Callable[..., Tensor], tensors: Sequence[Tensor], found: CallerStep
) -> None:
    """Run both on copies of what they write to; raises ``PassError`` where they differ in a bit."""
    written = {*found.caches, *(place for place, _ in found.advance)}
    whole, parts = (
        [t.clone() if place in written else t for place, t in enumerate(tensors)] for _ in range(2)
    )
    with torch.no_grad():
        expected = step(*whole)
        logits = found.split.run(found.value_of(parts))
        for place, rows in found.advance:
            parts[place].add_(rows)
    refuse_difference(
        {"logits": logits, **{f"input {place}": parts[place] for place in written}},
        {"logits": expected, **{f"input {place}": whole[place] for place in sorted(written)}},
    )
