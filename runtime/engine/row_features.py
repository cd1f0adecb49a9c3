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
        # by place: those of all nodes [N, H], as the pass gave them
        self._whole: list[Tensor | None] = []
        # [N, F, H], once nodes differ in what is known of them
        self._parts: Tensor | None = None
        self._normed: list[bool] = []

    def begin(self, count: int) -> None:
        """The pass starts with ``count`` nodes."""
        self._whole, self._parts = [None] * (1 + len(self.layers)), None
        self._normed = [False] * count

    def between(self, begin: int, end: int) -> list[int]:
        """The ``layers`` after which states are wanted, of those from ``begin`` to ``end``."""
        return sorted(layer for layer in self.layers if begin < layer <= end)

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
        self._rows(z)[node, 0], self._normed[node] = z, True

    def exited(self, nodes: Sequence[int], layer: int) -> None:
        """``nodes``, all decided, do not go beyond ``layer``: the state after the last layer they
        reached stands for later ones, or z."""
        reached = [place for place, own in enumerate(self.layers, 1) if own <= layer]
        last = max(reached, key=lambda place: self.layers[place - 1], default=0)
        index = torch.tensor(nodes)
        rows = self._rows()
        for place, own in enumerate(self.layers, 1):
            if own > layer:
                rows[index, place] = rows[index, last]

    def of(self, nodes: Sequence[int]) -> Features:
        """Those of ``nodes``; a copy that does not keep others' alive."""
        normed = [self._normed[node] for node in nodes]
        rows = self._rows().flatten(1)
        if len(nodes) < len(rows):
            # mostly one of each sequence: a slice is quicker than an index
            one = slice(nodes[0], nodes[0] + 1)
            rows = rows[one].clone() if len(nodes) == 1 else rows[torch.tensor(nodes)]
        return Features(rows, normed)

    def _put(self, place: int, nodes: Sequence[int], hidden: Tensor) -> None:
        # a pass may have rows of pending tokens alone
        if not nodes:
            return
        if self._parts is None and len(nodes) == len(self._normed):
            self._whole[place] = hidden
        else:
            self._rows(hidden)[torch.tensor(nodes), place] = hidden

    def _rows(self, like: Tensor | None = None) -> Tensor:
        """All that is known as one tensor; ``like`` [..., H]: a state, where none may be yet."""
        if self._parts is not None:
            return self._parts
        known = [part for part in self._whole if part is not None]
        if len(known) == len(self._whole):
            # once a pass, however many sequences ask for theirs
            self._parts = torch.stack(known, 1)
            return self._parts
        like = known[0] if known else like
        assert like is not None
        self._parts = like.new_empty(len(self._normed), len(self._whole), like.shape[-1])
        for place, part in enumerate(self._whole):
            if part is not None:
                self._parts[:, place] = part
        return self._parts
