"""Masks and biases a model makes by slot, not from the mask it is given.

A buffer [.., N, N] of who may look where is read, over a static cache, in its last rows, as if the
tokens stood at the cache's end:

    before   allowed = buffer[:, :, C - R : C, :C]
    after    allowed = buffer[:, :, slots, :C]

and what is made of the numbers of the slots (linear biases) counts slots, not positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from eepass.segments import Input, Segment

aten = torch.ops.aten
ARANGE = {aten.arange.default, aten.arange.start, aten.arange.start_step}


def rows_of_buffers_by_slot(traced: GraphModule, inputs: Sequence[Input], rows: int) -> int:
    """Rewrite the reads of mask buffers in place; returns how many."""
    placeholders = traced.graph.find_nodes(op="placeholder")
    role = dict(zip(placeholders, inputs, strict=True))
    slots: Any = None
    length = rewritten = 0
    for node in list(traced.graph.nodes):
        args: tuple[Any, ...] = node.args
        if node.target is aten.index_copy_.default and args[0] in role:
            # a layer reads its mask after it wrote its keys
            slots, length = args[2], args[0].meta["val"].shape[args[1]]
        if slots is None or not _reads_last_rows(node, role, length, rows):
            continue
        with traced.graph.inserting_before(node):
            new = traced.graph.call_function(aten.index_select.default, (*args[:2], slots))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        traced.graph.erase_node(node)
        rewritten += 1
    return rewritten


def _reads_last_rows(node: Node, role: dict[Node, Input], slots: int, rows: int) -> bool:
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
    graph = layer.graph.graph
    role = dict(zip(graph.find_nodes(op="placeholder"), layer.inputs, strict=True))
    apart: dict[Node, bool] = {}  # of nodes that no token reaches: whether slots are numbered
    for node in graph.nodes:
        if node.op == "placeholder":
            kind, name = role[node].kind, role[node].name
            if kind in ("parameter", "slots"):
                apart[node] = kind == "slots" or name.startswith("constant.")
        elif node.op == "call_function" and all(arg in apart for arg in node.all_input_nodes):
            numbered = node.target in (
                aten.arange.default,
                aten.arange.start,
                aten.arange.start_step,
            )
            apart[node] = numbered or any(apart[arg] for arg in node.all_input_nodes)
            shape = tuple(node.meta["val"].shape) if "val" in node.meta else ()
            if apart[node] and shape[-1:] == (cache_length,):
                return True
    return False
