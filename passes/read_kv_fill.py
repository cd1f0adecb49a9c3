"""Read how a layer makes keys and values out of its graph, as data for ``eepass::fill_kv``.

    before   x = norm(hidden); k = rotate(norm(linear(x))); v = linear(x); two writes to the cache
    after    KvForm(norm="rms", key_weight="...", rotary=128, ...)

What is read is a guess by roles and shapes, and the guess is put to the test: on random tensors it
must write what the graph writes, else the layer is refused. So a layer that turns channels in
another order, or scales its keys, is not taken for one that does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from eepass import fused_ops
from eepass.passes.graph_walk import ancestors
from eepass.passes.read_head_chain import norms_within
from eepass.passes.report import PassError
from eepass.plan import KvForm, Piece

aten = torch.ops.aten
SLOT = 1


def read_kv_fill(fill: Piece) -> KvForm:
    """``fill``, one of a split decoder's ``kv_fills``, as data; raises ``PassError``."""
    graph = fill.graph.graph
    role = dict(zip(graph.find_nodes(op="placeholder"), fill.inputs, strict=True))
    normed = norms_within(fill)
    writes: dict[str, Node] = {}
    for node in graph.find_nodes(op="call_function", target=aten.index_copy_.default):
        writes[role[node.args[0]].kind] = node
    if writes.keys() != {"keys", "values"}:
        raise PassError("keys and values are not written by one index_copy_ each")
    key, value = (_projection(writes[kind], normed) for kind in ("keys", "values"))
    if key.args[0] is not value.args[0]:
        raise PassError("keys and values are not made of the same normed state")
    norm, norm_weight, norm_bias, offset = normed[_node(key.args[0])]

    cache = _node(writes["keys"].args[0]).meta["val"]
    beyond = ancestors([writes["keys"]]) - ancestors([key])
    parameters = [n for n in beyond if n in role and role[n].kind == "parameter"]
    own = {n for n in key.all_input_nodes}
    head_norms = [role[n].name for n in parameters if n not in own]
    sides = [n for n in role if n in beyond and role[n].kind == "side"]
    if len(head_norms) > 1 or len(sides) not in (0, 2):
        raise PassError("keys are more than projected, normed and turned")
    rotary = sides[0].meta["val"].shape[-1] if sides else 0

    def named(linear: Node, place: int) -> str:
        return role[_node(linear.args[place])].name if len(linear.args) > place else ""

    # which of the two is the cosine only the test can tell
    for cos, sin in ((0, 1), (1, 0)) if sides else ((0, 0),):
        form = KvForm(
            norm.norm, norm.eps, offset, norm_weight, norm_bias,
            named(key, 1), named(key, 2), named(value, 1), named(value, 2),
            head_norms[0] if head_norms else "", role[sides[cos]].name if sides else "",
            role[sides[sin]].name if sides else "", rotary, cache.shape[1], cache.shape[-1],
        )  # fmt: skip
        if _writes_the_same(fill, form):
            return form
    raise PassError("keys and values are not what norm, projection and rotary values make")


def _node(value: Any) -> Node:
    assert isinstance(value, Node)
    return value


def _projection(write: Node, normed: Mapping[Node, Any]) -> Node:
    linears = [
        node
        for node in ancestors([write])
        if node.target is aten.linear.default and node.args[0] in normed
    ]
    if len(linears) != 1:
        raise PassError(f"{write.name} writes what {len(linears)} linear layers make, not one")
    return linears[0]


def _writes_the_same(fill: Piece, form: KvForm) -> bool:
    """Whether ``form`` writes what ``fill`` does, on random tensors in float32."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    values: list[Tensor] = []
    for node, role in zip(fill.graph.graph.find_nodes(op="placeholder"), fill.inputs, strict=True):
        shape, dtype = node.meta["val"].shape, node.meta["val"].dtype
        if role.kind == "slots":
            made = torch.full(shape, SLOT)
        elif role.kind in ("keys", "values"):
            made = torch.zeros(shape, dtype=dtype)
        else:
            scale = shape[-1] ** -0.5 if role.kind == "parameter" and len(shape) > 1 else 1.0
            made = (torch.randn(shape, generator=generator) * scale).to(dtype)
        values.append(made)
        tensors[role.kind if role.kind in ("hidden", "keys", "values") else role.name] = made
    written = {kind: tensors[kind].clone()[0] for kind in ("keys", "values")}
    fill.graph(*values)

    def each(name: str) -> list[Tensor]:
        return [tensors[name]] if name else []

    def turns(name: str) -> Tensor | None:
        return tensors[name].reshape(1, -1) if name else None

    try:
        fused_ops.fill_kv(
            tensors["hidden"][0], each(form.norm_weight), each(form.norm_bias),
            each(form.key_weight), each(form.key_bias), each(form.value_weight),
            each(form.value_bias), each(form.head_norm), [written["keys"]], [written["values"]],
            turns(form.cos), turns(form.sin), torch.tensor([SLOT]), form.norm, form.eps,
            form.weight_offset,
        )  # fmt: skip
    except RuntimeError:
        # shapes that do not fit together
        return False
    allowed = 1e-4 if tensors["hidden"].dtype == torch.float32 else 5e-2
    return all(
        torch.allclose(made, tensors[kind][0], atol=allowed * float(made.abs().max()), rtol=0)
        for kind, made in written.items()
    )
