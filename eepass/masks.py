"""Causal masks, with sliding windows and chunks: additive, or as spans.

A row's span says which slots it attends to in three numbers: the first, the one after the last, and
a bit field of the slots from there on (bit j: slot ``end`` + j), for draft tokens in a tree.
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(
    rows: int,
    cache_length: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    start: int = 0,
) -> Tensor:
    """Additive mask [1, 1, R, C] of rows at positions from ``start`` on: 0 where a row may look.

    ``window``: how many tokens back, itself included; −n: in chunks of n tokens; None: all.
    Forbidden slots hold the dtype's lowest finite value: a row of −inf would become NaN.
    """
    positions = torch.arange(start, start + rows, device=device)
    return causal_mask_at(positions, cache_length, window, dtype)


def causal_mask_at(
    positions: Tensor, cache_length: int, window: int | None, dtype: torch.dtype
) -> Tensor:
    """``causal_mask`` for rows at ``positions`` [R], whatever they are."""
    row = positions[:, None]
    slot = torch.arange(cache_length, device=positions.device)[None]
    seen = slot <= row
    if window is not None:
        seen = seen & (slot > row - window if window > 0 else slot >= row - row % -window)
    mask = torch.zeros(seen.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def spans_at(positions: Tensor, window: int | None) -> Tensor:
    """The spans int64 [R, 3] of rows at ``positions`` [R], whatever they are: what
    ``causal_mask_at`` lets them attend to."""
    return torch.stack(
        [first_seen(positions, window), positions + 1, torch.zeros_like(positions)], 1
    )


def first_seen_at(position: int, window: int | None) -> int:
    """As ``first_seen``, for one row."""
    if window is None:
        return 0
    return max(position - window + 1, 0) if window > 0 else position - position % -window


def first_seen(positions: Tensor, window: int | None) -> Tensor:
    """The first position that rows at ``positions`` [R] attend to."""
    if window is None:
        return torch.zeros_like(positions)
    if window > 0:
        return (positions - window + 1).clamp_min(0)
    return positions - positions % -window
