"""One forward pass: rows of several sequences, through as many layers as their tokens need.

A sequence brings its last token and draft tokens as a tree, and at each layer its pending tokens
that exited there. After each exit point draft tokens that can no longer be accepted are dropped. A
sequence exits when all nodes that are left know their next token (T3 of SpecEE, arXiv 2504.08850,
section 6: the exit layer of a path is the largest of its tokens'); the others go on.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from eepass.runtime.cache.feature_cache import FeatureCache
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Place, Row
from eepass.runtime.engine.recorder import Recorder
from eepass.runtime.engine.row_context import RowContext
from eepass.runtime.engine.scheduled_sequence import ScheduledSequence
from eepass.runtime.engine.sequence import PendingTokens
from eepass.runtime.exits.exits import Exits, RowState
from eepass.runtime.statistics import Statistics

# stands for the node of a row that holds a pending token
PENDING = -1


@dataclass(frozen=True, slots=True, eq=False)
class PassRow:
    """A row of the pass: a node of its sequence's tree, or a pending token (node ``PENDING``)."""

    scheduled: ScheduledSequence
    node: int
    position: int
    row: Row

    @property
    def is_pending(self) -> bool:
        return self.node == PENDING


# logits [1, V] by the row's sequence, node and position
RowLogits = dict[tuple[ScheduledSequence, int, int], Tensor]


