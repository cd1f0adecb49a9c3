"""Decode with speculative steps: several tokens a pass, read by the host a pass behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from eepass.errors import EngineError
from eepass.runtime.engine.sequence import DecodedToken
from eepass.runtime.sampling import GREEDY, Sampling
from eepass.runtime.statistics import Statistics
from eepass.runtime.step.engine import StepEngine
from eepass.runtime.step.head_drafts import HeadDrafts


class SpeculativeEngine(StepEngine):
    """Decodes one sequence at a time over a speculative step: the tokens that would come one by
    one, in fewer passes.

    The device knows where the answer ends: steps in flight beyond it change nothing. ``head``: the
    draft head whose levels are part of the step.
    """

    def __init__(self, *parts: Any, head: HeadDrafts | None = None, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.head = head
        # of a prompt's chunk, by number of layers
        self._features: dict[int, Tensor] = {}

    def generate(
        self, ids: Sequence[int], max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> Iterator[DecodedToken]:
        ends, layers = frozenset(self.step["stop"].tolist()), self.decoder.num_layers
        if max_new_tokens < 1:
            return
        with self._sequence(ids, sampling) as first:
            began = perf_counter()
            yield DecodedToken(first, layers)
            most = min(max_new_tokens - 1, self.decoder.max_sequence_length - len(ids))
            if first in ends:
                return
            # what is confirmed and not yet asked for
            tokens, taken, in_flight = deque[DecodedToken](), 0, 0
            self.step["limit"].fill_(len(ids) + most)
            while taken < most:
                while not tokens:
                    while in_flight < self.in_flight:
                        self._launch()
                        in_flight += 1
                    tokens.extend(self._pass())
                    in_flight -= 1
                token = tokens.popleft()
                taken += 1
                self._seconds += perf_counter() - began
                yield token
                began = perf_counter()
                if token.token in ends:
                    return
            if taken + 1 < max_new_tokens:
                raise EngineError(
                    f"the cache is full at {len(ids) + taken} tokens: {self.decoder.length_hint}"
                )

    def follow(self, ids: Sequence[int], answer: Sequence[int]) -> list[DecodedToken]:
        found, history = list[DecodedToken](), self.step["history"]
        with self._sequence(ids, GREEDY):
            if len(ids) + len(answer) - 1 > self.decoder.max_sequence_length:
                raise EngineError(
                    f"the answer does not fit into the cache: {self.decoder.length_hint}"
                )
            end = len(ids) + len(answer)
            history[len(ids) : end].copy_(torch.tensor(list(answer), device=history.device))
            for position in range(len(ids), end - 1):
                self.step["position"].fill_(position)
                # one token a pass
                self.step["limit"].fill_(position + 1)
                self.step["stopped"].zero_()
                began, kept = perf_counter(), history[position + 1].clone()
                while len(found) <= position - len(ids):
                    # a pass that guesses has none yet
                    self._launch()
                    found += self._pass()
                history[position + 1].copy_(kept)
                self._seconds += perf_counter() - began
        return found

    def _pass(self) -> list[DecodedToken]:
        """The tokens of the oldest pass."""
        number, *found = self._taken()
        return [DecodedToken(token, self.decoder.num_layers) for token in found[:number]]

    @property
    def statistics(self) -> Statistics:
        """Counts since the last reset, read from the device; times are the host's."""
        layers = self.decoder.num_layers
        passes, tokens = self.step["counters"].tolist()
        exits = [*[0] * layers, tokens]
        rows = passes * self.step["ids"].numel()
        return Statistics(
            layers, tokens, passes, exit_layers=exits, full_heads=rows, seconds=self._seconds
        )

    @statistics.setter
    def statistics(self, fresh: Statistics) -> None:
        StepEngine.statistics.fset(self, fresh)  # type: ignore[attr-defined]

    def catch_up(self) -> None:
        """Nothing is pending; results of steps beyond the end are dropped."""
        self.results.clear()

    def _begin(self, ids: list[int], first: int) -> None:
        history = self.step["history"]
        text = torch.tensor([*ids, first], device=history.device)
        history[: len(text)].copy_(text)
        self.step["limit"].fill_(self.decoder.max_sequence_length)
        if self.head is not None:
            self.step["confirmed"].fill_(first)
            self.step["first confirmed"].fill_(len(ids))
            self.step["number confirmed"].fill_(1)

    def _prefill(self, ids: list[int]) -> Tensor:
        if self.head is not None:
            self.head.begin()
        return super()._prefill(ids)

    def _on_layer(self, layer: int, hidden: Tensor) -> None:
        if self.head is not None and layer in self.head.layers:
            self._features[layer] = hidden[0]

    def _on_chunk(self, chunk: list[int], hidden: Tensor, left: int) -> None:
        if self.head is None:
            return
        features = torch.cat([hidden[0], *(self._features[n] for n in self.head.layers)], -1)
        with torch.device(self.step["history"].device):
            last = self.head.follow(chunk, features, left)
        self.step["confirmed features"][:1].copy_(last)
        self._features.clear()
