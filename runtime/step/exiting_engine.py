"""Decode with speculative steps that exit."""

from __future__ import annotations

from eepass.runtime.engine.sequence import DecodedToken
from eepass.runtime.statistics import Statistics
from eepass.runtime.step import exiting, updates
from eepass.runtime.step.engine import StepEngine
from eepass.runtime.step.speculative_engine import SpeculativeEngine


class ExitingEngine(SpeculativeEngine):
    """Decodes one sequence at a time over a speculative step with exits.

    What a step has guessed comes when a later one has confirmed it. Tokens pending at the end of a
    sequence are dropped with it: the next one has the cache from its beginning.
    """

    def _pass(self) -> list[DecodedToken]:
        number, *found, layer = self._taken()
        return [DecodedToken(token, layer) for token in found[:number]]

    @property
    def statistics(self) -> Statistics:
        """Counts since the last reset, read from the device; times are the host's."""
        num_layers, counts = self.decoder.num_layers, self.step["counters"].tolist()
        layers = counts[: num_layers + 1]
        counted = dict(zip(exiting.COUNTED, counts[len(layers) :], strict=True))
        return Statistics(
            num_layers, sum(layers), exit_layers=layers, seconds=self._seconds, **counted
        )

    @statistics.setter
    def statistics(self, fresh: Statistics) -> None:
        StepEngine.statistics.fset(self, fresh)  # type: ignore[attr-defined]

    def _begin(self, ids: list[int], first: int) -> None:
        super()._begin(ids, first)
        self.step["pending"].zero_()
        self.step["ring"].fill_(updates.NEVER)
        self.step["ring"][-1] = self.decoder.num_layers