class ForwardPass:
    """Runs a batch of scheduled sequences through ``decoder`` and fills them in.

    ``features``: where the states that a draft takes are kept, if there is one that does.
    ``recorder`` keeps hidden states for others. ``context``: what the rows of long texts attend to.
    """

    def __init__(
        self,
        decoder: Decoder,
        exits: Exits | None,
        statistics: Statistics,
        features: FeatureCache | None = None,
        kv_policy: str = "defer",
        recorder: Recorder | None = None,
        context: RowContext | None = None,
    ) -> None:
        self.decoder, self.exits, self.statistics = decoder, exits, statistics
        self.recorder = recorder
        self.context = context if context is not None else RowContext(None, attends=False)
        self.features = features
        self.kv_policy = kv_policy
        # the rows on this layer and their hidden states [1, R, H], padded
        self.rows: list[PassRow] = []
        self.hidden: Tensor | None = None
        self._place: Place | None = None
        # whether the rows are the nodes of all trees, as they were at first
        self._is_whole = False
        self._state: RowState | None = None

    def run(self, batch: SequenceOf[ScheduledSequence], drafts: Tensor | None = None) -> None:
        """``drafts`` [R, K]: the predictors' draft tokens for the rows of the trees, where the exit
        plan takes them from no layer."""
        self.context.begin(batch)
        self._embed(batch, drafts)
        first = 0 if self.rows else min(one.sequence.pending[-1].layer for one in batch)
        exits = self.exits is not None and any(one.active_exits for one in batch)
        layer = first
        while layer < self.decoder.num_layers:
            self._insert_pending(batch, layer)
            if self.hidden is None:
                return
            if self._place is None:
                self._place_rows()
            assert self._place is not None
            if layer in self.context.layers:
                self._place = self.context.select(layer, self.rows, self.hidden, self._place)
            begin, layer = layer, self._next_stop(batch, layer, exits)
            taken = self.features.between(begin, layer) if self.features is not None else []
            stops = [*taken, layer]
            *states, self.hidden = self.decoder.run_layers(begin, stops, self.hidden, self._place)
            if self.features is not None:
                for after, state in zip(taken, states, strict=True):
                    self._keep_features(after, state)
            if self.recorder is not None and layer in self.recorder.layers:
                for number, row in enumerate(self.rows):
                    own = self.hidden[0, number : number + 1]
                    self.recorder.add(row.scheduled.sequence, layer, own)
            if exits:
                self._run_predictors(layer)
            if not self.rows:
                return
        self._end(batch)

    def _next_stop(self, batch: SequenceOf[ScheduledSequence], layer: int, exits: bool) -> int:
        """The layer after which there is something to do, of those after ``layer``."""
        if exits or any(one.sequence.pending for one in batch if one.slots is None):
            return layer + 1
        taken = [*(self.recorder.layers if self.recorder is not None else ())]
        taken += self.context.layers
        return min((own for own in taken if own > layer), default=self.decoder.num_layers)

    def lm_head(self, every_row: bool) -> RowLogits:
        """LM head logits of the rows that went through all layers: of ``every_row``, or of those
        whose next token no exit has decided."""
        needed = [
            index
            for index, row in enumerate(self.rows)
            if every_row or (not row.is_pending and row.node not in row.scheduled.next_tokens)
        ]
        if self.hidden is None or not needed:
            return {}
        self.statistics.full_heads += len(needed)
        hidden = self.hidden
        if len(needed) < len(self.rows):
            hidden = hidden[:, torch.tensor(needed)]
        rows = [self.rows[index] for index in needed]
        logits = self.decoder.logits(hidden)[0].split(1)
        return {
            (r.scheduled, r.node, r.position): one for r, one in zip(rows, logits, strict=False)
        }

    def _embed(self, batch: SequenceOf[ScheduledSequence], drafts: Tensor | None) -> None:
        """Start with the nodes of all trees."""
        ids: list[int] = []
        for one in batch:
            if one.tree is None:
                continue
            first, root = one.sequence.first_slot, one.sequence.position
            one.first_node = len(self.rows)
            for node in range(len(one.tree)):
                path = one.tree.path(node)
                position = root + len(path)
                slots = tuple(first + root + n for n in path)
                row = Row(first, position, first + root + node, slots)
                self.rows.append(PassRow(one, node, position, row))
            ids += one.tree.tokens
        if not self.rows:
            return
        self._place_rows()
        assert self._place is not None
        size = len(self._place.slots)
        padding = size - len(self.rows)
        positions = [row.position for row in self.rows]
        last = positions[-1]
        positions += [min(last + 1 + i, self.decoder.num_positions - 1) for i in range(padding)]
        self.hidden = self.decoder.embed(
            torch.tensor([ids + [ids[-1]] * padding]), torch.tensor([positions]), self._place.slots
        )
        for one in batch:
            if one.slots is not None and one.tree is not None:
                one.embedded = self.hidden[:, one.first_node : one.first_node + len(one.tree)]
        if self.features is not None:
            self.features.begin([row.row.slot for row in self.rows])
            self._is_whole = True
        if self.exits is not None:
            if drafts is not None and size > len(drafts):
                drafts = torch.cat([drafts, drafts[-1:].expand(size - len(drafts), -1)])
            self._state = self.exits.begin(size, drafts)

    def _place_rows(self) -> None:
        """Find the slots and side inputs of the rows as they are."""
        size = self.decoder.bucket(len(self.rows))
        sequences = {row.scheduled.sequence for row in self.rows}
        # rows of several sequences are never contiguous
        end = max(s.first_slot + s.capacity for s in sequences) if len(sequences) == 1 else 0
        place = self.decoder.place([row.row for row in self.rows], size, end)
        self._place = self.context.narrowed(self.rows, place)

    def _insert_pending(self, batch: SequenceOf[ScheduledSequence], layer: int) -> None:
        """Put the tokens that are pending at ``layer`` before the rows; pad to a row count there is
        code for."""
        states: list[Tensor] = []
        inserted: list[PassRow] = []
        for one in batch:
            pending = one.sequence.pending
            if not pending or pending[-1].layer != layer or one.slots is not None:
                continue
            if one.tree is not None and not any(row.scheduled is one for row in self.rows):
                # exited before this layer
                continue
            first = one.sequence.first_slot
            one.skipped = one.skipped or layer > 0
            while pending and pending[-1].layer == layer:
                group = pending.pop()
                states.insert(0, group.hidden)
                inserted[:0] = [
                    PassRow(one, PENDING, at, Row(first, at, first + at))
                    for at in range(group.position, group.end)
                ]
        if not inserted:
            return
        self.statistics.rows_caught_up += len(inserted)
        count, carried = len(inserted), len(self.rows)
        self.rows, self._place, self._is_whole = inserted + self.rows, None, False
        if carried:
            assert self.hidden is not None
            states.append(self.hidden[:, :carried])
        if padding := self.decoder.bucket(len(self.rows)) - len(self.rows):
            states.append(states[-1][:, -1:].expand(-1, padding, -1))
        self.hidden = torch.cat(states, 1) if len(states) > 1 else states[0]
        if self._state is not None:
            # no predictor is evaluated for a pending token, so that any row's state does for it
            index = [0] * count + list(range(carried)) + [0] * padding
            self._state = self._state.select(torch.tensor(index))

    def _keep_rows(self, keep: list[int]) -> None:
        """Go on with the rows numbered ``keep``, padded to a row count there is code for."""
        if len(keep) == len(self.rows):
            return
        if not keep:
            self.rows, self.hidden = [], None
            return
        assert self.hidden is not None
        index = torch.tensor(keep + keep[-1:] * (self.decoder.bucket(len(keep)) - len(keep)))
        self.rows, self._place, self._is_whole = [self.rows[at] for at in keep], None, False
        self.hidden = self.hidden[:, index]
        if self._state is not None:
            self._state = self._state.select(index)

    def _keep_features(self, layer: int | None, hidden: Tensor, exited: bool = False) -> None:
        """Keep the rows' states [1, R, H] after ``layer``, or the last (None), for a draft;
        ``exited``: an exit has decided some of the next tokens."""
        assert self.features is not None
        if self._is_whole and not exited:
            self.features.keep(layer, hidden)
            return
        if self._place is None:
            self._place_rows()
        assert self._place is not None
        # pending tokens come first
        begin = sum(row.is_pending for row in self.rows)
        nodes = slice(begin, len(self.rows))
        self.features.write(layer, self._place.slots[nodes], hidden[0, nodes], exited)

    def _run_predictors(self, layer: int) -> None:
        """Evaluate the exits active after ``layer`` for the nodes without a next token."""
        assert self.exits is not None
        evaluated = [
            index
            for index, row in enumerate(self.rows)
            if not row.is_pending
            and layer in row.scheduled.active_exits
            and row.node not in row.scheduled.next_tokens
        ]
        wants_draft = layer == self.exits.plan.draft_layer and any(
            row.scheduled.active_exits for row in self.rows
        )
        if not evaluated and not wants_draft:
            return
        assert self.hidden is not None and self._state is not None
        if wants_draft:
            self._state = self.exits.draft_from(self.hidden, self._state, self.statistics)
        if not evaluated:
            return
        choose = {
            index: own
            for index in evaluated
            if (own := self.rows[index].scheduled.choose) is not None
        }
        decision, self._state = self.exits.check(
            layer, self.hidden, self._state, evaluated, self.statistics, choose
        )
        for index, token in decision.tokens.items():
            row = self.rows[index]
            row.scheduled.next_tokens[row.node] = token
            if self.features is not None:
                self.features.decided(row.row.slot, decision.z[index])
        if decision.tokens:
            self._exit_sequences({self.rows[index].scheduled for index in decision.tokens}, layer)

    def _exit_sequences(self, decided: set[ScheduledSequence], layer: int) -> None:
        """Drop nodes that can no longer be accepted, and whole sequences that know all their next
        tokens."""
        exited: set[ScheduledSequence] = set()
        viable = {one: one.viable_nodes() for one in decided}
        for one, nodes in viable.items():
            if all(node in one.next_tokens for node in nodes):
                one.path, one.exit_layer = nodes, layer
                self._defer_kv(one, layer)
                if self.features is not None:
                    root = one.sequence.first_slot + one.sequence.position
                    self.features.exited([root + node for node in nodes], layer)
                exited.add(one)
        self._keep_rows(
            [
                index
                for index, row in enumerate(self.rows)
                if row.scheduled not in exited
                and (
                    row.is_pending
                    or row.scheduled not in viable
                    or row.node in viable[row.scheduled]
                )
            ]
        )

    def _defer_kv(self, scheduled: ScheduledSequence, layer: int) -> None:
        """Keep the hidden states of a sequence that exits, for the layers it has not run; or do
        what the KV policy says instead."""
        depth = self.decoder.num_layers
        if layer == depth:
            return
        assert self.hidden is not None
        own = [
            index
            for index, row in enumerate(self.rows)
            if row.scheduled is scheduled and (row.is_pending or row.node in scheduled.path)
        ]
        own.sort(key=lambda index: self.rows[index].position)
        hidden = self.hidden[:, torch.tensor(own)]
        if self.kv_policy != "defer":
            # such a sequence has one row a pass
            (row,) = (self.rows[index].row for index in own)
            place = self.decoder.place([row], 1, row.first + scheduled.sequence.capacity)
            for index in range(layer, depth):
                if self.kv_policy == "propagate":
                    self.decoder.fill_kv(index, hidden, place)
                else:
                    self.decoder.kv.blank(index, place.slots)
            return
        scheduled.sequence.pending.append(PendingTokens(layer, self.rows[own[0]].position, hidden))

    def _end(self, batch: SequenceOf[ScheduledSequence]) -> None:
        for row in self.rows:
            row.scheduled.exit_layer = self.decoder.num_layers
            if row.is_pending:
                row.scheduled.caught_up.append(row.position)
        if self.features is not None:
            assert self.hidden is not None
            self._keep_features(None, self.hidden, any(one.next_tokens for one in batch))
