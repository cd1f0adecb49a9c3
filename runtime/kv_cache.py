"""The static KV cache: one slot per token, every layer its own length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KvCache:
    """Keys and values per layer, and how many slots of each hold a token.

    Lengths never grow with depth (a staircase): a token that left early is missing in the deeper
    layers until it is caught up. Slots past a length hold finite rubbish, masked until overwritten.
    """

    def __init__(self, like: Sequence[tuple[Tensor, Tensor]]) -> None:
        # zeros, never empty: a NaN beyond the prefix would poison attention through its mask
        self.keys = [torch.zeros(k.shape, dtype=k.dtype, device=k.device) for k, _ in like]
        self.values = [torch.zeros(v.shape, dtype=v.dtype, device=v.device) for _, v in like]
        self.lengths = [0] * len(like)

    @property
    def slots(self) -> int:
        return int(self.keys[0].shape[2])

    @property
    def complete(self) -> bool:
        """Whether every layer has seen every token."""
        return self.lengths[0] == self.lengths[-1]
