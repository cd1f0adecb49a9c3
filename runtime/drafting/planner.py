"""Choose what pays: how large a tree, and whether to draft, to exit early, both or neither.

The costs of passes are measured when the engine starts and corrected by its own passes; how often
draft tokens are accepted, and what each way of decoding yields, is tracked while it runs. Nothing
here changes the tokens of exact decoding.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from eepass.runtime.decoder.costs import PassCosts
from eepass.runtime.drafting.tree import Tree

Mode = Literal["dense", "exits", "speculation", "both"]

# A draft token's *chance* is the probability that it is accepted if its parent is. Draft tokens are
# sorted into bins (source, depth, what the source estimates), and a bin's chance is learned. The
# edges of the bins of a source's own estimates:
CHANCE_EDGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96)
# an estimate counts like so many observations; older observations fade
PRIOR_WEIGHT, FADE = 20.0, 0.999
# usual chances of the likeliest draft tokens below an accepted one, before a source has named them
CHILD_CHANCES = (0.5, 0.13, 0.06)

# passes for which a mode is tried, and passes between two trials of one that is slower
TRIAL, PATIENCE = 4, 64
# passes that the expectation at start counts for, and the weight of the newest pass
EXPECTED, NEWEST = 8, 0.04
# expected cost of exits and their predictors, without and with drafts
EXITS_COST, BOTH_COST = 1.02, 1.03
# expected loss of either for each other sequence in the pass
CROWD_COST = 1 / 32


@dataclass(slots=True)
class Budget:
    """What a draft may spend on one tree: ``most`` draft tokens, as long as another row of the pass
    or another call of the draft's model is worth its time."""

    planner: Planner
    most: int

    @staticmethod
    def bin(chance: float) -> int:
        return bisect(CHANCE_EDGES, chance)

    def chance(self, bin: tuple[int, ...], prior: float) -> float:
        accepted, verified = self.planner.observed.get(bin, (0.0, 0.0))
        return min((accepted + PRIOR_WEIGHT * prior) / (verified + PRIOR_WEIGHT), 0.99)

    def worth_a_call(self, joint: Sequence[float], level: Sequence[float]) -> bool:
        """Whether to run the draft's model once more.

        ``joint``: probabilities of the tree's draft tokens to be accepted; ``level``: of those that
        the model would be run for. Their children replace the least likely rows of the pass.
        """
        rows = min(self.most, max(self.planner.costs) - 1)
        children = [chance * share for chance in level for share in CHILD_CHANCES]
        without = sum(sorted(joint, reverse=True)[:rows])
        gain = sum(sorted([*joint, *children], reverse=True)[:rows]) - without
        return gain * self.planner.token_seconds > self.planner.draft_seconds

    def worth_a_row(self, joint: float) -> bool:
        return joint * self.planner.token_seconds > self.planner.row_seconds


@dataclass(slots=True)
class ModeRecord:
    """Seconds and tokens of the passes in one mode, older passes fading; ``last`` is the number of
    the newest one."""

    seconds: float = 0.0
    tokens: float = 0.0
    passes: int = 0
    last: int = 0

    def add(self, seconds: float, tokens: float, number: int) -> None:
        self.seconds = self.seconds * (1 - NEWEST) + seconds
        self.tokens = self.tokens * (1 - NEWEST) + tokens
        self.passes += 1
        self.last = number

    @property
    def per_token(self) -> float:
        return self.seconds / self.tokens if self.tokens else 0.0


