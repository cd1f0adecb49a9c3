"""The draft's features of the tokens in the KV cache, by slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eepass.runtime.cache.kv_cache import copy_rows
from eepass.runtime.drafting.features import Features


class FeatureCache:
    """Of the tokens in ``slots`` slots, as far as they were run: the hidden state z before the LM
    head, and those after ``layers``.

    A pass writes them as its layers give them, and a draft reads what it needs when it is asked:
    for most tokens that is never.
    """

    def __init__(self, slots: int, layers: Sequence[int] = ()) -> None:
        self.slots, self.layers = slots, tuple(layers)
        # z [slots, H], then those after each of the layers; their width is known when some come
        self._states: list[Tensor] = []
        # whether z is normed already
        self._normed = [False] * slots

    def between(self, begin: int, end: int) -> list[int]:
        """The ``layers`` after which states are wanted, of those from ``begin`` to ``end``."""
        return sorted(layer for layer in self.layers if begin < layer <= end)

    def begin(self, slots: Sequence[int]) -> None:
        """The tokens of ``slots`` are about to be run."""
        for slot in slots:
            self._normed[slot] = False

    def after(self, layer: int, slots: Tensor, hidden: Tensor) -> None:
        """States [n, H] of the tokens in ``slots`` [n] after ``layer``, one of ``layers``."""
        self._write(1 + self.layers.index(layer), slots, hidden)

    def at_the_end(self, slots: Tensor, hidden: Tensor, exited: bool = False) -> None:
        """States [n, H] of ``slots`` [n] after the last layer; ``exited``: some may have their z
        already, from an exit."""
        if exited:
            left = [at for at, slot in enumerate(slots.tolist()) if not self._normed[slot]]
            slots, hidden = slots[left], hidden[left]
        self._write(0, slots, hidden)

    def decided(self, slot: int, z: Tensor) -> None:
        """An exit decided what follows the token in ``slot``, by z [H]."""
        self._write(0, torch.tensor([slot]), z[None])
        self._normed[slot] = True

    def exited(self, slots: Sequence[int], layer: int) -> None:
        """The tokens in ``slots``, all decided, do not go beyond ``layer``: the state after the
        last layer they reached stands for later ones, or z."""
        reached = [place for place, own in enumerate(self.layers, 1) if own <= layer]
        last = max(reached, key=lambda place: self.layers[place - 1], default=0)
        index = torch.tensor(slots)
        for place, own in enumerate(self.layers, 1):
            if own > layer:
                self._write(place, index, self._states[last][index])

    def read(self, slot: int, count: int) -> Features:
        """A copy."""
        rows = torch.cat([state[slot : slot + count] for state in self._states], 1)
        return Features(rows, self._normed[slot : slot + count])

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy those of ``count`` slots from ``source`` on to ``target`` onwards."""
        for state in self._states:
            copy_rows(state, 0, source, target, count)
        self._normed[target : target + count] = self._normed[source : source + count]

    def move(self, sources: Sequence[int], target: int) -> None:
        """Copy those of slots ``sources``, ascending, to ``target`` onwards."""
        end = target + len(sources)
        if sources[0] == target and sources[-1] == end - 1:
            return
        index = torch.tensor(sources)
        for state in self._states:
            state[target:end] = state[index]
        self._normed[target:end] = [self._normed[slot] for slot in sources]

    def _write(self, place: int, slots: Tensor, hidden: Tensor) -> None:
        if not self._states:
            shape = self.slots, hidden.shape[-1]
            self._states = [hidden.new_zeros(shape) for _ in range(1 + len(self.layers))]
        self._states[place].index_copy_(0, slots, hidden)
