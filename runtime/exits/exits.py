"""Deciding at a boundary which rows already know their answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eepass.plan import ExitPlan, ExitSegments
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.statistics import Statistics
from eepass.segments import Segment

# row counts exits are compiled for; others are padded
ROW_COUNTS = (1, 8)
# logits [R, N] -> the place of each row's answer [R]
Choose = Callable[[Tensor], Tensor]


class Found(NamedTuple):
    """What an exit point says of R rows: the answers it knows by row, and states [1, >= R, H]."""

    answers: dict[int, int]
    z: Tensor


class RowState(NamedTuple):
    """What rows carry between exit points: draft tokens and their last chances [R, K]."""

    drafts: Tensor
    previous: Tensor

    def select(self, rows: Tensor) -> RowState:
        return RowState(self.drafts[rows], self.previous[rows])


class Exits:
    """Draft, predictors and verification of one exit plan.

    ``segments(rows)`` makes what runs at exit points for a row count; ``tensors`` are the
    artefact's, with ``hot.head`` (rows of the LM head) and ``hot.ids`` added. Verification on the
    hot vocabulary names tokens through ``hot.ids``.
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
        self._decoder, self._tensors, self._segments = decoder, tensors, segments
        self._bound: dict[int, _BoundSegments] = {}
        self._head = decoder.splits[1].head

    def begin(self, rows: int, drafts: Tensor | None = None) -> RowState:
        """State of ``rows`` new rows; ``drafts`` [R, K] if they come from no boundary."""
        k = self.plan.draft_tokens
        if drafts is None:
            drafts = torch.zeros(rows, k, dtype=torch.long)
        return RowState(drafts, torch.zeros(rows, k))

    def prepare(self, most: int) -> None:
        """Compile what exits need for up to ``most`` rows."""
        for rows in (size for size in ROW_COUNTS if size <= most):
            hidden = torch.zeros(1, rows, self._decoder.hidden_size, dtype=self._decoder.dtype)
            bound, state = self._for(rows), self.begin(rows)
            (z,) = bound.normed(hidden)
            bound.draft(z), bound.verify(z)
            for layer in self.thresholds:
                bound.predict(layer)(hidden, *state)

    def final(self, hidden: Tensor) -> Tensor:
        """The normed state z [1, n, H] of last boundaries [1, n, H], any n."""
        return self._head.normed(hidden, self._decoder.tensors)

    def draft_from(self, hidden: Tensor, state: RowState, statistics: Statistics) -> RowState:
        """Take the drafts from a boundary [1, R, H]: each row's likeliest hot tokens."""
        began = perf_counter()
        rows, hidden = hidden.shape[1], _padded(hidden, 1)
        bound = self._for(hidden.shape[1])
        (z,) = bound.normed(hidden)
        (logits,) = bound.draft(z)
        drafts = self.hot_ids[logits[0, :rows].topk(self.plan.draft_tokens, -1).indices]
        statistics.draft_seconds += perf_counter() - began
        return RowState(drafts, state.previous)

    def check(
        self,
        layer: int,
        hidden: Tensor,
        state: RowState,
        asked: Sequence[int],
        statistics: Statistics,
        choose: Choose | None = None,
    ) -> tuple[Found, RowState]:
        """Ask some rows of hidden [1, R, H] after ``layer``; ``choose`` replaces the argmax."""
        began = perf_counter()
        rows, (drafts, previous) = hidden.shape[1], state
        # mostly one row: each operation on tensors that need not be is a tenth of the call
        odd = rows not in ROW_COUNTS
        if odd:
            hidden, drafts, previous = (
                _padded(hidden, 1), _padded(drafts, 0), _padded(previous, 0)
            )  # fmt: skip
        predict = self._for(hidden.shape[1]).predict(layer)
        chances, previous, z, *_ = predict(hidden, drafts, previous)
        if odd:
            previous = previous[:rows]
        limit = self.thresholds[layer]
        chance = (chances.item(),) if rows == 1 else chances.tolist()
        wanted = [row for row in asked if chance[row] > limit]
        statistics.predictors_run += len(asked)
        ended = perf_counter()
        statistics.predictor_seconds += ended - began
        state = RowState(state.drafts, previous)
        answers: dict[int, int] = {}
        if wanted:
            tokens = self._answers(layer, z, state, choose)[:rows]
            right = (tokens[:, None] == state.drafts).any(-1)[wanted].tolist()
            named = tokens[wanted].tolist()
            answers = {row: name for row, name, ok in zip(wanted, named, right, strict=True) if ok}
            statistics.wanted += len(wanted)
            statistics.refused += len(wanted) - len(answers)
            statistics.verify_seconds += perf_counter() - ended
        return Found(answers, z), state

    def _answers(self, layer: int, z: Tensor, state: RowState, choose: Choose | None) -> Tensor:
        if layer == self.plan.draft_layer and self.plan.verify == "hot" and choose is None:
            # the drafts came from these very logits: the first of them is their argmax
            return state.drafts[:, 0]
        (logits,) = self._for(z.shape[1]).verify(z)
        best = logits[0].argmax(-1) if choose is None else choose(logits[0])
        return self.hot_ids[best] if self.plan.verify == "hot" else best

    def _for(self, rows: int) -> _BoundSegments:
        if rows not in self._bound:
            self._bound[rows] = _BoundSegments(
                self._decoder, self._segments(rows), self._tensors, rows, self.plan.draft_tokens
            )
        return self._bound[rows]


def _padded(tensor: Tensor, dim: int) -> Tensor:
    """``tensor`` with its last row repeated up to a row count there is code for."""
    rows = tensor.shape[dim]
    size = next((size for size in ROW_COUNTS if size >= rows), rows)
    if size == rows:
        return tensor
    last = tensor.narrow(dim, rows - 1, 1)
    return torch.cat([tensor, *[last] * (size - rows)], dim)


class _BoundSegments:
    """The segments for one row count, compiled when they are first asked for."""

    def __init__(
        self,
        decoder: Decoder,
        segments: ExitSegments,
        tensors: Mapping[str, Tensor],
        rows: int,
        k: int,
    ) -> None:
        self._hidden = torch.zeros(1, rows, decoder.hidden_size, dtype=decoder.dtype)
        self._examples = [
            self._hidden, torch.zeros(rows, k, dtype=torch.long), torch.zeros(rows, k),
        ]  # fmt: skip
        self._decoder, self._segments, self._tensors = decoder, segments, tensors
        self._predictors: dict[int, Any] = {}
        self._others: dict[str, Any] = {}

    def predict(self, layer: int) -> Any:
        if layer not in self._predictors:
            segment = self._segments.predictors[layer]
            self._predictors[layer] = self._decoder.bind(segment, self._tensors, self._examples)
        return self._predictors[layer]

    def normed(self, hidden: Tensor) -> Any:
        return self._other("normed", self._segments.normed)(hidden)

    def draft(self, z: Tensor) -> Any:
        return self._other("draft", self._segments.draft)(z)

    def verify(self, z: Tensor) -> Any:
        return self._other("verify", self._segments.verify)(z)

    def _other(self, name: str, segment: Segment) -> Any:
        if name not in self._others:
            self._others[name] = self._decoder.bind(segment, self._tensors, [self._hidden])
        return self._others[name]
