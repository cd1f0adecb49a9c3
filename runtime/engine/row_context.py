"""What the rows of a pass attend to, where their texts are long."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eepass.runtime.context.selection import Selection, Text
from eepass.runtime.decoder.side_inputs import Place
from eepass.runtime.engine.scheduled_sequence import ScheduledSequence
from eepass.runtime.engine.sequence import Sequence

if TYPE_CHECKING:
    from eepass.runtime.engine.forward_pass import PassRow


class RowContext:
    """``selection`` selects on the way, at some of its layers: for the layers after them if the
    pass ``attends`` to what is selected, else for passes to come (``selected``). Sequences that
    come with slots of their own attend to these, from the first layer on.
    """

    def __init__(self, selection: Selection | None, attends: bool) -> None:
        self.selection, self.attends = selection, attends
        self.layers: frozenset[int] = frozenset()
        # slots int32 [S] by sequence
        self.selected: dict[Sequence, Tensor] = {}
        self._slots: dict[Sequence, Tensor] = {}

    def begin(self, batch: SequenceOf[ScheduledSequence]) -> None:
        """The pass is over ``batch``; nothing is selected where no text is long."""
        self._slots = {one.sequence: one.slots for one in batch if one.slots is not None}
        longest = max(one.sequence.position + len(one.tree or ()) for one in batch)
        if self.selection is not None and not self._slots and self.selection.is_long(longest):
            self.layers = self.selection.layers

    def select(self, layer: int, rows: SequenceOf[PassRow], hidden: Tensor, place: Place) -> Place:
        """Select before ``layer``, one of ``layers``; where the pass goes on."""
        assert self.selection is not None
        self.selected = self.selection.select(layer, _texts(rows), hidden, place)
        if self.attends:
            self._slots = self.selected
        return self.narrowed(rows, place)

    def narrowed(self, rows: SequenceOf[PassRow], place: Place) -> Place:
        """``place`` of ``rows`` that attend to what is selected for them. All attend to all where
        something was selected for a part of them only: pending tokens may join after the layer that
        selects."""
        lists = [self._slots.get(row.scheduled.sequence) for row in rows]
        found = [slots for slots in lists if slots is not None]
        if not found or len(found) < len(rows):
            return place
        padding = len(place.slots) - len(found)
        return place.selecting(torch.stack(found + found[-1:] * padding))


def _texts(rows: SequenceOf[PassRow]) -> list[Text]:
    """The sequences of the rows; rows of pending tokens do not say what to attend to, unless there
    are no others."""
    found: dict[Sequence, list[int]] = {}
    for index, row in enumerate(rows):
        found.setdefault(row.scheduled.sequence, []).append(index)
    texts = []
    for sequence, indices in found.items():
        own = [rows[index] for index in indices]
        asking = [index for index in indices if not rows[index].is_pending]
        begin = min(row.position for row in own)
        end = max(row.row.slot for row in own) - sequence.first_slot + 1
        texts.append(Text(sequence, asking or indices, begin, end))
    return texts
