"""Additive causal masks, with sliding windows and chunks."""

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
