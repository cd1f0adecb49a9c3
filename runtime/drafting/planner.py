"""What pays: how large a tree, and whether to leave early, to speculate, to do both or neither.

Costs of passes are measured when the engine starts; the chances of drafts and what each way of
decoding yields are followed while it runs. Nothing here changes what is said in exact mode.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from eepass.runtime.drafting.tree import Tree

Mode = Literal["dense", "exits", "speculation", "both"]
EDGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96)
# chances of the likeliest drafts after one that is right, on the whole
FOLLOWERS = (0.5, 0.13, 0.06)
# an estimate counts as so many observations; older ones fade
PRIOR, FADE = 20.0, 0.999
# passes a way of decoding is tried for, and passes between two tries of one that lags behind
TRY, PATIENCE = 4, 64
# passes that the expectation at start counts for, and what a pass of the newest is worth
EXPECTED, NEWEST = 8, 0.04
# what exits and their checks are expected to cost, by themselves and with drafts
EXITS_COST, BOTH_COST = 1.02, 1.03
# and what either is expected to lose for each other sequence in the pass
CROWD_COST = 1 / 32


@dataclass(slots=True)
class Budget:
    """What a draft may ask while it builds a tree: ``most`` nodes, and what a guess is worth."""

    planner: Planner
    most: int

    @staticmethod
    def bin(chance: float) -> int:
        return bisect(EDGES, chance)

    def chance(self, bin: tuple[int, ...], prior: float) -> float:
        hits, trials = self.planner.seen.get(bin, (0.0, 0.0))
        return min((hits + PRIOR * prior) / (trials + PRIOR), 0.99)

    def worth_a_call(self, joint: Sequence[float], level: Sequence[float]) -> bool:
        """Whether to run the draft once more.

        ``joint``: the chances of the drafts there are to be right, ``level`` of those it would be
        run for. What follows them takes the place of the least likely in the pass.
        """
        rows = min(self.most, max(self.planner.costs) - 1)
        hoped = [chance * share for chance in level for share in FOLLOWERS]
        now = sum(sorted(joint, reverse=True)[:rows])
        then = sum(sorted([*joint, *hoped], reverse=True)[:rows])
        return (then - now) * self.planner.token_seconds > self.planner.draft_seconds

    def worth_a_row(self, joint: float) -> bool:
        return joint * self.planner.token_seconds > self.planner.row_seconds


@dataclass(slots=True)
class Arm:
    """Seconds and tokens of one way of decoding, older ones fading."""

    seconds: float = 0.0
    tokens: float = 0.0
    passes: int = 0
    last: int = 0

    def add(self, seconds: float, tokens: float, now: int) -> None:
        self.seconds = self.seconds * (1 - NEWEST) + seconds
        self.tokens = self.tokens * (1 - NEWEST) + tokens
        self.passes += 1
        self.last = now

    @property
    def per_token(self) -> float:
        return self.seconds / self.tokens if self.tokens else 0.0


@dataclass(slots=True)
class Planner:
    """``costs[R]``: seconds of a whole pass over R rows, head included; ``draft_seconds``: of one
    call of the draft; ``draft_tokens``: what a pass with drafts is expected to give. ``modes``: the
    ways of decoding that are allowed, the plainest first."""

    costs: dict[int, float]
    draft_seconds: float = 0.0
    draft_tokens: float = 1.0
    modes: tuple[Mode, ...] = ("dense",)
    seen: dict[tuple[int, ...], tuple[float, float]] = field(default_factory=dict)
    # by the number of sequences decoded together
    arms: dict[int, dict[Mode, Arm]] = field(default_factory=dict)
    passes: int = 0
    # batch and way being tried, and since which pass
    _trying: tuple[int, Mode] | None = None
    _since: int = 0

    @property
    def token_seconds(self) -> float:
        """What a token costs at best, as far as known."""
        known = [a.per_token for arms in self.arms.values() for a in arms.values() if a.passes]
        return min([self.costs[1], *known])

    @property
    def row_seconds(self) -> float:
        """What one more row costs in a pass of several."""
        few, many = min(self.costs), max(self.costs)
        return max(self.costs[many] - self.costs[few], 0.0) / max(many - few, 1)

    def mode(self, batch: int = 1) -> Mode:
        """How the next pass over ``batch`` sequences is to be made."""
        # as many sequences as a tree has rows leave nothing for drafts, and trying is dear
        if len(self.modes) == 1 or batch >= max(self.costs):
            return self.modes[0]
        arms = self._arms(batch)
        if self._trying is not None and self._trying[0] == batch:
            if self.passes - self._since < TRY:
                return self._trying[1]
            self._trying = None
        best = self.best(batch)
        for mode in self.modes:
            arm = arms[mode]
            behind = arm.per_token / max(arms[best].per_token, 1e-9)
            # the further behind, the rarer it gets another try
            patience = PATIENCE * min(max(1.0, behind), 1.25) ** 8
            if mode != best and self.passes - arm.last > patience:
                self._trying, self._since = (batch, mode), self.passes
                return mode
        return best

    def best(self, batch: int = 1) -> Mode:
        """The way that gives tokens fastest; a plainer one where the difference is noise."""
        arms = self._arms(batch)
        best = min(self.modes, key=lambda mode: arms[mode].per_token)
        better = arms[best].per_token < 0.985 * arms[self.modes[0]].per_token
        return best if better else self.modes[0]

    def record(self, mode: Mode, rows: int, seconds: float, tokens: int, batch: int = 1) -> None:
        """A pass in ``mode`` over ``rows`` of ``batch`` sequences gave ``tokens``."""
        self.passes += 1
        # a machine that was busy elsewhere says nothing about the way of decoding
        usual = self._cost(rows) * max(1.0, rows / max(self.costs)) + 8 * self.draft_seconds
        self._arms(batch)[mode].add(min(seconds, 2 * usual), tokens, self.passes)

    def choose(self, tree: Tree, most: int, waiting: int = 0, beside: int = 0) -> Tree:
        """The part of ``tree`` that gives most tokens a second, at most ``most`` drafts.

        ``waiting``: rows that may go along; ``beside``: other sequences in the pass.
        """
        joint = tree.joint()
        order = sorted(range(1, len(tree)), key=lambda node: -joint[node])
        rows, gain = 1 + waiting + beside, 1.0 + beside
        best, best_rate = 0, gain / self._cost(rows)
        for count, node in enumerate(order, 1):
            if count > most or rows + count > max(self.costs):
                break
            gain += joint[node]
            rate = gain / self._cost(rows + count)
            if rate > best_rate:
                best, best_rate = count, rate
        return tree.keep(order[:best])

    def learn(self, tree: Tree, path: list[int]) -> None:
        """Drafts after the nodes of ``path`` were seen to be right or wrong."""
        on_path = set(path)
        for node in range(1, len(tree)):
            bin = tree.bins[node]
            if bin is not None and tree.parents[node] in on_path:
                hits, trials = self.seen.get(bin, (0.0, 0.0))
                self.seen[bin] = (hits * FADE + (node in on_path), trials * FADE + 1)

    def _cost(self, rows: int) -> float:
        return self.costs[
            next((size for size in sorted(self.costs) if size >= rows), max(self.costs))
        ]

    def _arms(self, batch: int) -> dict[Mode, Arm]:
        if batch not in self.arms:
            plain = self._cost(batch) * max(1.0, batch / max(self.costs))
            drafted = max(self.costs.values()) + 2.5 * self.draft_seconds
            expected = {
                "dense": Arm(plain, batch),
                "exits": Arm(plain * EXITS_COST, batch),
                "speculation": Arm(drafted, batch * self.draft_tokens),
                "both": Arm(drafted * BOTH_COST, batch * self.draft_tokens),
            }
            if batch > 1:
                # others fill the rows that drafts of one would have
                crowd = plain * (1 + CROWD_COST * batch)
                expected["exits"] = Arm(crowd, batch)
                expected["speculation"] = Arm(crowd * BOTH_COST, batch)
                expected["both"] = Arm(crowd * BOTH_COST**2, batch)
            for arm in expected.values():
                arm.seconds, arm.tokens = arm.seconds * EXPECTED, arm.tokens * EXPECTED
                arm.last = self.passes
            self.arms[batch] = {mode: expected[mode] for mode in self.modes}
        return self.arms[batch]

    def decision(self, batch: int = 1) -> Mapping[str, object]:
        """The way of decoding in use and the figures it was chosen by, in milliseconds."""
        used = {mode: arm for mode, arm in self._arms(batch).items() if arm.passes}
        trials = sum(trials for _, trials in self.seen.values())
        hits = sum(hits for hits, _ in self.seen.values())
        return {
            "mode": self.best(batch),
            "modes": list(self.modes),
            "ms_per_token": {mode: round(1e3 * arm.per_token, 2) for mode, arm in used.items()},
            "passes": {mode: arm.passes for mode, arm in used.items()},
            "pass_ms": {rows: round(1e3 * cost, 2) for rows, cost in self.costs.items()},
            "draft_ms": round(1e3 * self.draft_seconds, 2),
            "draft_hit_rate": round(hits / trials, 3) if trials else None,
        }
