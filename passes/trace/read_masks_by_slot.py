"""Read the rows of a model's own mask buffers by the slots of the tokens.

A buffer [.., N, N] of who may look where is read, over a static cache, in its last rows, as if the
tokens stood at the cache's end:

    before   allowed = buffer[:, :, C - R : C, :C]
    after    allowed = buffer[:, :, slots, :C]

Left alone: what a model makes of the numbers of the slots (linear biases). It counts slots, not
positions, which ``counts_slots`` tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from eepass.passes.graph_walk import replace_node
from eepass.passes.report import PassReport
from eepass.segments import DecoderGraph, Input, Segment

aten = torch.ops.aten
ARANGE = {aten.arange.default, aten.arange.start, aten.arange.start_step}


def read_masks_by_slot(decoder: DecoderGraph, report: PassReport) -> DecoderGraph:
    graph, role = decoder.graph.graph, decoder.roles
    slots: Any = None
    length = 0
    for node in list(graph.nodes):
        args: tuple[Any, ...] = node.args
        if node.target is aten.index_copy_.default and args[0] in role:
            # a layer reads its mask after it wrote its keys
            slots, length = args[2], args[0].meta["val"].shape[args[1]]
        if slots is None or not _reads_last_rows(node, role, length, decoder.rows):
            continue
        with graph.inserting_before(node):
            new = graph.call_function(aten.index_select.default, (*args[:2], slots))
        new.meta = dict(node.meta)
        replace_node(node, new)
        report.rewritten += 1
    return decoder


def _reads_last_rows(node: Node, role: Mapping[Node, Input], slots: int, rows: int) -> bool:
    args: tuple[Any, ...] = node.args
    if node.target is not aten.slice.Tensor or args[2:4] != (slots - rows, slots):
        return False
    source, dim = args[:2]
    value = source.meta["val"]
    while source.target is aten.slice.Tensor:
        source = source.args[0]
    return (
        source in role
        and role[source].kind == "parameter"
        and value.dtype is torch.bool
        and dim in (value.ndim - 2, -2)
        and value.shape[-1] == value.shape[-2]
    )


def counts_slots(layer: Segment, cache_length: int) -> bool:
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
            numbered[node] = node.target in ARANGE or any(
                numbered[arg] for arg in node.all_input_nodes
            )
            shape = tuple(node.meta["val"].shape) if "val" in node.meta else ()
            if numbered[node] and shape[-1:] == (cache_length,):
                return True
    return False
