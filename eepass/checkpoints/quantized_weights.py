"""Quantised linear layers as modules of one packed tensor, the same for every format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eepass.ops.packed import INT8, ROW, UNROUNDED
from eepass.ops.packing import GROUP, KINDS, OUTPUTS, form_number, inputs_of

# values of a weight that are unpacked at a time
UNPACKED_AT_ONCE = 1 << 21
# how rows are rounded before they are multiplied with quantised weights
ACTIVATIONS = {"int8": INT8, "bf16": UNROUNDED}


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight [outputs, K] as ``eepass.ops.packing`` defines it; ``dynamic``: its rows of x are
    rounded with one scale each, as its format asks for."""

    packed: Tensor
    form: int
    outputs: int
    dynamic: bool = False

    def values(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """Its values [outputs, K], or those of some rows."""
        if rows is not None:
            chosen: Tensor = torch.ops.eepass.unpack(self.packed, self.form, self.outputs, rows)
            return chosen.to(dtype)
        inputs = inputs_of(self.form, self.packed.shape[1])
        values = self.packed.new_empty(self.outputs, inputs, dtype=dtype)
        # not whole in float32, which is twice what is asked for
        blocks = max(1, UNPACKED_AT_ONCE // (OUTPUTS * inputs))
        for packed, part in zip(
            self.packed.split(blocks), values.split(blocks * OUTPUTS), strict=True
        ):
            part.copy_(torch.ops.eepass.unpack(packed, self.form, len(part), None))
        return values


def grouped(
    codes: Tensor, scales: Tensor, mins: Tensor, bits: int, dynamic: bool = False
) -> QuantizedWeight:
    """A weight of codes uint8 [N, K] (of 4 or 8 ``bits``), scales and mins float32 [N, G]: its
    value is code * scale + min. Raises ``ValueError`` for groups that no kernel takes."""
    inputs, groups = codes.shape[1], scales.shape[1]
    size = 0 if groups == 1 else inputs // groups
    if inputs % GROUP or size % GROUP or (size and size * groups != inputs):
        raise ValueError(
            f"{inputs} inputs in {groups} groups: a group is of {GROUP}, 64, ... inputs"
        )
    form = form_number("u4" if bits == 4 else "u8", size)
    numbers = (part.float().contiguous() for part in (scales, mins))
    packed = torch.ops.eepass.pack_groups(codes.contiguous(), *numbers, form)
    return QuantizedWeight(packed, form, len(codes), dynamic)


class QuantizedLinear(torch.nn.Module):
    """A linear layer whose weight is quantised: ``eepass::packed_linear``.

    ``tied``: it has the weight of the input embedding, which is not quantised: only rows of it are
    read. ``activations``: how rows of its input are rounded (``eepass.ops.packed``).
    """

    packed: Tensor

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: torch.nn.Parameter | None,
        tied: bool = False,
        activations: int = INT8,
    ) -> None:
        super().__init__()
        self.register_buffer("packed", weight.packed)
        self.register_parameter("bias", bias)
        self.form, self.tied = weight.form, tied
        self.activations = ROW if weight.dynamic else activations
        self.out_features = weight.outputs
        self.in_features = inputs_of(weight.form, weight.packed.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.eepass.packed_linear(
            x, self.packed, self.form, self.out_features, self.bias, self.activations
        )
        return y

    @property
    def quantized(self) -> QuantizedWeight:
        dynamic = self.activations == ROW
        return QuantizedWeight(self.packed, self.form, self.out_features, dynamic)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.format}"

    @property
    def format(self) -> str:
        """What its weight is, for people: "Q4_K", "int4, 128 a scale"."""
        kind, group = KINDS[self.form % 256], self.form // 256
        name = kind.upper()
        if kind in ("u4", "u8"):
            name = f"int{kind[1:]}, {group or self.in_features} a scale"
        return name + {ROW: ", dynamic", UNROUNDED: ", inputs not rounded"}.get(
            self.activations, ""
        )


def replace_linears(
    model: Any, weights: Mapping[str, QuantizedWeight], activations: int = INT8
) -> None:
    """Put quantised layers in place of the linear ones named in ``weights``."""
    embedding = model.get_input_embeddings().weight
    for name, weight in weights.items():
        owner, _, attribute = name.rpartition(".")
        linear = model.get_submodule(name)
        tied = linear.weight is embedding
        made = QuantizedLinear(weight, linear.bias, tied, activations)
        device = embedding.device if linear.weight.is_meta else linear.weight.device
        setattr(model.get_submodule(owner), attribute, made.to(device).eval())
        if tied:
            # the head has no weight any more that could be tied
            model.config.get_text_config(decoder=True).tie_word_embeddings = False


def quantized_layers(model: Any) -> Iterator[tuple[str, QuantizedLinear]]:
    """The quantised layers of ``model`` by name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module


def quantization_of(model: Any) -> str:
    """How many layers of ``model`` are quantised, by format; "" if none."""
    formats = (layer.format for _, layer in quantized_layers(model))
    return "; ".join(f"{count} layers {name}" for name, count in sorted(Counter(formats).items()))


def weights_to_read(model: Any) -> list[Tensor]:
    """Parameters and quantised weights in the order of the modules, in which a pass reads them."""
    found: list[Tensor] = []
    for module in model.modules():
        found += [p for p in module._parameters.values() if p is not None]
        if isinstance(module, QuantizedLinear):
            found.append(module.packed)
    return found
