"""Draft tokens from the model itself, while it attends to a few tokens of a long text.

A pass that attends to selected tokens reads few keys; what it gives is right most of the time. So
some such passes go ahead, each with draft tokens of its own if that pays, and one pass that attends
to all verifies what they gave, in several rows: it reads all keys once for many tokens. Its tokens
are the dense ones, whatever was selected. As in TriForce (arXiv 2404.11912), where the selection is
made of chunks of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from eepass.runtime.context.selection import LATEST, Selection
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.drafting.planner import Average, Mode, Planner
from eepass.runtime.engine.row_context import RowContext
from eepass.runtime.engine.scheduled_sequence import ScheduledSequence
from eepass.runtime.engine.sequence import Attended, Sequence

# tokens that may wait for the pass that verifies them, and rows of a pass that drafts
MOST_WAITING, MOST_ROWS = 16, 8
# ways of decoding without exits
PLAIN: tuple[Mode, ...] = ("dense", "speculation")
# how likely such a draft token is right as long as that is not known, as so many observations of
# it, and by how much older ones fade
RIGHT, WEIGHT, FADE = 0.9, 8.0, 0.97
# what drafting so would gain at a time when it pays, in dense passes
HOPE = 0.2


class ContextDrafts:
    """Decides when to draft so, for one sequence at a time: ``selection`` selects in passes that
    attend to all, for those that do not. ``planner``: of the latter. ``rows``: of a pass at most.
    """

    def __init__(self, selection: Selection, planner: Planner, rows: int) -> None:
        self.selection, self.planner = selection, planner
        # what a pass gives beyond that still fits into the one that verifies
        self.most_waiting = min(MOST_WAITING, rows - MOST_ROWS)
        # tokens that were drafted and verified, of which some were right; older ones fade
        self._right, self._verified = WEIGHT * RIGHT, WEIGHT
        # passes that draft; and those that attend to all, with what was drafted for them
        self._drafting, self._verifying = Average(planner.cost(1)), Average(0.0)
        self._seconds, self._passes = 0.0, 0
        self.drafted = self.accepted = 0

    @property
    def chance(self) -> float:
        """How likely a draft token is right if those before it are."""
        return self._right / self._verified

    def concerns(self, sequence: Sequence) -> bool:
        """Whether its text may be drafted for so: answers that are drawn would depend on how many
        tokens were drafted."""
        return self.selection.is_long(sequence.prompt_length) and sequence.sampling.greedy

    def begin(self, planner: Planner, full: Planner) -> None:
        """Passes that draft begin with ``planner``, of what others cost in short texts; draft
        tokens for them are as likely as for ``full``'s."""
        self.planner, planner.acceptance = planner, full.acceptance
        planner.modes = tuple(mode for mode in PLAIN if mode in full.modes)
        self._drafting = Average(planner.cost(1))

    def attention(self, batch: SequenceOf[ScheduledSequence], full: Planner) -> RowContext:
        """For a pass over ``batch``: whether it selects for others that draft."""
        selects = False
        if len(batch) == 1 and batch[0].slots is None:
            sequence = batch[0].sequence
            sequence.attended = None
            selects = self.concerns(sequence) and self.pays(0, full)
        return RowContext(self.selection if selects else None, attends=False)

    def remember(self, attention: RowContext) -> None:
        """A pass has selected what passes that draft may attend to."""
        for sequence, slots in attention.selected.items():
            positions = slots[slots >= 0] - sequence.first_slot
            latest = int(positions[-1]) + 1 - LATEST
            sequence.attended = Attended(positions[positions < latest], latest)

    def slots_for(self, sequence: Sequence, full: Planner) -> Tensor | None:
        """The slots int32 [S] that the next pass attends to if it is to draft, else None; ``full``:
        the planner of other passes."""
        attended, waiting = sequence.attended, sequence.num_pending
        if attended is None:
            return None
        # behind tokens that exited early some layers have no keys yet
        if any(group.layer for group in sequence.pending):
            return None
        # the pass that selected was told to
        if waiting and not self.pays(waiting, full):
            return None
        end = sequence.position + MOST_ROWS
        latest = torch.arange(attended.latest, end, dtype=torch.int32)
        own = torch.cat([attended.positions, latest]) + sequence.first_slot
        slots = own.new_full((self.selection.slots,), -1)
        slots[: len(own)] = own
        return slots

    def pays(self, waiting: int, full: Planner) -> bool:
        """Whether tokens come faster than at present if one more pass drafts, after ``waiting``
        tokens, before all are verified."""
        count = max(round(self._drafting.brought), 1)
        if waiting + count > self.most_waiting:
            return False
        right = sum(self.chance ** (waiting + n) for n in range(1, count + 1))
        rows = 1 + waiting
        took = self._drafting.took + full.cost(rows + count) - full.cost(rows)
        pace = self._verifying.value if self._verifying.passes else full.token_seconds
        loss = took - right * pace
        return loss < 0 or (not waiting and full.due("context", loss / full.cost(1), HOPE))

    def learn(self, ran: ScheduledSequence, seconds: float) -> None:
        """A pass over one sequence was run, whose like takes ``seconds`` undisturbed."""
        new = len(ran.new_tokens)
        if ran.slots is not None:
            self.drafted += new
            self._seconds += seconds
            self._drafting.add(seconds, new, self.planner.passes)
            return
        # those that exited early are not of this
        waited = 0 if ran.skipped else len(ran.caught_up)
        right = waited
        if waited and ran.num_kept is not None:
            right = ran.num_kept - 1 - min(ran.caught_up)
        seen = min(right + 1, waited)
        fade = FADE**seen
        self._right, self._verified = self._right * fade + right, self._verified * fade + seen
        self.accepted += right
        self._passes += 1
        self._verifying.add(self._seconds + seconds, right + new, self._passes)
        self._seconds = 0.0

    def prepare(self, decoder: Decoder, rows: int) -> None:
        """Compile what passes that draft need, and what selects in passes of up to ``rows``."""
        slots = self.selection.slots
        for size in decoder.buckets:
            if size <= MOST_ROWS:
                decoder.prepare_selecting(size, slots)
            if size <= rows:
                decoder.prepare_queries(size, slots)
