"""Decode with captured steps: several in flight, each token read after the next step's launch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from eepass.errors import EngineError
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Row
from eepass.runtime.engine.sequence import DecodedToken
from eepass.runtime.sampling import GREEDY, Sampling
from eepass.runtime.statistics import Statistics
from eepass.runtime.step import drawing, updates
from eepass.runtime.step.data import Step, StepError
from eepass.runtime.step.host import ResultQueue


class Executor(Protocol):
    """Runs a step; ``synchronisations`` counts how often the host waited inside of one."""

    @property
    def synchronisations(self) -> int: ...

    def step(self) -> None:
        """Launch one step."""

    def close(self) -> None:
        """Free what was captured."""


class StepEngine:
    """Decodes one sequence at a time over ``step``; tokens that exit early are committed at once.

    ``prompt_rows``: prompts run in passes of at least so many rows, padded.
    ``in_flight``: steps launched before the first of them is read. The results of steps launched
    after a stop token are dropped; such a step only catches up pending tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        step: Step,
        executor: Executor,
        results: ResultQueue,
        in_flight: int = 2,
        prompt_rows: int = 0,
    ) -> None:
        self.decoder, self.step, self.executor, self.results = decoder, step, executor, results
        self.in_flight, self.prompt_rows = in_flight, prompt_rows
        self.steps = 0
        self._seconds = 0.0

    def generate(
        self, ids: Sequence[int], max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> Iterator[DecodedToken]:
        """Tokens after ``ids``, up to and including an end token of the step.

        Only a step that was built to draw samples. Raises ``EngineError`` for what does not fit and
        where the device fails.
        """
        ends = frozenset(self.step["stop"].tolist())
        if max_new_tokens < 1:
            return
        with self._sequence(ids, sampling) as first:
            began = perf_counter()
            yield DecodedToken(first, self.decoder.num_layers)
            most = min(max_new_tokens - 1, self.decoder.max_sequence_length - len(ids))
            if first in ends:
                return
            launched = taken = 0
            while taken < most:
                while launched < most and launched - taken < self.in_flight:
                    self._launch()
                    launched += 1
                token = self._take()
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
        """Teacher forcing: the step's tokens after each token of ``answer`` but the last."""
        found = []
        with self._sequence(ids, GREEDY):
            if len(ids) + len(answer) - 1 > self.decoder.max_sequence_length:
                raise EngineError(
                    f"the answer does not fit into the cache: {self.decoder.length_hint}"
                )
            given = torch.tensor(list(answer), device=self.decoder.device)
            for index in range(len(answer) - 1):
                self.step["token"].copy_(given[index : index + 1])
                self.step["stopped"].zero_()
                began = perf_counter()
                self._launch()
                found.append(self._take())
                self._seconds += perf_counter() - began
        return found

    @property
    def statistics(self) -> Statistics:
        """Counts since the last reset, read from the device; times are the host's."""
        num_layers, counts = self.decoder.num_layers, self.step["counters"].tolist()
        layers = counts[: num_layers + 1]
        counted = dict(zip(updates.COUNTED, counts[len(layers) :], strict=True))
        return Statistics(
            num_layers, sum(layers), exit_layers=layers, seconds=self._seconds, **counted
        )

    @statistics.setter
    def statistics(self, fresh: Statistics) -> None:
        if fresh.tokens or fresh.passes:
            raise ValueError("statistics can only be reset: assign fresh ones")
        self.step["counters"].zero_()
        self._seconds = 0.0

    @property
    def draws(self) -> bool:
        """Whether the step can sample."""
        return "layer.head" in self.step.buffers

    def catch_up(self) -> None:
        """Run pending tokens through all layers: keys and values become the dense ones."""
        self.step["stopped"].fill_(True)
        self._launch()
        self.results.clear()

    def close(self) -> None:
        """Free what was captured; the engine cannot be used afterwards."""
        self.executor.close()

    @contextmanager
    def _sequence(self, ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
        kv, room = self.decoder.kv, self.decoder.capacity
        if not ids:
            raise EngineError("the prompt is empty: give at least one token")
        if len(ids) > self.decoder.max_sequence_length:
            raise EngineError(
                f"the prompt has {len(ids)} tokens, the cache room for "
                f"{self.decoder.max_sequence_length}: {self.decoder.length_hint}"
            )
        if not sampling.greedy and not self.draws:
            raise EngineError("this step decodes greedily: build one that draws")
        values = drawing.option_values(sampling)
        # a row's slot is its position, so the sequence begins at slot 0
        if kv.allocate(room) is None:
            raise EngineError("the cache holds another sequence: let it end first")
        try:
            # no torch mode is active at a yield: it would be the caller's as well
            yield self._start(list(ids), values)
            self.catch_up()
        finally:
            self.results.clear()
            kv.release(0)

    def _start(self, ids: list[int], values: Mapping[str, float]) -> int:
        """Run a prompt and sample its first token, which the next step continues from."""
        decoder, step = self.decoder, self.step
        with _failing(), torch.no_grad():
            hidden = self._prefill(ids)
            logits = decoder.logits(hidden)[0]
            best, token = logits.max(-1)
            if self.draws:
                for name, value in values.items():
                    step[name].fill_(value)
                # the last token of the prompt: steps draw at later positions
                position = torch.full_like(token, len(ids) - 1)
                options = {name: step[name] for name in drawing.OPTIONS}
                salt = step["layer.head"]
                drawing.draw(logits, position=position, salt=salt, drawn=token, **options)
            if not torch.isfinite(best):
                raise EngineError(_NOT_FINITE)
            first = int(token)
        step["position"].fill_(len(ids))
        step["stopped"].fill_(bool(torch.isin(token, step["stop"])))
        self._begin(ids, first)
        return first

    def _begin(self, ids: list[int], first: int) -> None:
        """Set the step's own state to the end of a prompt that ``first`` follows."""
        step, layers = self.step, self.decoder.num_layers
        step["token"].fill_(first)
        step["depth"].fill_(layers)
        step["ring"].fill_(updates.NEVER)
        step["ring"][-1] = layers
        # layers compute rows of old tokens too, and their results are dropped
        step["hidden"].zero_()

    def _prefill(self, ids: list[int]) -> Tensor:
        decoder, hidden, start = self.decoder, torch.zeros(0), 0
        while left := len(ids) - start:
            # of one sequence, padding goes where the cache has room for it
            size = decoder.chunk(left, decoder.cache_length - start)
            size = max(size, self.prompt_rows)
            chunk = ids[start : start + size]
            rows = [Row(0, at, at) for at in range(start, start + len(chunk))]
            hidden = decoder.forward(chunk, rows, decoder.cache_length, self._on_layer, size)
            start += len(chunk)
            self._on_chunk(chunk, hidden, len(ids) - start)
        return hidden[:, -1:]

    def _on_layer(self, layer: int, hidden: Tensor) -> None:
        """The hidden state [1, n, H] of a prompt's chunk after so many layers."""

    def _on_chunk(self, chunk: list[int], hidden: Tensor, left: int) -> None:
        """The hidden state [1, n, H] after the last layer of a prompt's ``chunk``; ``left``: how
        many tokens follow."""

    def _launch(self) -> None:
        with _failing(), torch.no_grad():
            self.executor.step()
            self.results.post()
        self.steps += 1

    def _take(self) -> DecodedToken:
        token, layer = self._taken()
        return DecodedToken(token, layer)

    def _taken(self) -> list[int]:
        """The oldest result; ``EngineError`` where it came from logits that are not finite."""
        with _failing():
            found = self.results.take()
        if updates.NOT_FINITE in found:
            raise EngineError(_NOT_FINITE)
        return found


_NOT_FINITE = "the logits are not finite: the weights hold NaN or inf, or the dtype is too narrow"


@contextmanager
def _failing() -> Iterator[None]:
    """Raise a failure of the device as an ``EngineError``."""
    try:
        yield
    except StepError:
        raise
    except RuntimeError as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EngineError(
            f"the device failed while decoding ({first}): this engine cannot go on; configure or "
            "transform again"
        ) from error
