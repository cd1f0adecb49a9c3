"""Bring the trace of a decode step into a form that can be split.

lift_constants       before   c = self._tensor_constant0
                     after    c = placeholder, the parameter ``constant.<n>``
replace_lengths      before   keys.index_copy_(2, arange(R) + length, k); length.add_(R)
                     after    keys.index_copy_(2, slots, k)
read_masks_by_slot   before   allowed = buffer[:, :, C - R : C, :C]
                     after    allowed = buffer[:, :, slots, :C]
drop_dead_code       drops what nothing reads, save what writes to its arguments
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from eepass.errors import PassError
from eepass.passes.graph_walk import replace_node
from eepass.passes.report import PassReport
from eepass.segments import DecoderGraph, Input, Segment

aten = torch.ops.aten


def lift_constants(decoder: DecoderGraph, report: PassReport) -> DecoderGraph:
    """Make the tensors a model builds from Python numbers inputs, so that segments own none."""
    traced, last = decoder.graph, list(decoder.roles)[-1]
    # tracing may have found some already
    first = sum(name.startswith("constant.") for name in decoder.tensors)
    lifted = {}
    for number, node in enumerate(traced.graph.find_nodes(op="get_attr"), first):
        name = f"constant.{number}"
        lifted[name] = getattr(traced, str(node.target))
        with traced.graph.inserting_after(last):
            last = traced.graph.placeholder(name.replace(".", "_"))
        last.meta = {**node.meta, "val": lifted[name]}
        replace_node(node, last)
    report.rewritten = len(lifted)
    inputs = (*decoder.inputs, *(Input("parameter", name) for name in lifted))
    return replace(decoder, inputs=inputs, tensors={**decoder.tensors, **lifted})


def replace_lengths(decoder: DecoderGraph, report: PassReport) -> DecoderGraph:
    """Give each layer the slots its rows are written to, in place of its cache's length.

    So the engine owns the lengths, and the rows of one pass need not be neighbours in the cache.
    """
    for placeholder, role in decoder.roles.items():
        if role.kind != "slots":
            continue
        slots = None
        for user in list(placeholder.users):
            if user.target is aten.add_.Tensor and not user.users:
                user.graph.erase_node(user)
            elif user.target is aten.add.Tensor and user.meta["val"].shape == (decoder.rows,):
                # arange(R) + length, which is what the input stands for from here on
                slots = user.meta["val"]
                replace_node(user, placeholder)
            else:
                raise PassError(f"layer {role.layer} uses its KV length in {user.target}")
        if slots is None:
            raise PassError(f"layer {role.layer} does not write its rows where its KV length says")
        placeholder.meta["val"] = slots
        report.rewritten += 1
    return decoder


def read_masks_by_slot(decoder: DecoderGraph, report: PassReport) -> DecoderGraph:
    """Read the rows of a model's own mask buffers by the slots of the tokens.

    A buffer [.., N, N] of who may look where is read, over a static cache, in its last rows, as if
    the tokens stood at the cache's end. Left alone: what a model makes of the numbers of the slots
    (linear biases). It counts slots, not positions, as ``SplitDecoder.counts_slots`` tells.
    """
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


def drop_dead_code(segment: Segment, report: PassReport) -> Segment:
    graph = segment.graph.graph
    before = len(graph.nodes)
    graph.eliminate_dead_code(is_impure_node=_has_effect)
    report.rewritten = before - len(graph.nodes)
    return segment


def _has_effect(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or bool(schema and schema.is_mutable)
