"""Several rows of one sequence through a layer traced for one: rows go as a batch over one cache.

    before   hidden [1, 1, H]; keys.index_copy_(2, arange(1) + length, k [1, G, 1, D])
             o = attention(q [1, Q, 1, D], keys, values, mask [1, 1, 1, C])
    after    hidden [R, 1, H]; keys.index_copy_(2, slots [R], k [R, G, 1, D] -> [1, G, R, D])
             o = attention(q -> [1, Q, R, D], keys, values, mask -> [1, 1, R, C]) -> [R, Q, 1, D]

What is elementwise, a linear layer or a norm takes a batch as it is; sizes of one in front become
R. ``check_stacked`` runs both and refuses what this does not fit: the step keeps one row then.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from eepass.errors import PassError
from eepass.passes.graph_walk import propagate_shapes, replace_node
from eepass.passes.report import PassReport
from eepass.passes.split.split_segments import structure_of
from eepass.passes.trace.clean_step import drop_dead_code
from eepass.segments import HIDDEN, CallerStep, Input, Segment

aten = torch.ops.aten
RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default}
STACKED = ("hidden", "side", "slots")


def stack_rows(
    step: CallerStep, report: PassReport, *, tensors: Sequence[Tensor], row_counts: Sequence[int]
) -> CallerStep:
    """``step`` with layers for ``row_counts`` rows of one sequence, checked on the ``tensors`` of a
    call; or as it is, with the reason in the report."""
    try:
        if step.batch > 1:
            raise PassError("several sequences go together already")
        outside = step.value_of(tensors)
        with torch.no_grad():
            made = step.split.prelude(outside)
        stacked = {}
        for rows in row_counts:
            found: dict[str, Segment] = {}
            for layer in step.split.layers:
                if layer.structure not in found:
                    found[layer.structure] = _stack_layer(layer, rows)
                    report.rewritten += 1
                    values = {r: made[r] if r in made else outside(r) for r in layer.inputs}
                    check_stacked(layer, found[layer.structure], rows, values)
            stacked[rows] = tuple(
                replace(found[layer.structure], inputs=layer.inputs) for layer in step.split.layers
            )
    except PassError as error:
        report.skip("several rows", str(error))
        return step
    return replace(step, stacked=stacked)


def _stack_layer(layer: Segment, rows: int) -> Segment:
    """``layer`` for ``rows`` rows: hidden and sides [R, …], slots [R], all else as before."""
    segment = replace(layer, graph=copy.deepcopy(layer.graph))
    gm, role = segment.graph, segment.roles
    stacked = {node for node, r in role.items() if r.kind in STACKED}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not any(arg in stacked for arg in node.all_input_nodes):
            continue
        slots = [arg for arg in node.all_input_nodes if arg in role and role[arg].kind == "slots"]
        if slots and node.target is aten.add.Tensor:
            # arange(1) + length, which is what the input stands for from here on
            replace_node(node, slots[0])
            continue
        args: tuple[Any, ...] = node.args
        if node.target in RESHAPES and args[1][:1] == [1]:
            node.args = (args[0], [rows, *args[1][1:]], *args[2:])
        elif node.target is aten.index_copy_.default:
            target, dim, index, source = args
            if source not in stacked or index not in stacked or target in stacked:
                raise PassError("it writes its cache in another way than row by row")
            node.args = (target, dim, index, _transposed(node, source, dim))
            # what it returns is the cache, which has no rows
            continue
        elif node.target is aten.scaled_dot_product_attention.default:
            _attend_rows(node, stacked)
        stacked.add(node)
    drop_dead_code(segment, PassReport())
    shapes = {r: tuple(value.shape) for r, value in segment.examples.items()}
    for r, shape in shapes.items():
        if r.kind in STACKED:
            if shape and shape[0] != 1:
                raise PassError(f"its {r.name} of shape {shape} is not of one row")
            shapes[r] = (rows, *shape[1:])
    gm.recompile()
    try:
        propagate_shapes(gm, list(shapes.values()))
    except RuntimeError as error:
        raise PassError(f"its layers take no batch of rows: {error}") from error
    return replace(segment, structure=structure_of(gm, segment.inputs))


def check_stacked(
    layer: Segment, stacked: Segment, rows: int, values: Mapping[Input, Tensor]
) -> None:
    """Run ``rows`` different rows through both; raises ``PassError`` where they differ.

    ``values``: the inputs of ``layer`` in some step, which are not written to.
    """
    caches = [role for role in values if role.kind in ("keys", "values")]
    if any(values[role].shape[2] < rows for role in caches if role.kind == "keys"):
        raise PassError("its cache is too short for several rows")
    one, together = ({**values, **{r: values[r].clone() for r in caches}} for _ in range(2))
    hidden = values[HIDDEN]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(rows, *hidden.shape[1:], generator=generator).to(hidden) * hidden.std()

    def row_of(row: int, role: Input) -> Tensor:
        if role.kind == "hidden":
            return drawn[row : row + 1]
        if role.kind == "slots":
            return torch.full_like(values[role], row)
        value = one[role]
        # sides differ by row, masks and whole numbers excepted
        plain = role.kind == "side" and value.is_floating_point() and value.abs().max() < 1e3
        return value * (1 + row / 8) if plain else value

    def all_of(role: Input) -> Tensor:
        if role.kind not in STACKED:
            return together[role]
        shape = (1, *values[role].shape[1:])
        return torch.cat([row_of(row, role).reshape(shape) for row in range(rows)])

    with torch.no_grad():
        # twice: the second time every row finds the others' keys, as they do in one pass
        for _ in range(2):
            found = [layer.run(partial(row_of, row))[0] for row in range(rows)]
        try:
            (result,) = stacked.run(all_of)
        except (RuntimeError, IndexError) as error:
            raise PassError(f"its layers take no batch of rows: {error}") from error
    bound = 64 * torch.finfo(hidden.dtype).eps
    for ours, theirs in [(result, torch.cat(found)), *((together[r], one[r]) for r in caches)]:
        scale = float(theirs.abs().max()) or 1.0
        if not float((ours - theirs).abs().max()) <= bound * scale:
            raise PassError("several rows through one of its layers differ from one by one")


def _transposed(place: Node, value: Node, dim: int) -> Node:
    """``value`` right before ``place``, with its rows in ``dim``."""
    with place.graph.inserting_before(place):
        return place.graph.call_function(aten.transpose.int, (value, 0, dim))


def _attend_rows(node: Node, stacked: set[Node]) -> None:
    args: tuple[Any, ...] = node.args
    q, k, v, *rest = args
    if q not in stacked or k in stacked or v in stacked:
        raise PassError("it attends to other keys than those of its cache")
    if rest and rest[0] in stacked:
        rest[0] = _transposed(node, rest[0], 2)
    node.args = (_transposed(node, q, 2), k, v, *rest)
    result = _transposed(node.next, node, 2)
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
    stacked.add(result)
