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

# row counts exits are compiled for; others are padded
ROW_COUNTS = (1, 8)
# logits [R, N] -> the index of each row's token [R]
Choose = Callable[[Tensor], Tensor]


class ExitDecision(NamedTuple):
    """The next tokens of the rows that exit, by row, and the normed hidden states z [1, >= R, H] of
    all rows."""

    tokens: dict[int, int]
    z: Tensor


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
        self._head = decoder.splits[1].head

    def begin(self, rows: int, drafts: Tensor | None = None) -> RowState:
        """State of ``rows`` new rows; ``drafts`` [R, K] if the plan takes them from no layer."""
        k = self.plan.draft_tokens
        if drafts is None:
            drafts = torch.zeros(rows, k, dtype=torch.long)
        return RowState(drafts, torch.zeros(rows, k))

    def prepare(self, most: int) -> None:
        """Compile and run once what exits need for up to ``most`` rows."""
        for rows in (size for size in ROW_COUNTS if size <= most):
            hidden = torch.zeros(1, rows, self._decoder.hidden_size, dtype=self._decoder.dtype)
            state = self.begin(rows)
            (z,) = self._segment("normed", rows)(hidden)
            self._segment("draft", rows)(z), self._segment("verify", rows)(z)
            for layer in self.thresholds:
                self._segment(layer, rows)(hidden, *state)

    def final(self, hidden: Tensor) -> Tensor:
        """The normed hidden state z [1, n, H] of hidden states after the last layer [1, n, H]."""
        return self._head.normed(hidden, self._decoder.tensors)

    def draft_from(self, hidden: Tensor, state: RowState, statistics: Statistics) -> RowState:
        """Take the draft tokens from hidden states [1, R, H]: each row's likeliest hot tokens."""
        began = perf_counter()
        rows, hidden = hidden.shape[1], _padded(hidden, 1)
        size = hidden.shape[1]
        (z,) = self._segment("normed", size)(hidden)
        (logits,) = self._segment("draft", size)(z)
        drafts = self.hot_ids[logits[0, :rows].topk(self.plan.draft_tokens, -1).indices]
        statistics.draft_seconds += perf_counter() - began
        return RowState(drafts, state.previous)

    def check(
        self,
        layer: int,
        hidden: Tensor,
        state: RowState,
        evaluated: Sequence[int],
        statistics: Statistics,
        choose: Choose | None = None,
    ) -> tuple[ExitDecision, RowState]:
        """Whether the ``evaluated`` rows of hidden [1, R, H] exit after ``layer``; ``choose``
        replaces the argmax of verification."""
        began = perf_counter()
        rows, (drafts, previous) = hidden.shape[1], state
        # with one row, the usual case, each tensor operation that is saved is a tenth of the call
        pad = rows not in ROW_COUNTS
        if pad:
            hidden, drafts, previous = (
                _padded(hidden, 1), _padded(drafts, 0), _padded(previous, 0)
            )  # fmt: skip
        predict = self._segment(layer, hidden.shape[1])
        probability, previous, z, *_ = predict(hidden, drafts, previous)
        threshold = self.thresholds[layer]
        if rows == 1:
            # ``wants_exit`` in plain floats
            wanted = list(evaluated) if probability.item() > threshold else []
        else:
            # in float64, as floats compare
            wants = wants_exit(probability.double(), threshold).tolist()
            wanted = [row for row in evaluated if wants[row]]
        if pad:
            previous = previous[:rows]
        statistics.predictors_run += len(evaluated)
        ended = perf_counter()
        statistics.predictor_seconds += ended - began
        state = RowState(state.drafts, previous)
        exits: dict[int, int] = {}
        if wanted:
            tokens = self._verified(layer, z, state, choose)[:rows]
            exiting = among_drafts(tokens, state.drafts).tolist()
            named = tokens.tolist()
            exits = {row: named[row] for row in wanted if exiting[row]}
            statistics.wanted += len(wanted)
            statistics.refused += len(wanted) - len(exits)
            statistics.verify_seconds += perf_counter() - ended
        return ExitDecision(exits, z), state

    def _verified(self, layer: int, z: Tensor, state: RowState, choose: Choose | None) -> Tensor:
        """The tokens [R] that verification gives for z [1, R, H]."""
        if layer == self.plan.draft_layer and self.plan.verify == "hot" and choose is None:
            # the draft tokens are the topk of these very logits, and so the first is their argmax
            return state.drafts[:, 0]
        (logits,) = self._segment("verify", z.shape[1])(z)
        best = logits[0].argmax(-1) if choose is None else choose(logits[0])
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


def _padded(tensor: Tensor, dim: int) -> Tensor:
    """``tensor`` with its last row repeated up to a row count there is code for."""
    rows = tensor.shape[dim]
    size = next((size for size in ROW_COUNTS if size >= rows), rows)
    if size == rows:
        return tensor
    last = tensor.narrow(dim, rows - 1, 1)
    return torch.cat([tensor, *[last] * (size - rows)], dim)
