"""Choose what pays: how large a tree, whether to run the draft's model, whether to exit early.

What a pass over some rows costs shows in any way of decoding, and whether a draft token was right
shows whether or not it was run. So everything is estimated from its parts, and one rule decides:
what is done has to bring tokens that would take longer otherwise (`gain`). What does not pay now is
tried again, the rarer the more a try costs (`due`). Nothing here changes the tokens of exact
decoding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from time import perf_counter
from typing import Literal

from eepass.runtime.decoder.costs import RECENT, PassCosts
from eepass.runtime.drafting.acceptance import Acceptance
from eepass.runtime.drafting.tree import Tree

Mode = Literal["dense", "exits", "speculation", "both"]

# passes between two tries of what costs in vain as much as it would gain with each pass
PATIENCE = 48
# weight of the newest pass in an average over passes
NEWEST = 0.1
# What the draft's model gains is learned by what the tree there is without it gains (edges in dense
# passes). What it would gain if it were right again, in dense passes.
TREE_EDGES, ASK_HOPE = (0.05, 0.4, 1.0), 0.5
# What larger passes would gain, of their draft tokens' worth, and smaller ones, in dense passes:
# costs change rarely
ROWS_HOPE, FEWER_HOPE = 0.25, 0.05
# of the draft tokens of several sequences, the share that is right at most; what looking for them
# would gain at a time when they pay, in dense passes
HOPE_OF_ALL, LOOK_HOPE = 0.7, 0.1
# passes with exits in a row, since one rolls back what others decided; what each would gain at a
# time when exits pay, in dense passes
TRIAL, EXITS_HOPE = 2, 0.03
# a change of costs that says that what is known of exits is out of date; the loss that a pass
# without exits stands for while they pay, in dense passes
JUMP, REFRESH = 1.5, 0.5
# Draft tokens are chosen because their chances look high, so that they are right less often than
# estimated: what passes brought for what was expected, with what an estimate counts for (in draft
# tokens) and how fast older passes fade
TRUST, HITS_FADE = 8.0, 0.98
# by which an average is divided at least
LEAST_BROUGHT = 0.1


@dataclass(slots=True)
class Average:
    """What passes took for what they brought, newer ones counting more; ``last``: the number of the
    newest one."""

    took: float
    brought: float = 1.0
    passes: int = 0
    last: int = 0

    @property
    def value(self) -> float:
        # where all was rolled back, nothing was brought, or less
        return self.took / max(self.brought, LEAST_BROUGHT)

    def add(self, took: float, brought: float, number: int) -> None:
        self.passes += 1
        # the first ones count more, and so does one after a longer time
        age = (number - self.last) / PATIENCE
        newest = max(NEWEST, 1 / (self.passes + 2), min(age, 0.5))
        self.took += newest * (took - self.took)
        self.brought += newest * (brought - self.brought)
        self.last = number


@dataclass(slots=True)
class Planner:
    """``costs[R]``: seconds of a whole pass over R rows, LM head included; ``draft_seconds``: of
    one call of the draft's model; ``draft_tokens`` and ``draft_calls``: expected tokens of a pass
    with it, and calls; ``modes``: the ways of decoding that are allowed, the plainest first."""

    costs: PassCosts
    draft_seconds: float = 0.0
    draft_tokens: float = 1.0
    modes: tuple[Mode, ...] = ("dense",)
    draft_calls: float = 1.0
    acceptance: Acceptance = field(default_factory=Acceptance)
    clock: Callable[[], float] = perf_counter
    passes: int = 0
    # how many passes there were of each kind
    used: dict[Mode, int] = field(default_factory=dict)
    # in dense passes, by the number of sequences: what a token takes, and what passes with exits
    # take for what the same ones without would
    _pace: dict[int, Average] = field(default_factory=dict)
    _exits: dict[int, Average] = field(default_factory=dict)
    # in dense passes, what asking the draft's model takes beyond what it gains
    _asked: list[Average] = field(default_factory=list)
    # by the number of sequences, in dense passes, what looking for draft tokens takes beyond what
    # they gain
    _looked: dict[int, Average] = field(default_factory=dict)
    # what passes without draft tokens and with them take, for what they should by the costs of
    # their parts: those are least times, and choosing draft tokens takes time too
    _slower: tuple[Average, Average] = field(default_factory=lambda: (Average(1.0), Average(1.0)))
    # the pass at which something was last tried, and until which exits are tried
    _tried: dict[Hashable, int] = field(default_factory=dict)
    _trial_end: int = 0
    # the number of sequences; of this pass, the seconds of the draft's model and expected tokens
    _batch: int = 1
    _asked_seconds: float = 0.0
    _expected: float = 0.0
    # draft tokens that were right, and that were expected to be, older ones fading
    _hits: tuple[float, float] = (TRUST, TRUST)
    # of the newest time that the draft's model was run, the seconds for what it was behind with
    _behind: float = 0.0
    # seconds of a call of the draft's model
    _calls: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def __post_init__(self) -> None:
        # its own: several planners may start from one measurement
        self.costs = PassCosts(self.costs)
        self._calls.append(self.draft_seconds)
        took = self.cost(4) - self.cost(1) + self.draft_calls * self.draft_seconds
        brought = max(self.draft_tokens - 1, 0.0) * self.token_seconds
        self._asked = [
            Average((took - brought / (1 + edge)) / self.cost(1)) for edge in (0, *TREE_EDGES)
        ]

    @property
    def token_seconds(self) -> float:
        """Seconds of a token at present; exits are taken to save the same share of all passes."""
        return self.cost(1) * self._pace_of(self._batch).value

    @property
    def truth(self) -> float:
        """The draft tokens that are right, of those expected to be."""
        right, expected = self._hits
        return min(right / expected, 1.0)

    @property
    def most_rows(self) -> int:
        """Those of the largest pass."""
        return self.costs.ordered[-1][0]

    def gain(self, joint: Sequence[float], rows: int = 1) -> tuple[float, int]:
        """The most seconds that draft tokens gain, and how many of them gain that; ``joint``: their
        probabilities to be accepted, the largest first; ``rows``: others in the pass."""
        if not joint:
            return 0.0, 0
        worth, costs = self.token_seconds * self.truth, self.costs.ordered
        best, count, tokens, begin, without = 0.0, 0, 0.0, 0, self.cost(rows)
        slower = self._drafted_slower
        # rows that a larger count pads a pass with cost nothing
        for size, cost in costs:
            end = min(size - rows, len(joint))
            if end > begin:
                tokens += sum(joint[begin:end])
                gained, begin = tokens * worth - (slower * cost - without), end
                if gained > best:
                    best, count = gained, end
        return best, count

    def due(self, what: Hashable, loss: float, hope: float) -> bool:
        """Whether to try again what is expected to cost ``loss`` in vain, and would gain ``hope``
        with each pass if things have changed.

        The root balances what tries cost with what is missed until one of them finds a change.
        """
        waited = self.passes - self._tried.setdefault(what, self.passes)
        if loss > 0 and waited < PATIENCE * sqrt(loss / max(hope, 1e-9)):
            return False
        self._tried[what] = self.passes
        return True

    def choose(self, tree: Tree, most: int, pending: int = 0, others: int = 0) -> Tree:
        """The part of ``tree``, at most ``most`` draft tokens, that gains most.

        ``pending``: rows of pending tokens that may go along; ``others``: other sequences in the
        pass.
        """
        if len(tree) == 1:
            self._expected += 1
            return tree
        joint, rows = tree.joint(), 1 + pending + others
        order = sorted(range(1, len(tree)), key=lambda node: -joint[node])[:most]
        _, count = self.gain([joint[node] for node in order], rows)
        count = self._try_other_rows([joint[node] for node in order], count, rows)
        self._expected += 1 + sum(joint[node] for node in order[:count])
        return tree.keep(order[:count])

    def _try_other_rows(self, joint: Sequence[float], count: int, rows: int) -> int:
        """``count`` draft tokens, or those of a larger or smaller pass: these may have become
        cheaper, which only such a pass can show."""
        worth = self.token_seconds * self.truth
        larger = min((size for size in self.costs if size > rows + count), default=0)
        if more := joint[count : max(larger - rows, count)]:
            hope = worth * sum(more)
            loss = self.cost(larger) - self.cost(rows + count) - hope
            if self.due(("rows", larger), loss, ROWS_HOPE * hope):
                return count + len(more)
        smaller = max((size for size in self.costs if size < rows + count), default=0)
        if smaller > rows:
            loss = worth * sum(joint[smaller - rows : count])
            if self.due(("rows", smaller), loss, FEWER_HOPE * self.cost(1)):
                return smaller - rows
        return count

    def may_pay(self, sequences: int, most: int) -> bool:
        """Whether ``most`` draft tokens for each of some sequences could pay, if as many were right
        as ever are, and looking for them did not cost more than it gained of late: if not, none
        need be looked for."""
        if len(self.modes) == 1 or sequences == 1:
            return True
        more = self.cost(sequences + 1) - self.cost(sequences)
        if more >= HOPE_OF_ALL * most * self.cost(sequences):
            return False
        lost = self._looked[sequences].value if sequences in self._looked else 0.0
        return lost <= 0 or self.due(("look", sequences), lost, LOOK_HOPE)

    def looked(self, sequences: int, rows: int, seconds: float) -> None:
        """Draft tokens were looked for, for all of ``sequences``, which took ``seconds``; the pass
        has ``rows`` now."""
        gained = (self._expected - sequences) * self.token_seconds
        gained -= self.cost(rows) - self.cost(sequences)
        average = self._looked.setdefault(sequences, Average(0.0))
        average.add((seconds - gained) / self.cost(1), 1.0, self.passes)

    def worth_asking(self, without: float, drafted: bool) -> bool:
        """Whether to run the draft's model, beside draft tokens that gain ``without`` seconds."""
        level = self._level(without)
        forced = len(self.modes) == 1 and not drafted
        loss = self._asked[level].value
        if loss > 0:
            # one that is asked again after a while has tokens to catch up with
            loss += self._behind / self.cost(1)
        return forced or self.due(("ask", level), loss, ASK_HOPE / (1 + 3 * level))

    def asked(
        self, without: float, gained: float, seconds: float, calls: int, behind: float = 0.0
    ) -> None:
        """Running the draft's model took ``seconds``, after ``behind`` for tokens that passes
        without it had left; the tree gains ``gained`` now."""
        self._asked_seconds += seconds + behind
        self._behind = behind
        self._calls.append(seconds / calls)
        self.draft_seconds = min(self._calls)
        # one that took far longer was interrupted
        took = min(seconds, 2 * calls * self.draft_seconds)
        level = self._level(without)
        self._asked[level].add((took - gained + without) / self.cost(1), 1.0, self.passes)

    def mode(self, batch: int = 1) -> Mode:
        """The mode of the next pass over ``batch`` sequences."""
        self._batch, self._expected, self._asked_seconds = batch, 0.0, 0.0
        # as many sequences as a tree has rows leave none for draft tokens, and trials are expensive
        if len(self.modes) == 1 or batch >= self.most_rows:
            return self.modes[0]
        plain, early = self._allowed()
        if early is None or self.passes < RECENT:
            # what passes with exits take is held against those without
            return plain
        if self.passes < self._trial_end:
            return early
        exits = self._exits_of(batch)
        if exits.value < 1:
            # passes without exits show what passes cost
            return plain if self.due(("costs", batch), REFRESH, 1.0) else early
        if self.due(("exits", batch), TRIAL * (exits.value - 1), EXITS_HOPE):
            self._trial_end = self.passes + TRIAL
            return early
        return plain

    def observe(self, rows: int, seconds: float) -> None:
        """A pass of ``rows`` through all layers and the LM head, and nothing else, took so long."""
        if rows <= self.most_rows:
            # padded to a row count there is code for
            size = self.costs.size(rows)
            before = self.costs[size]
            self.costs.observe(size, seconds)
            if not before / JUMP < self.costs[size] < before * JUMP:
                # what passes with exits took was held against other costs
                self._exits.clear()

    def record(
        self, mode: Mode, rows: int, seconds: float, appended: int, grown: int, batch: int = 1
    ) -> None:
        """A pass in ``mode`` over ``rows`` of ``batch`` sequences, from proposing draft tokens to
        the end, took ``seconds``; it ``appended`` tokens, and they have ``grown`` by fewer where
        others were rolled back."""
        self.passes += 1
        drafted, early = rows > batch, mode in ("exits", "both")
        happened: tuple[Mode, ...] = ("dense", "speculation", "exits", "both")
        kind = happened[drafted + 2 * early]
        self.used[kind] = self.used.get(kind, 0) + 1
        usual = self.cost(rows) * max(1.0, rows / self.most_rows)
        if drafted and not early:
            got, expected = self._hits
            got, expected = got * HITS_FADE, expected * HITS_FADE
            self._hits = got + appended - batch, expected + max(self._expected - batch, 0.0)
        if early:
            # a machine that was busy with something else says nothing about exits
            took, exits = (seconds - self._asked_seconds) / usual, self._exits_of(batch)
            if not exits.value / JUMP < took < exits.value * JUMP:
                # it may not be exits that changed
                self._tried["costs", batch] = -self.passes - PATIENCE
            # one pass that was disturbed says nothing about exits
            exits.add(min(took, exits.value * JUMP) * appended, grown, self.passes)
        else:
            should = usual + self._asked_seconds
            self._slower[drafted].add(min(seconds / should, JUMP), 1.0, self.passes)
        usual *= self._drafted_slower if drafted else 1.0
        took = (usual + self._asked_seconds) / self.cost(1)
        self._pace_of(batch).add(took, max(self._expected, float(batch)), self.passes)

    def learn(self, tree: Tree, tokens: Sequence[int]) -> None:
        """``tokens`` followed the root of ``tree``, which need not have been run."""
        self.acceptance.learn(tree, tokens)

    def learned(self) -> list[float]:
        """What is known of exits and of running the draft's model, for a later planner."""
        return [self._exits_of(1).value, self.truth, *(asked.value for asked in self._asked)]

    def recall(self, learned: Sequence[float]) -> None:
        """Start with what an earlier planner had ``learned``."""
        if len(learned) == 2 + len(self._asked):
            exits, truth, *asked = learned
            self._exits, self._asked = {1: Average(exits)}, [Average(one) for one in asked]
            self._hits = TRUST * min(max(truth, 0.0), 1.0), TRUST

    def decision(self, batch: int = 1) -> Mapping[str, object]:
        """The mode in use and the figures it was chosen by, in milliseconds; ``drafted_slower``:
        what passes with draft tokens take, by the sum of their parts."""
        plain, early = self._allowed()
        exits, dense = self._exits_of(batch).value, self.cost(batch) / batch
        mode = early if early and (exits < 1 or plain == early) else plain
        drafted = self.used.get("speculation", 0) + self.used.get("both", 0)
        if "dense" in self.modes and mode == "speculation" and 10 * drafted < self.passes:
            mode = "dense"
        pace = self.cost(1) * self._pace_of(batch).value
        spent = {"dense": dense, "speculation": pace, "exits": pace * exits, "both": pace * exits}
        counts = self.acceptance.observed.values()
        hits, verified = (sum(count[part] for count in counts) for part in (0, 1))
        return {
            "mode": mode,
            "modes": list(self.modes),
            "ms_per_token": {mode: round(1e3 * spent[mode], 2) for mode in self.used},
            "passes": dict(self.used),
            "pass_ms": {rows: round(1e3 * cost, 2) for rows, cost in self.costs.items()},
            "draft_ms": round(1e3 * self.draft_seconds, 2),
            "drafted_slower": round(self._drafted_slower, 3),
            "draft_hit_rate": round(hits / verified, 3) if verified else None,
        }

    def _allowed(self) -> tuple[Mode, Mode | None]:
        """What is decoded by without exits, and with them if they are allowed."""
        plain = [mode for mode in self.modes if mode in ("dense", "speculation")]
        early = [mode for mode in self.modes if mode in ("exits", "both")]
        return (plain or early)[-1], early[-1] if early else None

    @property
    def _drafted_slower(self) -> float:
        """By how much passes with draft tokens take longer than their parts, those without taken
        for the measure."""
        without, drafted = self._slower
        return max(1.0, drafted.value / without.value)

    def _level(self, without: float) -> int:
        return sum(without > edge * self.cost(1) for edge in TREE_EDGES) if without else 0

    def cost(self, rows: int) -> float:
        """Seconds of a pass over ``rows`` through all layers."""
        return self.costs.of(rows)

    def _pace_of(self, batch: int) -> Average:
        if batch not in self._pace:
            took = self.cost(batch) * max(1.0, batch / self.most_rows) / self.cost(1)
            self._pace[batch] = Average(took, batch)
        return self._pace[batch]

    def _exits_of(self, batch: int) -> Average:
        return self._exits.setdefault(batch, Average(1.0))
