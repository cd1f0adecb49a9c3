"""The draft's features of the tokens in the KV cache, by slot."""

from __future__ import annotations

import torch
from torch import Tensor

from eepass.runtime.cache.kv_cache import copy_rows


class FeatureCache:
    """Features [F * H] of the tokens in ``slots`` slots, as far as they were written."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        # their width is known when the first come
        self._rows = torch.zeros(0)

    def write(self, slot: int, features: Tensor) -> None:
        """Keep ``features`` [n, F * H] of the tokens from ``slot`` on."""
        if not len(self._rows):
            self._rows = features.new_zeros(self.slots, features.shape[1])
        self._rows[slot : slot + len(features)] = features

    def read(self, slot: int, count: int) -> Tensor:
        """A copy [count, F * H]."""
        return self._rows[slot : slot + count].clone()

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy those of ``count`` slots from ``source`` on to ``target`` onwards."""
        if len(self._rows):
            copy_rows(self._rows, 0, source, target, count)
