"""Keep hidden states of the tokens that an engine runs, for whoever learns from them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from eepass.runtime.engine.sequence import Sequence


class Recorder:
    """The hidden states after some ``layers``, by sequence and in the order of its tokens.

    For dense decoding, where every token runs through every layer once.
    """

    def __init__(self, layers: Iterable[int]) -> None:
        self.layers = frozenset(layers)
        self._rows: dict[Sequence, dict[int, list[Tensor]]] = {}

    def add(self, sequence: Sequence, layer: int, hidden: Tensor) -> None:
        """``hidden`` [n, H]: of the next ``n`` tokens of ``sequence``, after ``layer``."""
        if layer in self.layers:
            # a view would keep the rows of all other sequences in memory
            kept = self._rows.setdefault(sequence, {})
            kept.setdefault(layer, []).append(hidden.clone())

    def take(self, sequence: Sequence) -> dict[int, Tensor]:
        """The hidden states [n, H] by layer of a ``sequence``, which are forgotten."""
        return {layer: torch.cat(rows) for layer, rows in self._rows.pop(sequence, {}).items()}
