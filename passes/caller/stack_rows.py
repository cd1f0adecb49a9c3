"""Several rows of one sequence through a layer traced for one: rows go as a batch over one cache.

    before   hidden [1, 1, H]; keys.index_copy_(2, arange(1) + length, k [1, G, 1, D])
             o = attention(q [1, Q, 1, D], keys, values, mask [1, 1, 1, C])
    after    hidden [R, 1, H]; keys.index_copy_(2, slots [R], k [R, G, 1, D] -> [1, G, R, D])
             o = attention(q -> [1, Q, R, D], keys, values, mask -> [1, 1, R, C]) -> [R, Q, 1, D]

What is elementwise, a linear layer or a norm takes a batch as it is; sizes of one in front become
R. ``check_stacked`` runs both and refuses what this does not fit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from eepass.errors import PassError
from eepass.passes.split.split_segments import structure_of
from eepass.passes.trace.capture import drop_dead_code
from eepass.segments import Input, Segment

aten = torch.ops.aten
RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.expand.default,
}
STACKED = ("hidden", "side", "slots")


def stack_rows(layer: Segment, rows: int) -> Segment:
    """``layer`` for ``rows`` rows: hidden and sides [R, …], slots [R], all else as before.

    Raises ``PassError`` where it does not take a batch.
    """
    gm = copy.deepcopy(layer.graph)
    role = dict(zip(gm.graph.find_nodes(op="placeholder"), layer.inputs, strict=True))
    stacked = {node for node, r in role.items() if r.kind in STACKED}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not any(arg in stacked for arg in node.all_input_nodes):
            continue
        if any(arg in role and role[arg].kind == "slots" for arg in node.all_input_nodes):
            slots = next(a for a in node.all_input_nodes if a in role and role[a].kind == "slots")
            if node.target is aten.add.Tensor:
                # arange(1) + length is what the input stands for from here on
                node.replace_all_uses_with(slots)
                gm.graph.erase_node(node)
                continue
        if node.target in RESHAPES:
            _grow(node, rows)
        elif node.target is aten.index_copy_.default:
            _write_rows(gm, node, stacked)
            # what it returns is the cache, which has no rows
            continue
        elif node.target is aten.scaled_dot_product_attention.default:
            _attend_rows(gm, node, stacked)
        stacked.add(node)
    drop_dead_code(gm)
    examples = []
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for node, r in role.items():
            value = node.meta["val"]
            shape = tuple(value.shape)
            if r.kind in STACKED:
                if shape and shape[0] != 1:
                    raise PassError(f"its {r.name} of shape {shape} is not of one row")
                shape = (rows, *shape[1:])
            examples.append(torch.empty(shape, dtype=value.dtype, device=value.device))
    gm.recompile()
    try:
        with torch.no_grad():
            FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*examples)
    except RuntimeError as error:
        raise PassError(f"its layers take no batch of rows: {error}") from error
    return Segment(gm, layer.inputs, structure_of(gm, layer.inputs))


def check_stacked(
    layer: Segment, stacked: Segment, rows: int, values: Mapping[Input, Tensor]
) -> None:
    """Run ``rows`` different rows through both; raises ``PassError`` where they differ.

    ``values``: the inputs of ``layer`` in some step, which are not written to.
    """
    one = {r: v.clone() if r.kind in ("keys", "values") else v for r, v in values.items()}
    all_ = {r: v.clone() if r.kind in ("keys", "values") else v for r, v in values.items()}
    hidden = next(v for r, v in values.items() if r.kind == "hidden")
    if any(v.shape[2] < rows for r, v in one.items() if r.kind == "keys"):
        raise PassError("its cache is too short for several rows")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(rows, *hidden.shape[1:], generator=generator).to(hidden) * hidden.std()
    with torch.no_grad():
        found: list[Tensor] = []
        # twice: the second time every row finds the others' keys, as they do in one pass
        for _ in range(2):
            found = []
            for row in range(rows):
                fed = dict(one)
                for r, value in values.items():
                    if r.kind == "hidden":
                        fed[r] = drawn[row : row + 1]
                    elif r.kind == "slots":
                        fed[r] = torch.full_like(value, row)
                    elif r.kind == "side":
                        fed[r] = _of_row(value, row)
                found.append(layer.graph(*(fed[r] for r in layer.inputs)))
        for r, value in values.items():
            if r.kind == "hidden":
                all_[r] = drawn
            elif r.kind == "slots":
                all_[r] = torch.arange(rows, dtype=value.dtype, device=value.device)
            elif r.kind == "side":
                all_[r] = torch.cat([_of_row(value, row) for row in range(rows)])
        try:
            together = stacked.graph(*(all_[r] for r in stacked.inputs))
        except (RuntimeError, IndexError) as error:
            raise PassError(f"its layers take no batch of rows: {error}") from error
    bound = 64 * torch.finfo(hidden.dtype).eps
    pairs = [(together, torch.cat(found))]
    pairs += [(all_[r], one[r]) for r in one if r.kind in ("keys", "values")]
    for ours, theirs in pairs:
        scale = float(theirs.abs().max()) or 1.0
        if not float((ours - theirs).abs().max()) <= bound * scale:
            raise PassError("several rows through one of its layers differ from one by one")


def _of_row(side: Tensor, row: int) -> Tensor:
    """``side`` made different for each row, masks and whole numbers excepted."""
    plain = side.is_floating_point() and bool(side.abs().max() < 1e3)
    return side * (1 + row / 8) if plain else side


def _grow(node: Node, rows: int) -> None:
    args: tuple[Any, ...] = node.args
    sizes = list(args[1])
    if sizes and sizes[0] == 1:
        sizes[0] = rows
        node.args = (args[0], sizes, *args[2:])


def _write_rows(gm: GraphModule, node: Node, stacked: set[Node]) -> None:
    args: tuple[Any, ...] = node.args
    target, dim, index, source = args
    if source not in stacked or index not in stacked or target in stacked:
        raise PassError("it writes its cache in another way than row by row")
    with gm.graph.inserting_before(node):
        turned = gm.graph.call_function(aten.transpose.int, (source, 0, dim))
    node.args = (target, dim, index, turned)


def _attend_rows(gm: GraphModule, node: Node, stacked: set[Node]) -> None:
    args: tuple[Any, ...] = node.args
    q, k, v, *rest = args
    if q not in stacked or k in stacked or v in stacked:
        raise PassError("it attends to other keys than those of its cache")
    with gm.graph.inserting_before(node):
        q = gm.graph.call_function(aten.transpose.int, (q, 0, 2))
        if rest and rest[0] in stacked:
            rest[0] = gm.graph.call_function(aten.transpose.int, (rest[0], 0, 2))
    node.args = (q, k, v, *rest)
    with gm.graph.inserting_after(node):
        turned = gm.graph.call_function(aten.transpose.int, (node, 0, 2))
    turned.meta = dict(node.meta)
    node.replace_all_uses_with(turned, delete_user_cb=lambda user: user is not turned)
    stacked.add(turned)
