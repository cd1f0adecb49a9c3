"""The draft head's matrices on disk: a byte a weight, which is finer than they are run in.

A matrix [N, K] is stored as codes int8 [N, K] and, for each ``INPUTS`` inputs, a scale float16.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from eepass.errors import InputError

INPUTS = 32
# its inverse frequencies of rotary positions: float32 wherever they are
ROTARY = "eagle.rotary"
CODES, SCALES = ".codes", ".scales"


def as_codes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with the matrices of the draft head as codes and scales."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith("eagle.") or tensor.ndim < 2 or tensor.shape[1] % INPUTS:
            made[name] = tensor
            continue
        parts = tensor.float().unflatten(1, (-1, INPUTS))
        # rounded first: codes are of the scale that is stored
        scale = (parts.abs().amax(-1) / 127).clamp_min(1e-7).to(torch.float16)
        codes = (parts / scale.float()[..., None]).round().clamp(-127, 127)
        made[name + CODES], made[name + SCALES] = codes.flatten(1).to(torch.int8), scale
    return made


def from_codes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ``as_codes`` was given, rounded, in bfloat16; raises ``InputError`` for codes without
    scales that fit."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("eagle.") and name.endswith(CODES):
            whole = name.removesuffix(CODES)
            scale = tensors.get(whole + SCALES)
            shape = (tensor.shape[0], tensor.shape[-1] // INPUTS)
            if tensor.ndim != 2 or scale is None or scale.shape != shape:
                raise InputError(f"{whole}: codes without scales that fit")
            parts = tensor.float().unflatten(1, (-1, INPUTS)) * scale.float()[..., None]
            made[whole] = parts.flatten(1).to(torch.bfloat16)
        elif not (name.startswith("eagle.") and name.endswith(SCALES)):
            made[name] = tensor
    return made
