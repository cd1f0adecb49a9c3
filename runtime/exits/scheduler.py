"""Which predictors run for the next token (T2 of SpecEE, arXiv 2504.08850, 5)."""

from collections import deque
from collections.abc import Sequence

WINDOW = 5
RADIUS = 2
# guesses that may be taken back
REMEMBERED = WINDOW + 64


class PredictorSchedule:
    """Active exit layers: the ones tokens leave at most, and those near the last exits.

    ``ranking`` lists all exit layers, most frequent first; its first ``always`` are active for
    every token. A token that went all the way counts as leaving at ``num_layers``. One schedule
    serves one sequence; what it holds is bounded.
    """

    def __init__(self, ranking: Sequence[int], always: int) -> None:
        self.ranking, self.always = tuple(ranking), always
        self.exits = sorted(ranking)
        self.fixed = frozenset(ranking[:always])
        self.recent: deque[int] = deque(maxlen=REMEMBERED)

    def fresh(self) -> "PredictorSchedule":
        """The same schedule for another sequence."""
        return PredictorSchedule(self.ranking, self.always)

    def active(self) -> frozenset[int]:
        last = list(self.recent)[-WINDOW:]
        near = {
            layer
            for layer in self.exits
            if any(abs(layer - exit_layer) <= RADIUS for exit_layer in last)
        }
        return self.fixed | near if last else frozenset(self.exits)

    def record(self, exit_layer: int) -> None:
        self.recent.append(exit_layer)

    def forget(self, tokens: int) -> None:
        """Take back the last ``tokens`` records."""
        for _ in range(min(tokens, len(self.recent))):
            self.recent.pop()

    def reset(self) -> None:
        self.recent.clear()
