"""Read how a layer computes its keys and values, as data for ``eepass::fill_kv``.

    before   x = norm(hidden); k = rotate(norm(linear(x))); v = linear(x); two writes to the cache
    after    KvForm(norm="rms", key_weight="...", rotary=128, ...)

One linear layer may compute queries, keys and values: which of its outputs are the keys' channels
is found by sending their indices through the views in between. The rest is guessed from roles and
shapes, and each guess is tested: on random tensors it must write what the graph writes, else the
layer is refused. So a layer that scales its keys is not taken for one that does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import permutations, product
from operator import getitem
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from eepass.errors import PassError
from eepass.kernel_forms import Channels, KvForm
from eepass.ops import fused
from eepass.passes.exits.read_head_chain import SAME, norms_within
from eepass.passes.graph_walk import ancestors
from eepass.segments import Input, Segment

aten = torch.ops.aten
SLOT = 1
Form = Literal["none", "rms", "layer"]
# operators that move values and change none
VIEWS = SAME | {
    getitem, aten.transpose.int, aten.permute.default, aten.slice.Tensor, aten.select.int,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.flatten.using_ints, aten.unflatten.int, aten.narrow.default, aten.expand.default,
    aten.broadcast_to.default, aten.index.Tensor, aten.lift_fresh_copy.default,
    aten._unsafe_view.default, aten.t.default, aten.numpy_T.default, aten.movedim.int,
}  # fmt: skip
TRANSPOSES = {aten.t.default, aten.numpy_T.default}
# channel numbers keep their dtype through these
CASTS = {aten.to.dtype, aten._to_copy.default, aten.type_as.default}


@dataclass(frozen=True, slots=True)
class _Linear:
    """A linear layer of the normed hidden state, whichever operator computes it."""

    node: Node
    state: Node
    weight: Node
    bias: Node | None
    transposed: bool


def read_kv_fill(fill: Segment, tensors: Mapping[str, Tensor]) -> KvForm:
    """``fill``, one of a split decoder's ``kv_fills`` for one row, as data; raises ``PassError``.

    ``tensors``: the decoder's; integer ones, which index channels, are read.
    """
    role = fill.roles
    normed = norms_within(fill)
    writes: dict[str, Any] = {}
    for node in fill.graph.graph.find_nodes(op="call_function", target=aten.index_copy_.default):
        writes[role[node.args[0]].kind] = node
    if writes.keys() != {"keys", "values"}:
        raise PassError("keys and values are not written by one index_copy_ each")
    key, value = (_projection(writes[kind], normed, role) for kind in ("keys", "values"))
    if normed[key.state] != normed[value.state] or key.transposed != value.transposed:
        raise PassError("keys and values are not computed from the same normed hidden state")
    norm = normed[key.state]
    shapes = [writes[kind].args[0].meta["val"].shape for kind in ("keys", "values")]
    if shapes[0] != shapes[1]:
        raise PassError("keys and values differ in shape")
    groups, channels = shapes[0][1], shapes[0][-1]
    indices = {
        node: tensors[r.name]
        for node, r in role.items()
        if r.kind == "parameter" and not node.meta["val"].is_floating_point()
    }
    key_channels, value_channels = (
        _channels(linear, writes[kind], groups, channels, indices)
        for linear, kind in ((key, "keys"), (value, "values"))
    )

    beyond = ancestors([writes["keys"]]) - ancestors([key.node])
    parameters = [n for n in beyond if n in role and role[n].kind == "parameter"]
    heads = sorted(role[n].name for n in parameters if n not in indices)
    sides = [n for n in role if n in beyond and role[n].kind == "side"]
    if len(heads) > 2 or len(sides) not in (0, 2):
        raise PassError("keys are more than projected, normed and rotated")
    rotary = sides[0].meta["val"].shape[-1] if sides else 0

    def named(node: Node | None) -> str:
        return "" if node is None else role[node].name

    trials = [_Trial(fill, key.transposed, indices, scale) for scale in (1.0, 1e-3)]
    # only the test can tell which of the two is the cosine, which channels rotate together, and
    # whether the mean is subtracted
    rotations = product(permutations(named(n) for n in sides), (False, True) if sides else (False,))
    forms: tuple[Form, ...] = ("rms", "layer") if heads else ("none", "rms", "layer")
    for ((cos, sin), interleaved), head_form, (head_norm, head_bias) in product(
        rotations if sides else [(("", ""), False)], forms, permutations([*heads, "", ""][:2])
    ):
        form = KvForm(
            norm.norm, norm.eps, norm.weight.offset, norm.weight.name, norm.bias,
            named(key.weight), named(key.bias), named(value.weight), named(value.bias), head_norm,
            head_bias, head_form, cos, sin, rotary, interleaved, groups, channels, key_channels,
            value_channels, key.transposed,
        )  # fmt: skip
        if all(trial.writes_the_same(form) for trial in trials):
            return form
    raise PassError("keys and values are not what norm, projection and rotary embedding give")


def _projection(write: Node, normed: Mapping[Node, Any], role: Mapping[Node, Input]) -> _Linear:
    found = [linear for node in ancestors([write]) if (linear := _linear(node, normed)) is not None]
    if len(found) != 1:
        raise PassError(f"{write.name} writes what {len(found)} linear layers compute, not one")
    for operand in (found[0].weight, found[0].bias):
        if operand is not None and operand not in role:
            raise PassError(f"{found[0].node.name}: its weights are computed by {operand.name}")
    return found[0]


def _linear(node: Node, normed: Mapping[Node, Any]) -> _Linear | None:
    args: tuple[Any, ...] = node.args
    linear = None
    if node.target is aten.linear.default:
        linear = _Linear(node, args[0], args[1], args[2] if len(args) > 2 else None, False)
    elif node.target is aten.addmm.default and not node.kwargs:
        linear = _Linear(node, args[1], args[2], args[0], True)
    elif node.target in (aten.mm.default, aten.matmul.default):
        flipped = args[1].target in TRANSPOSES
        weight = args[1].args[0] if flipped else args[1]
        linear = _Linear(node, args[0], weight, None, not flipped)
        sums: list[Any] = [user for user in node.users if user.target is aten.add.Tensor]
        if len(sums) == len(node.users) == 1 and sums[0].args[0] is node:
            # the bias is added on its own
            linear = replace(linear, node=sums[0], bias=sums[0].args[1])
    return linear if linear is not None and linear.state in normed else None


def _channels(
    linear: _Linear, write: Node, groups: int, channels: int, indices: Mapping[Node, Tensor]
) -> Channels:
    """Which outputs of ``linear`` are written, head by head."""
    outputs = linear.node.meta["val"]
    if outputs.numel() != outputs.shape[-1]:
        raise PassError("keys and values are read from a trace of one row")
    own = torch.arange(outputs.numel()).view(outputs.shape)
    numbers: dict[Node, Any] = {**indices, linear.node: own}
    found = own if own.numel() == groups * channels else None
    towards = ancestors([write])
    for node in linear.node.graph.nodes:
        source = node.args[0] if node.args else None
        if node not in towards or node.target not in VIEWS or source not in numbers:
            continue
        if node.target in CASTS:
            numbers[node] = numbers[source]
        else:
            args, kwargs = map_arg((node.args, node.kwargs), numbers.__getitem__)
            numbers[node] = node.target(*args, **kwargs)
        made = numbers[node]
        if linear.node in ancestors([node]) and isinstance(made, Tensor):
            found = made if made.numel() == groups * channels else found
    if found is None:
        raise PassError(f"{write.name}: which outputs of the projection it writes cannot be read")
    found = found.reshape(groups, channels)
    first = int(found[0, 0])
    head = int(found[1, 0]) - first if groups > 1 else channels
    step = int(found[0, 1]) - first if channels > 1 else 1
    expected = first + head * torch.arange(groups)[:, None] + step * torch.arange(channels)
    if not torch.equal(found, expected):
        raise PassError(f"{write.name}: the outputs it writes are not evenly spaced")
    return Channels(first, head, step)


class _Trial:
    """What a layer writes for random tensors. ``scale`` is that of the hidden state and the
    projections; a small one tells apart the eps that are added before a root is taken."""

    def __init__(
        self, fill: Segment, transposed: bool, indices: Mapping[Node, Tensor], scale: float
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tensors: dict[str, Tensor] = {}
        values: dict[Input, Tensor] = {}
        for node, role in fill.roles.items():
            shape, dtype = node.meta["val"].shape, node.meta["val"].dtype
            if node in indices:
                made = indices[node]
            elif role.kind == "slots":
                made = torch.full(shape, SLOT)
            elif role.kind in ("keys", "values"):
                made = torch.zeros(shape, dtype=dtype)
            else:
                size = scale if role.kind == "hidden" else 1.0
                if role.kind == "parameter" and len(shape) > 1:
                    size = scale * shape[0 if transposed else -1] ** -0.5
                made = (torch.randn(shape, generator=generator) * size).to(dtype)
            values[role] = made
            named = role.kind in ("hidden", "keys", "values")
            self.tensors[role.kind if named else role.name] = made
        self.empty = {kind: self.tensors[kind].clone()[0] for kind in ("keys", "values")}
        fill.run(values.__getitem__)

    def writes_the_same(self, form: KvForm) -> bool:
        tensors = self.tensors
        written = {kind: empty.clone() for kind, empty in self.empty.items()}

        def each(name: str) -> list[Tensor]:
            return [tensors[name]] if name else []

        def rotary(name: str) -> Tensor | None:
            return tensors[name].reshape(1, -1) if name else None

        def projected(weight: str, bias: str, of: Channels) -> tuple[list[Tensor], list[Tensor]]:
            biases = [form.bias(tensors[bias], of)] if bias else []
            return [form.projection(tensors[weight], of)], biases

        try:
            fused.fill_kv(
                tensors["hidden"][0], each(form.norm_weight), each(form.norm_bias),
                *projected(form.key_weight, form.key_bias, form.key_channels),
                *projected(form.value_weight, form.value_bias, form.value_channels),
                each(form.head_norm), each(form.head_bias), [written["keys"]],
                [written["values"]], rotary(form.cos), rotary(form.sin), torch.tensor([SLOT]),
                form.norm, form.eps, form.weight_offset, form.interleaved, form.head_form,
            )  # fmt: skip
        except RuntimeError:
            # shapes that do not fit together
            return False
        allowed = 1e-4 if tensors["hidden"].dtype == torch.float32 else 5e-2
        return all(
            torch.allclose(made, tensors[kind][0], atol=allowed * float(made.abs().max()), rtol=0)
            for kind, made in written.items()
        )
