"""AWQ as AutoAWQ writes it for its GEMM kernels.

``qweight`` [K, N/8] and ``qzeros`` [G, N/8] hold 8 codes of 4 bits in an int32: from the lowest
bits those of the outputs 0, 2, 4, 6, 1, 3, 5, 7; ``scales`` float16 [G, N]. The weight is
(code - zero) * scale. The scaling of inputs that AWQ searches for is in the weights already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from eepass.checkpoints.formats.packing import groups_of, unpack, whole_number
from eepass.checkpoints.formats.stored import StoredTensors
from eepass.checkpoints.quantized_weights import QuantizedWeight, grouped
from eepass.errors import InputError

BITS, CODES = 4, 8
# where in a word each output's code is
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True, slots=True)
class Awq:
    """``group``: how many inputs share a scale, -1 for all."""

    group: int
    marks: ClassVar = ("qweight",)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Awq:
        """Raises ``InputError`` for bits and layouts that are not read."""
        bits = whole_number(config, "bits", "w_bit", default=BITS)
        layout = str(config.get("version") or config.get("format") or "gemm").lower()
        if bits != BITS:
            raise InputError(f"AWQ of {bits} bits; eepass reads 4")
        if layout != "gemm":
            raise InputError(f"AWQ laid out for {layout}; eepass reads version gemm")
        return cls(whole_number(config, "group_size", "q_group_size", default=128))

    def read(self, stored: StoredTensors, layer: str, outputs: int, inputs: int) -> QuantizedWeight:
        """The weight [outputs, inputs] of a linear layer."""
        groups = groups_of(layer, self.group, inputs)
        if outputs % CODES:
            raise InputError(f"{layer}: {outputs} outputs, and AWQ packs {CODES} together")
        packed = outputs // CODES
        codes = _by_output(stored.take(f"{layer}.qweight", (inputs, packed), torch.int32))
        zeros = _by_output(stored.take(f"{layer}.qzeros", (groups, packed), torch.int32))
        scales = stored.take_scales(f"{layer}.scales", (groups, outputs)).t()
        return grouped(codes, scales, -(zeros * scales), BITS)


def _by_output(words: Tensor) -> Tensor:
    """Codes [N, R] from words [R, N/8]."""
    codes = unpack(words, BITS, CODES * words.shape[1])
    return codes.unflatten(1, (-1, CODES))[..., PLACES].flatten(1).t().contiguous()
