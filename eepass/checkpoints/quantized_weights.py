"""Quantised linear layers as modules of plain tensors, whatever they were read from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eepass.ops.quantized import PAIRED, pack_int4

PARTS = ("codes", "scales", "mins")


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight [N, K] as ``eepass.ops.quantized`` has it."""

    codes: Tensor
    scales: Tensor
    mins: Tensor | None = None
    dynamic: bool = False

    def values(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """Its values [N, K], or those of some rows."""
        parts = (self.codes, self.scales, self.mins)
        chosen = [part if rows is None or part is None else part[rows] for part in parts]
        made: Tensor = torch.ops.eepass.dequantize(*chosen, dtype)
        return made

    def to(self, device: torch.device) -> QuantizedWeight:
        mins = None if self.mins is None else self.mins.contiguous().to(device)
        codes, scales = (part.contiguous().to(device) for part in (self.codes, self.scales))
        return QuantizedWeight(codes, scales, mins, self.dynamic)


def four_bit(codes: Tensor, scales: Tensor, mins: Tensor | None = None) -> QuantizedWeight:
    """Codes 0 to 15 [N, K] two a byte, where K allows that, else a byte each."""
    if codes.shape[1] % PAIRED == 0:
        return QuantizedWeight(pack_int4(codes), scales, mins)
    codes = codes.to(torch.int8)
    return QuantizedWeight(codes if mins is not None else codes - 8, scales, mins)


class QuantizedLinear(torch.nn.Module):
    """A linear layer over codes: ``eepass::quantized_linear``.

    ``tied``: its values are the input embedding's, which stays as it is: only rows of it are read.
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
        made = QuantizedLinear(weight.to(linear.weight.device), linear.bias, tied)
        setattr(model.get_submodule(owner), attribute, made.eval())
        if tied:
            # else whoever ties weights would look for the head's
            model.config.get_text_config(decoder=True).tie_word_embeddings = False


def quantized_layers(model: Any) -> Iterator[tuple[str, QuantizedLinear]]:
    """The quantised layers of ``model`` by name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module


def described(model: Any) -> str:
    """How many layers of ``model`` are quantised, by form; "" if none."""
    counts: dict[str, int] = {}
    for _, layer in quantized_layers(model):
        form = layer.extra_repr().partition(", ")[2]
        counts[form] = counts.get(form, 0) + 1
    return "; ".join(f"{count} layers {form}" for form, count in sorted(counts.items()))


def weights_to_read(model: Any) -> list[Tensor]:
    """Parameters and quantised weights in the order of the modules, which is that of reading."""
    found: list[Tensor] = []
    for module in model.modules():
        found += [p for p in module._parameters.values() if p is not None]
        if isinstance(module, QuantizedLinear):
            found += [part for part in module._buffers.values() if part is not None]
    return found
