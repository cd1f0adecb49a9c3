"""GPTQ as AutoGPTQ and GPTQModel write it.

``qweight`` [K·bits/32, N] holds codes along the inputs, ``qzeros`` [G, N·bits/32] along the
outputs, in int32 words from the lowest bits; ``scales`` float16 [G, N]; ``g_idx`` [K] says which
group an input belongs to. The weight is (code - zero) * scale. In the checkpoint format ``gptq`` 1
was subtracted from all zeros before (as whole words, so that a zero of 0 borrows from its
neighbour); in ``gptq_v2`` they are as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from eepass.checkpoints.formats.packing import (
    groups_of,
    refuse_reordered,
    unpack,
    whole_number,
    words_for,
)
from eepass.checkpoints.formats.stored import StoredTensors
from eepass.checkpoints.quantized_weights import QuantizedWeight, grouped
from eepass.errors import InputError

# 1 in each code of a word
ONES = {4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True, slots=True)
class Gptq:
    """``group``: how many inputs share a scale, -1 for all. ``offset``: zeros are stored less 1.
    ``others``: other bits and groups for layers whose names match a pattern (GPTQModel's
    ``dynamic``)."""

    bits: int
    group: int
    offset: bool
    others: Mapping[str, Mapping[str, Any]]
    marks: ClassVar = ("qweight",)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Gptq:
        """Raises ``InputError`` for bits and layouts that are not read."""
        layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
        if layout not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
            raise InputError(
                f"GPTQ in the format {'marlin' if config.get('is_marlin_format') else layout}; "
                "eepass reads gptq and gptq_v2"
            )
        others = config.get("dynamic") or {}
        if not isinstance(others, Mapping) or not all(isinstance(x, dict) for x in others.values()):
            raise InputError("quantization_config: dynamic is no table of patterns")
        group = whole_number(config, "group_size", default=128)
        return cls(_known(whole_number(config, "bits")), group, layout == "gptq", others)

    def read(self, stored: StoredTensors, layer: str, outputs: int, inputs: int) -> QuantizedWeight:
        """The weight [outputs, inputs] of a linear layer."""
        one = self._for(layer)
        bits, groups = one.bits, groups_of(layer, one.group, inputs)
        shape = (words_for(inputs, bits), outputs)
        words = stored.take(f"{layer}.qweight", shape, torch.int32)
        codes = unpack(words.t(), bits, inputs)
        shape = (groups, words_for(outputs, bits))
        words = stored.take(f"{layer}.qzeros", shape, torch.int32)
        zeros = unpack(one._without_offset(words), bits, outputs).t()
        scales = stored.take_scales(f"{layer}.scales", (groups, outputs)).t()
        if (name := f"{layer}.g_idx") in stored:
            order = stored.take(name, (inputs,), torch.int32, torch.int64)
            refuse_reordered(name, order, groups)
        return grouped(codes, scales, -(zeros * scales), bits)

    def _for(self, layer: str) -> Gptq:
        """The settings of one layer."""
        for pattern, values in self.others.items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), layer):
                bits = whole_number(values, "bits", default=self.bits)
                group = whole_number(values, "group_size", default=self.group)
                return replace(self, bits=_known(bits), group=group)
        return self

    def _without_offset(self, words: Tensor) -> Tensor:
        if not self.offset:
            return words
        # in 64 bits, of which the lower half is kept: the addition carries as the subtraction did
        return (words.long() + ONES[self.bits]).to(torch.int32)


def _known(bits: int) -> int:
    if bits not in ONES:
        raise InputError(f"GPTQ of {bits} bits; eepass reads 4 and 8")
    return bits
