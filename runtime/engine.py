"""The decode loop: one token at a time, each leaving at the layer where its answer is known.

A token that leaves early is *pending*: the deeper layers have not seen it. Its boundary state
waits, and the next token that goes deeper takes it along as an extra row (KV policy ``defer``), so
every layer sees every token in order and no weight is read twice. Pending tokens with shallower
boundaries are always later tokens: waiting states form a stack, deepest first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from eepass.runtime.decoder import Decoder
from eepass.runtime.exits import Exits
from eepass.runtime.scheduler import PredictorSchedule
from eepass.runtime.statistics import Statistics


class EngineError(ValueError):
    """A request the engine cannot serve; the message says what to change."""


class Step(NamedTuple):
    """The token that follows, and after how many layers that was known."""

    token: int
    exit_layer: int


class _Waiting(NamedTuple):
    layer: int
    hidden: Tensor  # [1, rows, H]


class Engine:
    """Decodes one sequence at a time over a ``Decoder``; without ``exits`` it is dense.

    ``pending_limit`` bounds the tokens waiting for the deeper layers; with that many, the next one
    runs all layers.
    """

    def __init__(
        self,
        decoder: Decoder,
        exits: Exits | None = None,
        schedule: PredictorSchedule | None = None,
        kv_policy: Literal["defer", "propagate", "drop"] = "defer",
        pending_limit: int = 7,
    ) -> None:
        self.decoder = decoder
        self.exits = exits
        self.schedule = schedule
        self.kv_policy = kv_policy
        step_rows = max(size for size in decoder.buckets if size <= 32)
        self.pending_limit = min(pending_limit, step_rows - 1)
        self.statistics = Statistics(decoder.num_layers)
        self.position = 0
        self._waiting: list[_Waiting] = []

    @property
    def pending(self) -> int:
        return sum(group.hidden.shape[1] for group in self._waiting)

    def reset(self) -> None:
        """Forget the sequence: cache, waiting states, schedule and draft."""
        self.decoder.kv.lengths = [0] * self.decoder.num_layers
        self.position = 0
        self._waiting.clear()
        if self.schedule is not None:
            self.schedule.reset()
        if self.exits is not None and self.exits.draft is not None:
            self.exits.draft.reset()

    def prefill(
        self, ids: Sequence[int], on_layer: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """Run a prompt through all layers; returns the last boundary of its last token [1, 1, H].

        ``on_layer(layer, hidden)`` sees each boundary [1, rows, H] of each chunk. Raises
        ``EngineError`` for an empty prompt or one that does not fit the cache.
        """
        if not ids:
            raise EngineError("the prompt is empty: give at least one token")
        if self.position + len(ids) > self.decoder.capacity:
            raise EngineError(
                f"the prompt has {len(ids)} tokens, the cache room for {self.decoder.capacity}: "
                "shorten it or raise max_length"
            )
        largest = self.decoder.buckets[-1]
        hidden = None
        for start in range(0, len(ids), largest):
            chunk = list(ids[start : start + largest])
            rows = len(chunk)
            size = self.decoder.bucket(rows)
            padded = torch.tensor([chunk + [chunk[-1]] * (size - rows)])
            hidden = self.decoder.embed(padded, self.position)
            if on_layer is not None:
                on_layer(0, hidden[:, :rows])
            for layer in range(self.decoder.num_layers):
                hidden = self.decoder.run_layer(layer, hidden, self.position, self.position)
                self.decoder.kv.lengths[layer] += rows
                if on_layer is not None:
                    on_layer(layer + 1, hidden[:, :rows])
            self.position += rows
            hidden = hidden[:, rows - 1 : rows]
        assert hidden is not None
        if self.exits is not None:
            self.exits.finish(hidden)
        return hidden

    def start(self, ids: Sequence[int]) -> int:
        """Reset, prefill ``ids`` and return the first token of the answer."""
        self.reset()
        return self._argmax(self.decoder.logits(self.prefill(ids)))

    def step(self, token: int) -> Step:
        """Run ``token`` (the one decoded last) and return what follows it."""
        if self.position >= self.decoder.capacity:
            raise EngineError(f"the cache is full at {self.position} tokens: raise max_length")
        began = perf_counter()
        step = self._step(token)
        if self.schedule is not None:
            self.schedule.record(step.exit_layer)
        self.statistics.left_at(step.exit_layer)
        self.statistics.seconds += perf_counter() - began
        return step

    def generate(
        self, ids: Sequence[int], max_new_tokens: int, stop: frozenset[int] = frozenset()
    ) -> Iterator[Step]:
        """Greedy tokens after ``ids``, as they come; a stop token is the last one given.

        When the iterator ends or is closed, no token is pending any more.
        """
        token = self.start(ids)
        step = Step(token, self.decoder.num_layers)
        try:
            for index in range(max_new_tokens):
                yield step
                if step.token in stop or index + 1 == max_new_tokens:
                    return
                step = self.step(step.token)
        finally:
            self.catch_up()

    def follow(self, ids: Sequence[int], answer: Sequence[int]) -> list[Step]:
        """Teacher forcing: what would follow each token of ``answer`` but the last, given it."""
        self.start(ids)
        return [self.step(token) for token in answer[:-1]]

    def catch_up(self) -> None:
        """Run all pending tokens through the layers they have not seen."""
        if not self._waiting:
            return
        began = perf_counter()
        hidden, rows = None, 0
        for layer in range(self._waiting[-1].layer, self.decoder.num_layers):
            hidden, rows = self._join(layer, hidden, rows)
            hidden = self._run(layer, hidden, rows)
        self.statistics.seconds += perf_counter() - began

    def _step(self, token: int) -> Step:
        exits, decoder, last = self.exits, self.decoder, self.decoder.num_layers
        position = self.position
        self.position += 1
        hidden: Tensor = decoder.embed(torch.tensor([[token]]), position)
        rows = 1
        active: frozenset[int] = frozenset()
        draft_layer = -1
        if exits is not None:
            exits.begin(token, position, self.statistics)
            draft_layer = exits.plan.draft_layer
            active = self.schedule.active() if self.schedule else frozenset(exits.thresholds)
            if self.kv_policy == "defer" and self.pending >= self.pending_limit:
                active &= {last}
        for layer in range(last):
            hidden, rows = self._join(layer, hidden, rows)
            hidden = self._run(layer, hidden, rows)
            boundary = layer + 1
            if exits is None or (boundary not in active and boundary != draft_layer):
                continue
            row = hidden[:, rows - 1 : rows]
            if boundary == draft_layer:
                exits.draft_from(row, self.statistics)
            if boundary in active:
                answer = exits.check(boundary, row, self.statistics)
                if answer is not None:
                    self._leave(boundary, hidden[:, :rows])
                    return Step(answer, boundary)
        row = hidden[:, rows - 1 : rows]
        if exits is not None:
            exits.finish(row)
        self.statistics.full_heads += 1
        return Step(self._argmax(decoder.logits(row)), last)

    def _join(self, layer: int, hidden: Tensor | None, rows: int) -> tuple[Tensor, int]:
        """Put the states waiting at ``layer`` before the rows on their way; fill up to a bucket."""
        while self._waiting and self._waiting[-1].layer == layer:
            group = self._waiting.pop()
            carried = [] if hidden is None else [hidden[:, :rows]]
            self.statistics.rows_caught_up += group.hidden.shape[1]
            hidden = torch.cat([group.hidden, *carried], 1)
            rows = hidden.shape[1]
        assert hidden is not None
        size = self.decoder.bucket(rows)
        if hidden.shape[1] != size:
            padding = hidden[:, rows - 1 : rows].expand(-1, size - rows, -1)
            hidden = torch.cat([hidden[:, :rows], padding], 1)
        return hidden, rows

    def _run(self, layer: int, hidden: Tensor, rows: int) -> Tensor:
        lengths = self.decoder.kv.lengths
        slot = lengths[layer]
        position = self.position - 1 if self.kv_policy == "drop" else slot
        lengths[layer] += rows
        return self.decoder.run_layer(layer, hidden, slot, position)

    def _leave(self, layer: int, hidden: Tensor) -> None:
        lengths, last = self.decoder.kv.lengths, self.decoder.num_layers
        if layer == last:
            return
        if self.kv_policy == "defer":
            self._waiting.append(_Waiting(layer, hidden))
        elif self.kv_policy == "propagate":
            for deeper in range(layer, last):
                self.decoder.fill_kv(deeper, hidden, lengths[deeper], lengths[deeper])
                lengths[deeper] += 1

    @staticmethod
    def _argmax(logits: Tensor) -> int:
        token = int(logits[0, -1].argmax())
        if not torch.isfinite(logits[0, -1, token]):
            raise EngineError(
                "the logits are not finite: the weights hold NaN or inf, or the dtype is too narrow"
            )
        return token
