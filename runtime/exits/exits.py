"""Decide after a layer which rows exit: predictors, then verification (``eepass.exit_rule``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eepass.exit_rule import among_drafts, wants_exit
from eepass.plan import ExitPlan, ExitSegments
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.statistics import Statistics

# row counts exits are compiled for: fewer rows are padded, and more take turns
ROW_COUNTS = (1, 8)
# logits [1, N] of a row -> the index of its token [1]
Choose = Callable[[Tensor], Tensor]
NO_CHOICE: Mapping[int, Choose] = {}


class ExitDecision(NamedTuple):
    """Of the rows that exit, by row: their next tokens, and their normed hidden states z [H]."""

    tokens: dict[int, int]
    z: dict[int, Tensor]


class RowState(NamedTuple):
    """What rows carry between exit points: their draft tokens [R, K], and the draft tokens'
    probabilities [R, K] at the exit point before."""

    drafts: Tensor
    previous: Tensor

    def select(self, rows: Tensor) -> RowState:
        return RowState(self.drafts[rows], self.previous[rows])


class Exits:
    """Draft tokens, predictors and verification of one exit plan.

    ``segments(rows)`` builds the segments at exit points for a row count; ``tensors`` are the
    artefact's, with ``hot.head`` (rows of the LM head) and ``hot.ids`` added. Verification over the
    hot vocabulary maps its indices to tokens by ``hot.ids``.
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: ExitPlan,
        segments: Callable[[int], ExitSegments],
        tensors: Mapping[str, Tensor],
    ) -> None:
        self.plan = plan
        self.thresholds = {point.layer: point.threshold for point in plan.exits}
        self.hot_ids = tensors["hot.ids"]
        self._decoder, self._tensors, self._build = decoder, tensors, segments
        self._segments: dict[int, ExitSegments] = {}
        self._bound: dict[tuple[int, int | str], Callable[..., Any]] = {}
        self._prepared: set[int] = set()

    def begin(self, rows: int, drafts: Tensor | None = None) -> RowState:
        """State of ``rows`` new rows; ``drafts`` [R, K] if the plan takes them from no layer."""
        k = self.plan.draft_tokens
        if drafts is None:
            drafts = torch.zeros(rows, k, dtype=torch.long)
        return RowState(drafts, torch.zeros(rows, k))

    def prepare(self, most: int) -> None:
        """Compile and run once what exits need for up to ``most`` rows."""
        for rows in ROW_COUNTS[: 1 if most == 1 else None]:
            if rows in self._prepared:
                continue
            self._prepared.add(rows)
            hidden = torch.zeros(1, rows, self._decoder.hidden_size, dtype=self._decoder.dtype)
            state = self.begin(rows)
            (z,) = self._segment("normed", rows)(hidden)
            self._segment("draft", rows)(z), self._segment("verify", rows)(z)
            for layer in self.thresholds:
                self._segment(layer, rows)(hidden, *state)

    def draft_from(self, hidden: Tensor, state: RowState, statistics: Statistics) -> RowState:
        """Take the draft tokens from hidden states [1, R, H]: each row's likeliest hot tokens."""
        began = perf_counter()
        found = []
        for turn in hidden.split(ROW_COUNTS[-1], 1):
            padded = _padded(turn)
            size = padded.shape[1]
            (z,) = self._segment("normed", size)(padded)
            (logits,) = self._segment("draft", size)(z)
            best = logits[0, : turn.shape[1]].topk(self.plan.draft_tokens, -1)
            found.append(self.hot_ids[best.indices])
        drafts = found[0] if len(found) == 1 else torch.cat(found)
        statistics.draft_seconds += perf_counter() - began
        return RowState(drafts, state.previous)

    def check(
        self,
        layer: int,
        hidden: Tensor,
        state: RowState,
        evaluated: Sequence[int],
        statistics: Statistics,
        choose: Mapping[int, Choose] = NO_CHOICE,
    ) -> tuple[ExitDecision, RowState]:
        """Whether the ``evaluated`` rows of hidden [1, R, H] exit after ``layer``; others stay as
        they are. ``choose``: by row, what replaces the argmax of verification."""
        if hidden.shape[1] == 1:
            # the usual case: each tensor operation that is saved is a tenth of the call
            return self._check_turn(layer, hidden, state, 1, statistics, choose)
        decision, previous = ExitDecision({}, {}), state.previous
        for begin in range(0, len(evaluated), ROW_COUNTS[-1]):
            turn = list(evaluated[begin : begin + ROW_COUNTS[-1]])
            count = len(turn)
            size = next(size for size in ROW_COUNTS if size >= count)
            rows = torch.tensor(turn + turn[-1:] * (size - count))
            own = {index: choose[row] for index, row in enumerate(turn) if row in choose}
            found, after = self._check_turn(
                layer, hidden[:, rows], state.select(rows), count, statistics, own
            )
            previous = previous.index_copy(0, rows[:count], after.previous[:count])
            for index, token in found.tokens.items():
                decision.tokens[turn[index]], decision.z[turn[index]] = token, found.z[index]
        return decision, RowState(state.drafts, previous)

    def _check_turn(
        self,
        layer: int,
        hidden: Tensor,
        state: RowState,
        count: int,
        statistics: Statistics,
        choose: Mapping[int, Choose],
    ) -> tuple[ExitDecision, RowState]:
        """As ``check``, of all rows, as many as there is code for; padding follows the first
        ``count``."""
        began = perf_counter()
        probability, previous, z, *_ = self._segment(layer, hidden.shape[1])(hidden, *state)
        threshold = self.thresholds[layer]
        if hidden.shape[1] == 1:
            # ``wants_exit`` in plain floats
            wanted = [0] if probability.item() > threshold else []
        else:
            # in float64, as floats compare
            wants = wants_exit(probability.double(), threshold).tolist()
            wanted = [row for row in range(count) if wants[row]]
        statistics.predictors_run += count
        ended = perf_counter()
        statistics.predictor_seconds += ended - began
        state = RowState(state.drafts, previous)
        exits: dict[int, int] = {}
        if wanted:
            chosen = {row: choose[row] for row in wanted if row in choose}
            tokens = self._verified(layer, z, state, chosen)
            exiting = among_drafts(tokens, state.drafts).tolist()
            named = tokens.tolist()
            exits = {row: named[row] for row in wanted if exiting[row]}
            statistics.wanted += len(wanted)
            statistics.refused += len(wanted) - len(exits)
            statistics.verify_seconds += perf_counter() - ended
        return ExitDecision(exits, {row: z[0, row] for row in exits}), state

    def _verified(
        self, layer: int, z: Tensor, state: RowState, choose: Mapping[int, Choose]
    ) -> Tensor:
        """The tokens [R] that verification gives for z [1, R, H]."""
        if layer == self.plan.draft_layer and self.plan.verify == "hot" and not choose:
            # the draft tokens are the topk of these very logits, and so the first is their argmax
            return state.drafts[:, 0]
        (logits,) = self._segment("verify", z.shape[1])(z)
        best = logits[0].argmax(-1)
        for row, own in choose.items():
            best[row : row + 1] = own(logits[0, row : row + 1])
        return self.hot_ids[best] if self.plan.verify == "hot" else best

    def _segment(self, name: int | str, rows: int) -> Callable[..., Any]:
        """A segment for ``rows``, compiled when it is first needed: "normed", "draft", "verify", or
        the predictor after a layer."""
        if (rows, name) not in self._bound:
            if rows not in self._segments:
                self._segments[rows] = self._build(rows)
            segments, decoder = self._segments[rows], self._decoder
            hidden = torch.zeros(1, rows, decoder.hidden_size, dtype=decoder.dtype)
            if isinstance(name, int):
                segment, examples = segments.predictors[name], [hidden, *self.begin(rows)]
            else:
                segment, examples = getattr(segments, name), [hidden]
            self._bound[rows, name] = decoder.bind(segment, self._tensors, examples)
        return self._bound[rows, name]


def _padded(hidden: Tensor) -> Tensor:
    """Hidden states [1, R, H], the last repeated up to a row count there is code for."""
    rows = hidden.shape[1]
    size = next(size for size in ROW_COUNTS if size >= rows)
    if size == rows:
        return hidden
    return torch.cat([hidden, *[hidden[:, -1:]] * (size - rows)], 1)
