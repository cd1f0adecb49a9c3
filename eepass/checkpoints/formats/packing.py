"""What the formats have in common: codes packed into int32 words, groups, orders of columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eepass.errors import InputError

GROUP = 32


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes uint8 [R, count] of 4 or 8 bits from int32 words [R, W], the lowest bits first."""
    data = words.contiguous().view(torch.uint8)
    codes = torch.stack([data & 15, data >> 4], -1).flatten(-2) if bits == 4 else data
    return codes[:, :count]


def words_for(count: int, bits: int) -> int:
    """How many int32 words hold ``count`` codes."""
    return -(-count * bits // 32)


def groups_of(layer: str, size: int, inputs: int) -> int:
    """How many groups of ``size`` columns (-1: all) a row of ``inputs`` has.

    Raises ``InputError`` where no kernel reads such groups.
    """
    if size == -1 or size >= inputs:
        return 1
    if size < GROUP or size % GROUP or inputs % size:
        raise InputError(
            f"{layer}: groups of {size} of its {inputs} inputs; eepass reads groups of a multiple "
            f"of {GROUP} that divides them, and whole rows"
        )
    return inputs // size


def refuse_reordered(name: str, groups_of_columns: Tensor, groups: int) -> None:
    """Raise ``InputError`` if the columns of a group do not lie side by side (act-order)."""
    inputs = len(groups_of_columns)
    in_order = torch.arange(inputs) // (inputs // groups)
    # compressed-tensors leaves -1 where it has not reordered anything
    if not torch.equal(groups_of_columns.long(), in_order) and -1 not in groups_of_columns:
        raise InputError(
            f"{name}: its columns are grouped in order of activation (desc_act, act-order), and "
            "the kernels read groups side by side; quantise it without, or with static groups"
        )


def whole_number(config: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    """The number that ``config`` has under the first of ``keys`` it has; else ``InputError``."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if value is not None:
            raise InputError(f"quantization_config: {key} is {value!r}, not a whole number")
    if default is None:
        raise InputError(f"quantization_config: {keys[0]} is missing")
    return default
