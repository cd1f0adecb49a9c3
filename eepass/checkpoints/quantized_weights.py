"""Quantised linear layers as modules of plain tensors, the same for every format they come in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eepass.ops.quantized import PAIRED, pack_int4

PARTS = ("codes", "scales", "mins")


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight [N, K] as ``eepass.ops.quantized`` defines it."""

    codes: Tensor
    scales: Tensor
    mins: Tensor | None = None
    dynamic: bool = False

    def values(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """Its values [N, K], or those of some rows."""
        chosen = self if rows is None else self.map(lambda part: part[rows])
        values: Tensor = torch.ops.eepass.dequantize(
            chosen.codes, chosen.scales, chosen.mins, dtype
        )
        return values

    def map(self, change: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        """The weight with each of its tensors changed."""
        changed: dict[str, Any] = {name: change(part) for name, part in self.parts.items()}
        return replace(self, **changed)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors it is made of, by name."""
        named = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in named.items() if part is not None}


def four_bit(codes: Tensor, scales: Tensor, mins: Tensor | None = None) -> QuantizedWeight:
    """A weight of codes 0 to 15 [N, K]: two a byte where K divides, otherwise one."""
    if codes.shape[1] % PAIRED == 0:
        return QuantizedWeight(pack_int4(codes), scales, mins)
    codes = codes.to(torch.int8)
    return QuantizedWeight(codes if mins is not None else codes - 8, scales, mins)


def grouped(
    codes: Tensor, scales: Tensor, mins: Tensor, bits: int, dynamic: bool = False
) -> QuantizedWeight:
    """A weight of codes uint8 [N, K] (of 4 or 8 ``bits``), scales and mins float32 [N, G]: its
    value is code * scale + min."""
    if bits == 4:
        return four_bit(codes, scales, None if torch.equal(mins, -8 * scales) else mins)
    signed, mins = (codes ^ 128).view(torch.int8), mins + 128 * scales
    return QuantizedWeight(signed, scales, mins if mins.any() else None, dynamic)


class QuantizedLinear(torch.nn.Module):
    """A linear layer whose weight is quantised: ``eepass::quantized_linear``.

    ``tied``: it has the weight of the input embedding, which is not quantised: only rows of it are
    read.
    """

    scales: Tensor
    codes: Tensor
    mins: Tensor | None

    def __init__(
        self, weight: QuantizedWeight, bias: torch.nn.Parameter | None, tied: bool = False
    ) -> None:
        super().__init__()
        for name in PARTS:
            self.register_buffer(name, getattr(weight, name))
        self.register_parameter("bias", bias)
        self.dynamic, self.tied = weight.dynamic, tied
        self.out_features = weight.codes.shape[0]
        halves = 2 if weight.codes.dtype == torch.uint8 else 1
        self.in_features = weight.codes.shape[1] * halves

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.eepass.quantized_linear(
            x, self.codes, self.scales, self.mins, self.bias, self.dynamic
        )
        return y

    @property
    def quantized(self) -> QuantizedWeight:
        return QuantizedWeight(self.codes, self.scales, self.mins, self.dynamic)

    def extra_repr(self) -> str:
        kind = "int4" if self.codes.dtype == torch.uint8 else "int8"
        return (
            f"{self.in_features} -> {self.out_features}, {kind}, "
            f"{self.in_features // self.scales.shape[1]} a scale"
            + (", dynamic" if self.dynamic else "")
        )


def replace_linears(model: Any, weights: Mapping[str, QuantizedWeight]) -> None:
    """Put quantised layers in place of the linear ones named in ``weights``."""
    embedding = model.get_input_embeddings().weight
    for name, weight in weights.items():
        owner, _, attribute = name.rpartition(".")
        linear = model.get_submodule(name)
        tied = linear.weight is embedding
        made = QuantizedLinear(weight.map(Tensor.contiguous), linear.bias, tied)
        setattr(model.get_submodule(owner), attribute, made.to(linear.weight.device).eval())
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
    formats = (layer.extra_repr().partition(", ")[2] for _, layer in quantized_layers(model))
    return "; ".join(f"{count} layers {name}" for name, count in sorted(Counter(formats).items()))


def weights_to_read(model: Any) -> list[Tensor]:
    """Parameters and quantised weights in the order of the modules, in which a pass reads them."""
    found: list[Tensor] = []
    for module in model.modules():
        found += [p for p in module._parameters.values() if p is not None]
        if isinstance(module, QuantizedLinear):
            found += [part for part in module._buffers.values() if part is not None]
    return found
