"""The draft head's matrices on disk: a byte a weight, which is finer than they are run in.

A matrix [N, K] that ``rounded`` made is stored as codes int8 [N, K] and, for each ``INPUTS``
inputs, a scale float16. Any other, as of heads trained elsewhere, is stored as it is: what is
written is read back bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from eepass.errors import InputError

INPUTS = 32
# its inverse frequencies of rotary positions, and what is added under the roots of its norms:
# float32 wherever they are
ROTARY, EPSILON = "eagle.rotary", "eagle.epsilon"
DIGITS = (ROTARY, EPSILON)
CODES, SCALES = ".codes", ".scales"
# the largest value of a group was rounded twice: its scale is one of so many around the quotient
NEAR = 6
# groups that are tried before all are
SOME = 256


def rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with the matrices of the draft head rounded to a byte a weight, in bfloat16."""
    made = dict(tensors)
    for name, tensor in tensors.items():
        if _is_matrix(name, tensor):
            parts = tensor.float().unflatten(1, (-1, INPUTS))
            # rounded first: codes are of the scale that is stored
            scale = (parts.abs().amax(-1) / 127).clamp_min(1e-7).to(torch.float16)
            made[name] = _values(_codes(parts, scale), scale).flatten(1)
    return made


def as_codes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with those matrices of the draft head as codes and scales that are no more than
    that."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = _found_codes(tensor) if _is_matrix(name, tensor) else None
        if found is None:
            made[name] = tensor
        else:
            made[name + CODES], made[name + SCALES] = found
    return made


def from_codes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ``as_codes`` was given; raises ``InputError`` for codes without scales that fit."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("eagle.") and name.endswith(CODES):
            whole = name.removesuffix(CODES)
            scale = tensors.get(whole + SCALES)
            shape = (tensor.shape[0], tensor.shape[-1] // INPUTS)
            if tensor.ndim != 2 or scale is None or scale.shape != shape:
                raise InputError(f"{whole}: codes without scales that fit")
            made[whole] = _values(tensor.unflatten(1, (-1, INPUTS)), scale).flatten(1)
        elif not (name.startswith("eagle.") and name.endswith(SCALES)):
            made[name] = tensor
    return made


def in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """``tensors`` with those of the draft head in ``dtype``, but where digits count."""
    made = dict(tensors)
    for name, tensor in tensors.items():
        if name.startswith("eagle.") and tensor.is_floating_point() and name not in DIGITS:
            made[name] = tensor.to(dtype)
    return made


def _is_matrix(name: str, tensor: Tensor) -> bool:
    return name.startswith("eagle.") and tensor.ndim == 2 and not tensor.shape[1] % INPUTS


def _codes(parts: Tensor, scale: Tensor) -> Tensor:
    return (parts / scale.float()[..., None]).round().clamp(-127, 127).to(torch.int8)


def _values(codes: Tensor, scale: Tensor) -> Tensor:
    return (codes.float() * scale.float()[..., None]).to(torch.bfloat16)


def _found_codes(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Codes and scales that stand for exactly ``tensor`` [N, K], if there are."""
    groups = tensor.reshape(-1, INPUTS)
    # a few groups say it of most that have none
    if tensor.dtype != torch.bfloat16 or _found(groups[:SOME]) is None:
        return None
    found = _found(groups)
    if found is None:
        return None
    codes, scales = found
    return codes.view(tensor.shape), scales.view(len(tensor), -1)


def _found(groups: Tensor) -> tuple[Tensor, Tensor] | None:
    """As ``_found_codes``, of groups [G, INPUTS] with a scale each."""
    quotient = (groups.float().abs().amax(-1) / 127).clamp_min(1e-7).to(torch.float16)
    codes, scales = torch.zeros(groups.shape, dtype=torch.int8), quotient.clone()
    left = torch.arange(len(groups))
    for step in sorted(range(-NEAR, NEAR + 1), key=abs):
        # the float16 so many steps further: bits of positive ones are in their order
        scale = (quotient[left].view(torch.int16) + step).clamp_min(1).view(torch.float16)
        tried = _codes(groups[left].float(), scale)
        exact = (_values(tried, scale) == groups[left]).all(-1)
        codes[left[exact]], scales[left[exact]] = tried[exact], scale[exact]
        left = left[~exact]
        if not len(left):
            return codes, scales
    return None
