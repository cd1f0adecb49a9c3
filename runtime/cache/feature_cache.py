"""The draft's features of the tokens in the KV cache, by slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eepass.runtime.cache.kv_cache import copy_rows
from eepass.runtime.drafting.features import Features

# states [1, R, H] of a pass: z, and those after each of some layers; None where they are not noted
Left = list[Tensor | None]
# of so many tokens states wait for being written
MOST_WAITING = 64


class FeatureCache:
    """Of the tokens in ``slots`` slots, as far as they were run: the hidden state z before the LM
    head, and those after ``layers``.

    Passes leave states here as their layers give them, and a draft reads what it needs when it is
    asked. As for most tokens that is never, what a pass leaves is only noted at first.
    """

    def __init__(self, slots: int, layers: Sequence[int] = ()) -> None:
        self.slots, self.layers = slots, tuple(layers)
        # [slots, F * H]: z, then the states after each of the layers; their width is known when
        # some come
        self._rows = torch.zeros(0)
        # whether z is normed already
        self._normed = [False] * slots
        # what the newest pass over each of some slots has left, and in which of its rows
        self._waiting: dict[int, tuple[Left, int]] = {}
        self._newest: Left = []

    def between(self, begin: int, end: int) -> list[int]:
        """The ``layers`` after which states are wanted, of those from ``begin`` to ``end``."""
        return sorted(layer for layer in self.layers if begin < layer <= end)

    def begin(self, slots: Sequence[int]) -> None:
        """A pass over the tokens of ``slots`` begins."""
        self._newest = [None] * (1 + len(self.layers))
        for row, slot in enumerate(slots):
            self._normed[slot] = False
            self._waiting[slot] = self._newest, row

    def keep(self, layer: int | None, hidden: Tensor) -> None:
        """States [1, R, H] of the pass, in the order it began with, after ``layer``, one of
        ``layers``, or after the last (None); padding may follow."""
        self._newest[self._place(layer)] = hidden
        if layer is None and len(self._waiting) >= MOST_WAITING:
            self._flush()

    def write(self, layer: int | None, slots: Tensor, hidden: Tensor, exited: bool = False) -> None:
        """As ``keep``, of a pass with other rows by now: states [n, H] of ``slots`` [n].
        ``exited``: some may have their z already, from an exit."""
        if exited and layer is None:
            left = [at for at, slot in enumerate(slots.tolist()) if not self._normed[slot]]
            slots, hidden = slots[left], hidden[left]
        self._write(self._place(layer), slots, hidden)

    def decided(self, slot: int, z: Tensor) -> None:
        """An exit decided what follows the token in ``slot``, by z [H]."""
        self._flush()
        self._write(0, torch.tensor([slot], device=z.device), z[None])
        self._normed[slot] = True

    def exited(self, slots: Sequence[int], layer: int) -> None:
        """The tokens in ``slots``, all decided, do not go beyond ``layer``: the state after the
        last layer they reached stands for later ones, or z."""
        self._flush()
        reached = [place for place, own in enumerate(self.layers, 1) if own <= layer]
        last = max(reached, key=lambda place: self.layers[place - 1], default=0)
        index = torch.tensor(slots, device=self._rows.device)
        for place, own in enumerate(self.layers, 1):
            if own > layer:
                self._write(place, index, self._states[index, last])

    def read(self, slot: int, count: int) -> Features:
        """Those of ``count`` slots from ``slot`` on, as they are until the next pass."""
        self._flush()
        return Features(self._rows[slot : slot + count], self._normed[slot : slot + count])

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy those of ``count`` slots from ``source`` on to ``target`` onwards."""
        self._flush()
        if len(self._rows):
            copy_rows(self._rows, 0, source, target, count)
        self._normed[target : target + count] = self._normed[source : source + count]

    def move(self, sources: Sequence[int], target: int) -> None:
        """Copy those of slots ``sources``, ascending, to ``target`` onwards."""
        end = target + len(sources)
        if sources[0] == target and sources[-1] == end - 1:
            return
        self._flush()
        if len(self._rows):
            self._rows[target:end] = self._rows[torch.tensor(sources)]
        self._normed[target:end] = [self._normed[slot] for slot in sources]

    def _place(self, layer: int | None) -> int:
        return 0 if layer is None else 1 + self.layers.index(layer)

    def _flush(self) -> None:
        """Write what was only noted."""
        passes: dict[int, tuple[Left, list[int], list[int]]] = {}
        for slot, (left, row) in self._waiting.items():
            _, slots, rows = passes.setdefault(id(left), (left, [], []))
            slots.append(slot)
            rows.append(row)
        # the pass may not be at its end
        newest = self._newest
        self._waiting = {s: noted for s, noted in self._waiting.items() if noted[0] is newest}
        for left, slots, rows in passes.values():
            first, count = slots[0], len(slots)
            whole = slots == list(range(first, first + count)) and None not in left
            if whole and rows == list(range(rows[0], rows[0] + count)):
                # as mostly: slices are quicker than indices
                begin = rows[0]
                states = [h[0, begin : begin + count] for h in left if h is not None]
                self._room(states[0])[first : first + count] = torch.cat(states, 1)
            else:
                self._write_places(left, slots, rows)
            left[:] = [None] * len(left)

    def _write_places(self, left: Left, slots: Sequence[int], rows: list[int]) -> None:
        for place, hidden in enumerate(left):
            if hidden is not None:
                index = torch.tensor(slots, device=hidden.device)
                self._write(place, index, hidden[0, rows])

    @property
    def _states(self) -> Tensor:
        """[slots, F, H]"""
        return self._rows.unflatten(1, (1 + len(self.layers), -1))

    def _room(self, like: Tensor) -> Tensor:
        """All rows; ``like`` [..., H]: a state."""
        if not len(self._rows):
            width = (1 + len(self.layers)) * like.shape[-1]
            self._rows = like.new_zeros(self.slots, width)
        return self._rows

    def _write(self, place: int, slots: Tensor, hidden: Tensor) -> None:
        self._room(hidden)
        self._states[slots, place] = hidden
