"""Find out the roles of the inputs of a step that somebody else traced.

    before   caller.0, caller.1, ...          one for each tensor of the call, in order
    after    ids, parameters by name, keys and values by layer, slots, caller.<place> for the rest

Nobody says which input is what. Parameters are known by identity; a cache is what the graph writes
to, its floating-point tensors in pairs of keys and values, one pair a layer; the ids are whole
numbers that look up an embedding; a scalar that only places one layer's rows is its ``slots``. What
else the caller brings, as masks and positions, belongs to the prelude.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from eepass.errors import PassError
from eepass.passes.graph_walk import descendants, mutated_arguments
from eepass.passes.report import PassReport
from eepass.segments import DecoderGraph, Input, InputKind

aten = torch.ops.aten


def name_inputs(
    decoder: DecoderGraph,
    report: PassReport,
    *,
    tensors: Sequence[Tensor],
    weights: Mapping[int, str],
) -> DecoderGraph:
    """``tensors``: those of the call; ``weights``: names of parameters and buffers by ``id``."""
    placeholders = list(decoder.roles)
    targets = (t for node in decoder.graph.graph.nodes for t in mutated_arguments(node))
    written = [node for node in dict.fromkeys(targets) if node in decoder.roles]
    if not written or len(written) % 2:
        raise PassError("it writes no keys and values in pairs to a static cache")
    ids = _token_ids(decoder, tensors, weights)
    inputs = []
    for place, (node, tensor) in enumerate(zip(placeholders, tensors, strict=True)):
        if node in written:
            layer, second = divmod(written.index(node), 2)
            kind = "values" if second else "keys"
            if id(tensor) in weights:
                raise PassError(f"it writes to {weights[id(tensor)]}, which is a weight")
            if tensor.ndim != 4:
                raise PassError(f"its cache is of shape {tuple(tensor.shape)}, not [B, G, C, D]")
            inputs.append(Input(cast(InputKind, kind), f"{kind}.{layer}", layer))
        elif node is ids:
            inputs.append(Input("ids", "ids"))
        elif id(tensor) in weights:
            inputs.append(Input("parameter", weights[id(tensor)]))
        elif _places_rows(node):
            inputs.append(Input("slots", f"slots.{place}"))
        else:
            inputs.append(decoder.inputs[place])
    report.rewritten = len(inputs)
    return replace(
        decoder,
        inputs=tuple(inputs),
        cache_length=int(tensors[placeholders.index(written[0])].shape[2]),
        tensors={
            role.name: tensor
            for role, tensor in zip(inputs, tensors, strict=True)
            if role.kind == "parameter"
        },
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
        rows = [
            _rows_of(reader.args[0])
            for reader in descendants(node.graph, [node])
            if reader.target is aten.embedding.default and _is_index(node, reader)
        ]
        if rows and value.shape[1] == 1:
            found[node] = (1 << 40) if logits.shape[-1] in rows else max(rows)
    if not found:
        raise PassError("no input of one token a sequence looks up an embedding")
    return max(found, key=found.__getitem__)


def _rows_of(table: Any) -> int:
    return int(table.meta["val"].shape[0])


def _is_index(ids: Node, embedding: Node) -> bool:
    index: Any = embedding.args[1]
    while index is not ids and isinstance(index, Node) and len(index.all_input_nodes) == 1:
        index = index.all_input_nodes[0]
    return index is ids
