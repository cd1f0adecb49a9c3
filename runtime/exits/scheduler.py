"""Which predictors run for the next token (T2 of SpecEE, arXiv 2504.08850, section 5)."""

from collections import deque
from collections.abc import Sequence

from eepass.exit_rule import SCHEDULE_RADIUS, SCHEDULE_WINDOW

# exit layers kept, more than the window: the last ones may be rolled back
HISTORY = SCHEDULE_WINDOW + 64


class PredictorSchedule:
    """Active exit layers: the most frequent ones, and those near the last exit layers.

    ``ranking`` lists all exit layers, most frequent first; its first ``always`` are active for
    every token. A token that went through all layers counts as an exit at ``num_layers``. One
    schedule serves one sequence, in bounded memory.
    """

    def __init__(self, ranking: Sequence[int], always: int) -> None:
        self.ranking, self.always = tuple(ranking), always
        self.exits = sorted(ranking)
        self.fixed = frozenset(ranking[:always])
        self.recent: deque[int] = deque(maxlen=HISTORY)

    def fresh(self) -> "PredictorSchedule":
        """The same schedule for another sequence."""
        return PredictorSchedule(self.ranking, self.always)

    def active(self) -> frozenset[int]:
        """Like ``exit_rule.near_last_exits``, on the host."""
        last = list(self.recent)[-SCHEDULE_WINDOW:]
        if not last:
            return frozenset(self.exits)
        return self.fixed | {
            layer
            for layer in self.exits
            if any(abs(layer - exit_layer) <= SCHEDULE_RADIUS for exit_layer in last)
        }

    def record(self, exit_layer: int) -> None:
        self.recent.append(exit_layer)

    def forget(self, tokens: int) -> None:
        """Remove the last ``tokens`` records."""
        for _ in range(min(tokens, len(self.recent))):
            self.recent.pop()
