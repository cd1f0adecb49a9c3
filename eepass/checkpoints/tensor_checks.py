"""Tensors as files bring them: their shapes, by letters that stand for sizes, and lists of ids."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from eepass.errors import InputError


def match(
    tensors: Mapping[str, Tensor], prefix: str, shapes: Mapping[str, str], sizes: dict[str, int]
) -> None:
    """Refuse tensors that do not have ``shapes``; letters that are new are put into ``sizes``."""
    for name, letters in shapes.items():
        tensor = tensors.get(prefix + name)
        if tensor is None:
            raise InputError(f"{prefix}{name} is missing")
        if tensor.ndim == len(letters):
            for letter, size in zip(letters, tensor.shape, strict=True):
                sizes.setdefault(letter, size)
        wanted = [sizes.get(letter, 0) for letter in letters]
        if not tensor.is_floating_point() or list(tensor.shape) != wanted or 0 in wanted:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{prefix}{name} is {kind} {list(tensor.shape)}, not {wanted}")


def ids_of(tensors: Mapping[str, Tensor], name: str, end: int) -> Tensor:
    """Whole numbers from 0 to ``end``, none of them twice."""
    ids = tensors.get(name)
    if ids is None:
        raise InputError(f"{name} is missing")
    if ids.ndim != 1 or ids.dtype not in (torch.int32, torch.int64) or not len(ids):
        raise InputError(f"{name} is {ids.dtype} {list(ids.shape)}, not a list of ids")
    if ids.min() < 0 or ids.max() >= end or len(ids.unique()) < len(ids):
        raise InputError(f"{name} holds ids outside 0 to {end - 1}, or one twice")
    return ids
