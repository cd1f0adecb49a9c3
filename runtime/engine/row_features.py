"""The draft's features of a pass's rows, as the layers give them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eepass.runtime.drafting.features import Features


class RowFeatures:
    """Features [N, F * H] of the N nodes of all trees of a pass, numbered in its order: z, and the
    hidden states after ``layers``."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self._rows = torch.empty(0)
        self._normed: list[bool] = []

    def begin(self, count: int, hidden: Tensor) -> None:
        """The pass starts with ``count`` nodes, whose states are like ``hidden`` [..., H]."""
        self._rows = hidden.new_empty(count, 1 + len(self.layers), hidden.shape[-1])
        self._normed = [False] * count

    def after(self, layer: int, nodes: Sequence[int], hidden: Tensor) -> None:
        """States [n, H] of ``nodes`` after ``layer``, one of ``layers``."""
        self._put(1 + self.layers.index(layer), nodes, hidden)

    def at_the_end(self, nodes: Sequence[int], hidden: Tensor) -> None:
        """States [n, H] of ``nodes`` after the last layer; those that exited have their z."""
        if any(self._normed):
            left = [index for index, node in enumerate(nodes) if not self._normed[node]]
            nodes, hidden = (
                [nodes[index] for index in left],
                hidden[torch.tensor(left, dtype=torch.long)],
            )
        self._put(0, nodes, hidden)

    def decided(self, node: int, z: Tensor) -> None:
        """An exit decided what follows ``node``, by z [H]."""
        self._rows[node, 0], self._normed[node] = z, True

    def exited(self, nodes: Sequence[int], layer: int) -> None:
        """``nodes``, all decided, do not go beyond ``layer``: the state after the last layer they
        reached stands for later ones, or z."""
        reached = [place for place, own in enumerate(self.layers, 1) if own <= layer]
        last = max(reached, key=lambda place: self.layers[place - 1], default=0)
        index = torch.tensor(nodes)
        for place, own in enumerate(self.layers, 1):
            if own > layer:
                self._rows[index, place] = self._rows[index, last]

    def of(self, nodes: Sequence[int]) -> Features:
        """Those of ``nodes``; a copy that does not keep others' alive."""
        whole = len(nodes) == len(self._rows)
        rows = self._rows if whole else self._rows[torch.tensor(nodes)]
        return Features(rows.flatten(1), [self._normed[node] for node in nodes])

    def _put(self, place: int, nodes: Sequence[int], hidden: Tensor) -> None:
        if len(nodes) == len(self._rows) > 0:
            self._rows[:, place] = hidden
        elif nodes:
            self._rows[torch.tensor(nodes), place] = hidden
