"""Measurements: seconds of a pass by row count, and how far logits differ between row counts.

A machine that does something else at the moment makes a measurement longer, never shorter: the
least of several counts, and what is measured later corrects it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from time import perf_counter

from torch import Tensor

from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Row

Clock = Callable[[], float]
ROUNDS = 7
# The cost of a row count is the least of so many of its passes: fewer follow a change faster, more
# see through a machine that is busy for longer. Beside the newest, none is older than AGE passes.
RECENT, AGE = 4, 16
# how many tokens the noise is measured on, and how far above the largest difference it is set
SAMPLE, MARGIN = 8, 2.0


class PassCosts(dict[int, float]):
    """Seconds of a whole pass by row count: measured at the start, then the least seen lately.

    A row count that was not run lately is taken to have changed as the nearest one that was. A
    smaller one is not taken to cost more, however: trying it shows it, and hardly costs anything.
    """

    def __init__(self, start: Mapping[int, float]) -> None:
        super().__init__(start)
        self._passes = 0
        # what was known at the last pass, and until which one that holds as long as no cost changes
        self._known: dict[int, float] = {}
        self._known_until = 0
        # what follows from the costs, until they change
        self._ordered: list[tuple[int, float]] | None = None
        self._row_seconds = 0.0
        # by row count: its last passes with their numbers
        self._seen: dict[int, deque[tuple[int, float]]] = {}
        # by row count: the costs that were known when its own was, that is, at its last pass
        self._then = {rows: dict(start) for rows in start}

    def observe(self, rows: int, seconds: float) -> None:
        """A pass over ``rows``, one of the row counts, took so long."""
        self._passes += 1
        # what was measured at the start counts like a first pass
        if rows not in self._seen:
            self._seen[rows] = deque([(self._passes, self[rows])], RECENT)
        seen = self._seen[rows]
        seen.append((self._passes, seconds))
        cost = min(cost for number, cost in seen if self._passes - number < AGE)
        if cost == self._known.get(rows) and self._passes < self._known_until:
            # as mostly: nothing follows that did not before
            self._then[rows] = self._known
            return
        self[rows] = cost
        known = {size: self[size] for size in self._seen if self._is_known(size)}
        self._then[rows] = known
        self._known, self._ordered = known, None
        self._known_until = AGE + min(self._seen[size][-1][0] for size in known)
        for other in self.keys() - known.keys():
            then = self._then[other]
            if both := then.keys() & known.keys():
                near = min(both, key=lambda size: abs(size - other))
                scaled = then[other] * known[near] / then[near]
                lasts = other < near and other in self._seen
                self[other] = min(then[other], scaled) if lasts else scaled
            # more rows never cost less
            least = max((cost for size, cost in known.items() if size < other), default=0.0)
            most = min((cost for size, cost in known.items() if size > other), default=float("inf"))
            self[other] = min(max(self[other], least), most)

    @property
    def ordered(self) -> list[tuple[int, float]]:
        """The row counts, ascending, and what a pass of so many rows costs: never more than one of
        more rows."""
        if self._ordered is None:
            least, found = float("inf"), []
            for rows in sorted(self, reverse=True):
                least = min(least, self[rows])
                found.append((rows, least))
            self._ordered = found[::-1]
            costs = pairwise(self._ordered)
            slopes = [(more - less) / (many - few) for (few, less), (many, more) in costs]
            self._row_seconds = min(slopes, default=0.0)
        return self._ordered

    @property
    def row_seconds(self) -> float:
        """Least seconds that one more row of a pass takes."""
        return self._row_seconds if self.ordered else 0.0

    def size(self, rows: int) -> int:
        """The smallest row count there is for ``rows``, one of which there is."""
        return next(size for size, _ in self.ordered if size >= rows)

    def of(self, rows: int) -> float:
        """Seconds of a pass over ``rows``; of the largest, where it is of more."""
        for size, cost in self.ordered:
            if size >= rows:
                return cost
        return self.ordered[-1][1]

    def _is_known(self, rows: int) -> bool:
        return self._passes - self._seen[rows][-1][0] < AGE


def pass_seconds(
    decoder: Decoder, row_counts: Sequence[int], at: int, clock: Clock = perf_counter
) -> dict[int, float]:
    """Least seconds of a whole pass, LM head included, by row count, after ``at`` tokens."""
    # all of them first: loops of one are built while the next is lowered
    for rows in decoder.buckets:
        decoder.prepare(rows)
    for rows in row_counts:
        decoder.prepare_head(rows)
    passes = {}
    for rows in row_counts:
        at = min(at, decoder.capacity - rows)
        line = [Row(0, slot, slot) for slot in range(at, at + rows)]
        passes[rows] = partial(_logits, decoder, line, [5] * rows)
    return least_seconds(passes, clock)


def seconds_of(work: Callable[[], object], clock: Clock = perf_counter) -> float:
    """Least seconds of ``work``."""
    return least_seconds({0: work}, clock)[0]


def least_seconds(
    works: Mapping[int, Callable[[], object]], clock: Clock = perf_counter
) -> dict[int, float]:
    """Least seconds of each of ``works``, in rounds over all of them: a disturbance hits a few
    rounds of all rather than all rounds of one."""
    for work in works.values():
        work()
    least = dict.fromkeys(works, float("inf"))
    for _ in range(ROUNDS):
        for name, work in works.items():
            began = clock()
            work()
            least[name] = min(least[name], clock() - began)
    return least


def logit_noise(decoder: Decoder) -> float:
    """How far the gap between the two best logits may differ between row counts.

    Runs a few tokens one by one and again as one path of a tree, with gaps between its slots. Zero
    where the kernels sum a row in the same order whatever its slot and the row count.
    """
    tokens = [(7 + 13 * index) % 97 for index in range(2 * SAMPLE)]
    alone = [_logits(decoder, [Row(0, at, at)], [token])[0] for at, token in enumerate(tokens)]
    slots = [SAMPLE + 2 * index for index in range(SAMPLE)]
    rows = [
        Row(0, SAMPLE + index, slots[index], tuple(slots[: index + 1])) for index in range(SAMPLE)
    ]
    together = _logits(decoder, rows, tokens[SAMPLE:])
    worst = 0.0
    for one, other in zip(alone[SAMPLE:], together, strict=True):
        best = one.topk(2).indices
        gap, other_gap = one[best].diff(), other[best].diff()
        worst = max(worst, float((gap - other_gap).abs()))
    return MARGIN * worst


def _logits(decoder: Decoder, rows: list[Row], tokens: list[int]) -> Tensor:
    """Logits [n, V] of ``tokens`` run at ``rows``."""
    hidden = decoder.forward(tokens, rows, decoder.cache_length)
    return decoder.logits(hidden)[0].clone()
