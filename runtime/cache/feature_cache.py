"""The draft's features of the tokens in the KV cache, by slot."""

from __future__ import annotations

import torch

from eepass.runtime.cache.kv_cache import copy_rows
from eepass.runtime.drafting.features import Features


class FeatureCache:
    """Features [F * H] of the tokens in ``slots`` slots, as far as they were written."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        # their width is known when the first come
        self._rows = torch.zeros(0)
        self._normed = [True] * slots

    def write(self, slot: int, features: Features) -> None:
        """Keep ``features`` of the tokens from ``slot`` on."""
        rows, end = features.rows, slot + len(features)
        if not len(self._rows):
            self._rows = rows.new_zeros(self.slots, rows.shape[1])
        self._rows[slot:end] = rows
        self._normed[slot:end] = features.normed

    def read(self, slot: int, count: int) -> Features:
        """A copy."""
        rows = self._rows[slot : slot + count].clone()
        return Features(rows, self._normed[slot : slot + count])

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy those of ``count`` slots from ``source`` on to ``target`` onwards."""
        if len(self._rows):
            copy_rows(self._rows, 0, source, target, count)
            self._normed[target : target + count] = self._normed[source : source + count]