@dataclass(slots=True)
class Planner:
    """``costs[R]``: seconds of a whole pass over R rows, LM head included; ``draft_seconds``: of
    one call of the draft's model; ``draft_tokens``: expected tokens of a pass with drafts;
    ``modes``: the ways of decoding that are allowed, the plainest first."""

    costs: dict[int, float]
    draft_seconds: float = 0.0
    draft_tokens: float = 1.0
    modes: tuple[Mode, ...] = ("dense",)
    # by bin, how many draft tokens were accepted and how many verified
    observed: dict[tuple[int, ...], tuple[float, float]] = field(default_factory=dict)
    # by the number of sequences decoded together
    records: dict[int, dict[Mode, ModeRecord]] = field(default_factory=dict)
    passes: int = 0
    # the number of sequences and the mode on trial, and the pass it began with
    _trial: tuple[int, Mode] | None = None
    _trial_start: int = 0

    def __post_init__(self) -> None:
        # its own: several planners may start from one measurement
        self.costs = PassCosts(self.costs)

    @property
    def token_seconds(self) -> float:
        """Seconds of a token in the fastest mode seen so far."""
        records = (record for modes in self.records.values() for record in modes.values())
        return min([self.costs[1], *(r.per_token for r in records if r.passes)])

    @property
    def row_seconds(self) -> float:
        """Seconds of one more row in a pass of several."""
        few, many = min(self.costs), max(self.costs)
        return max(self.costs[many] - self.costs[few], 0.0) / max(many - few, 1)

    def mode(self, batch: int = 1) -> Mode:
        """The mode of the next pass over ``batch`` sequences."""
        # as many sequences as a tree has rows leave none for draft tokens, and trials are expensive
        if len(self.modes) == 1 or batch >= max(self.costs):
            return self.modes[0]
        records = self._records(batch)
        if self._trial is not None and self._trial[0] == batch:
            if self.passes - self._trial_start < TRIAL:
                return self._trial[1]
            self._trial = None
        best = self.best(batch)
        for mode in self.modes:
            record = records[mode]
            slower = record.per_token / max(records[best].per_token, 1e-9)
            # the slower, the rarer its trials
            patience = PATIENCE * min(max(1.0, slower), 1.25) ** 8
            if mode != best and self.passes - record.last > patience:
                self._trial, self._trial_start = (batch, mode), self.passes
                return mode
        return best

    def best(self, batch: int = 1) -> Mode:
        """The mode with the least time per token; the plainest where the difference is noise."""
        records = self._records(batch)
        best = min(self.modes, key=lambda mode: records[mode].per_token)
        better = records[best].per_token < 0.985 * records[self.modes[0]].per_token
        return best if better else self.modes[0]

    def observe(self, rows: int, seconds: float) -> None:
        """A pass of ``rows`` through all layers and the LM head, and nothing else, took so long."""
        assert isinstance(self.costs, PassCosts)
        if rows <= max(self.costs):
            # padded to a row count there is code for
            self.costs.observe(min(size for size in self.costs if size >= rows), seconds)

    def record(self, mode: Mode, rows: int, seconds: float, tokens: int, batch: int = 1) -> None:
        """A pass in ``mode`` over ``rows`` of ``batch`` sequences gave ``tokens``."""
        self.passes += 1
        # a machine that was busy with something else says nothing about the mode
        usual = self._cost(rows) * max(1.0, rows / max(self.costs)) + 8 * self.draft_seconds
        self._records(batch)[mode].add(min(seconds, 2 * usual), tokens, self.passes)

    def choose(self, tree: Tree, most: int, pending: int = 0, others: int = 0) -> Tree:
        """The part of ``tree``, at most ``most`` draft tokens, that gives most tokens a second.

        ``pending``: rows of pending tokens that may go along; ``others``: other sequences in the
        pass.
        """
        joint = tree.joint()
        order = sorted(range(1, len(tree)), key=lambda node: -joint[node])
        rows, tokens = 1 + pending + others, 1.0 + others
        best, best_rate = 0, tokens / self._cost(rows)
        for count, node in enumerate(order, 1):
            if count > most or rows + count > max(self.costs):
                break
            tokens += joint[node]
            rate = tokens / self._cost(rows + count)
            if rate > best_rate:
                best, best_rate = count, rate
        return tree.keep(order[:best])

    def learn(self, tree: Tree, path: list[int]) -> None:
        """The nodes of ``path`` were accepted, other children of theirs rejected."""
        accepted = set(path)
        for node in range(1, len(tree)):
            bin = tree.bins[node]
            if bin is not None and tree.parents[node] in accepted:
                hits, verified = self.observed.get(bin, (0.0, 0.0))
                self.observed[bin] = (hits * FADE + (node in accepted), verified * FADE + 1)

    def _cost(self, rows: int) -> float:
        return self.costs[
            next((size for size in sorted(self.costs) if size >= rows), max(self.costs))
        ]

    def _records(self, batch: int) -> dict[Mode, ModeRecord]:
        if batch not in self.records:
            plain = self._cost(batch) * max(1.0, batch / max(self.costs))
            drafted = max(self.costs.values()) + 2.5 * self.draft_seconds
            expected = {
                "dense": ModeRecord(plain, batch),
                "exits": ModeRecord(plain * EXITS_COST, batch),
                "speculation": ModeRecord(drafted, batch * self.draft_tokens),
                "both": ModeRecord(drafted * BOTH_COST, batch * self.draft_tokens),
            }
            if batch > 1:
                # other sequences fill the rows that one's draft tokens would have
                crowd = plain * (1 + CROWD_COST * batch)
                expected["exits"] = ModeRecord(crowd, batch)
                expected["speculation"] = ModeRecord(crowd * BOTH_COST, batch)
                expected["both"] = ModeRecord(crowd * BOTH_COST**2, batch)
            for record in expected.values():
                record.seconds, record.tokens = record.seconds * EXPECTED, record.tokens * EXPECTED
                record.last = self.passes
            self.records[batch] = {mode: expected[mode] for mode in self.modes}
        return self.records[batch]

    def decision(self, batch: int = 1) -> Mapping[str, object]:
        """The mode in use and the figures it was chosen by, in milliseconds."""
        used = {mode: record for mode, record in self._records(batch).items() if record.passes}
        trials = sum(trials for _, trials in self.observed.values())
        hits = sum(hits for hits, _ in self.observed.values())
        return {
            "mode": self.best(batch),
            "modes": list(self.modes),
            "ms_per_token": {mode: round(1e3 * r.per_token, 2) for mode, r in used.items()},
            "passes": {mode: r.passes for mode, r in used.items()},
            "pass_ms": {rows: round(1e3 * cost, 2) for rows, cost in self.costs.items()},
            "draft_ms": round(1e3 * self.draft_seconds, 2),
            "draft_hit_rate": round(hits / trials, 3) if trials else None,
        }
