"""A tree of draft tokens from the trained draft head: levels at once, and more while that pays."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

import torch
from torch import Tensor

from eepass.runtime.decoder.costs import seconds_of
from eepass.runtime.drafting.acceptance import EAGLE
from eepass.runtime.drafting.budget import Budget
from eepass.runtime.drafting.eagle_form import WINDOW
from eepass.runtime.drafting.eagle_head import ROWS, WIDTH, EagleHead, Level
from eepass.runtime.drafting.features import Norm, ReadFeatures, before
from eepass.runtime.drafting.tree import Tree


class EagleTree:
    """The draft of one sequence, from its ``head``."""

    expected: float = 2.0
    calls: float = 1.0

    def __init__(self, head: EagleHead, norm: Norm, named: int = 0) -> None:
        """``norm``: the model's last; ``named``: where the head is asked for ``candidates`` alone,
        how many."""
        self.head, self.norm, self.named = head, norm, named
        self.feature_layers: tuple[int, ...] | None = head.feature_layers
        # confirmed tokens the head has not run yet: it runs them when a draft is needed, so that
        # tokens rolled back by then cost nothing
        self._tokens: list[int] = []
        # how many tokens before these the head will never run
        self._skipped = 0
        # the last it has run, to be run again where another tree is asked for
        self._last: int | None = None

    def follow(self, tokens: Sequence[int]) -> None:
        self._tokens += tokens
        if len(self._tokens) > 2 * WINDOW:
            # no later row attends further back than a window
            old = len(self._tokens) - WINDOW
            self._skipped += old
            del self._tokens[:old]

    def propose(self, root: int, budget: Budget, read: ReadFeatures) -> Tree:
        tree = Tree([root])
        self.add_to(tree, budget, read)
        return tree

    def add_to(self, tree: Tree, budget: Budget, read: ReadFeatures) -> None:
        """Grow ``tree``, which may hold draft tokens of other sources already."""
        grown = _Grown(tree, budget)
        began = budget.planner.clock()
        if self._catch_up(read):
            budget.behind += budget.planner.clock() - began
        levels = self._begin(read)
        while levels:
            grown.add(levels)
            frontier = grown.chances_of(self.head.frontier)
            worth = [chance for chance in frontier if budget.worth_a_row(chance)]
            if not worth or not budget.worth_a_call(tree.joint()[1:], worth):
                return
            levels = self.head.further()

    def candidates(self, count: int, read: ReadFeatures) -> Tensor:
        """The likeliest ``count`` tokens [K] after the last one, as draft tokens of an exit."""
        (level,) = self._begin(read, levels=1, width=max(count, WIDTH))
        return torch.tensor(level.tokens[:count], device=self.head.hot_ids.device)

    def _catch_up(self, read: ReadFeatures) -> bool:
        """Run the tokens before those that a tree begins with, at first, when they are the prompt;
        whether there were any. Later they are left out: it takes as long as a tree to run what
        passes without one have left, and trees are hardly better for it."""
        tokens = self._tokens[: -ROWS[-1]]
        del self._tokens[: len(tokens)]
        if self.head.length:
            self._skipped += len(tokens)
            return False
        if tokens:
            self.head.skip(self._skipped)
            self.head.extend(tokens, self._features(len(tokens), read))
            self._skipped = 0
        return bool(tokens)

    def _begin(self, read: ReadFeatures, **how: int) -> list[Level]:
        self._catch_up(read)
        tokens = self._tokens
        if tokens:
            self.head.skip(self._skipped)
        else:
            assert self._last is not None
            self.head.truncate(self.head.length - 1)
            tokens = [self._last]
        self._tokens, self._skipped, self._last = [], 0, tokens[-1]
        return self.head.begin(tokens, self._features(len(tokens), read), **how)

    def _features(self, count: int, read: ReadFeatures) -> Tensor:
        """Those of the token before each of the next ``count`` tokens that the head runs."""
        width = self.head.feature_size // (1 + len(self.head.feature_layers))
        return before(self.head.length, count, read).value(width, self.norm)

    def truncate(self, length: int) -> None:
        begin = self.head.length + self._skipped
        if length < begin:
            self.head.truncate(min(length, self.head.length))
            self._skipped = max(length - self.head.length, 0)
            self._tokens, self._last = [], None
        else:
            del self._tokens[length - begin :]

    def call_seconds(self) -> float:
        """Of a tree's first levels, what it follows included."""
        head = self.head.fresh()
        features = torch.zeros(ROWS[-1], head.feature_size, dtype=head.dtype)
        hidden = features[None, :1, : head.feature_size // (1 + len(head.feature_layers))]
        # everything is compiled here, not while a sequence waits
        how = {"levels": 1, "width": max(self.named, WIDTH)} if self.named else {}
        head.prepare(**how)
        head.extend([0], features[:1])
        for count in ROWS:
            head.begin([0] * count, features[:count], **how)
        if not self.named:
            head.further()

        def call() -> None:
            self.norm(hidden)
            head.begin([0, 0], features[:2], **how)
            head.truncate(head.length - 2)

        return seconds_of(call)

    def fresh(self) -> EagleTree:
        return EagleTree(self.head.fresh(), self.norm, self.named)


class _Grown:
    """The head's draft tokens, level by level, as nodes of ``tree``."""

    def __init__(self, tree: Tree, budget: Budget) -> None:
        self.tree, self.budget = tree, budget
        self.depth = 0
        # of the newest level: the node of each draft token, -1 where it is left out; the chance of
        # each to be accepted, and the head's log-probability of its path
        self.nodes, self.chances, self.paths = [0], [1.0], [0.0]

    def add(self, levels: Sequence[Level]) -> None:
        for level in levels:
            self.depth += 1
            self._add_level(level)

    def chances_of(self, places: Sequence[int]) -> list[float]:
        return [self.chances[place] for place in places if self.nodes[place] >= 0]

    def _add_level(self, level: Level) -> None:
        nodes, chances = self.nodes, self.chances
        width = len(level.tokens) // len(level.above)
        above = [place for place in level.above for _ in range(width)]
        paths = [self.paths[a] + s for a, s in zip(above, level.scores, strict=True)]
        # no more of one level go into a pass
        least = sorted(paths, reverse=True)[: max(self.budget.most, 1)][-1]
        self.nodes, self.chances, self.paths = [-1] * len(paths), [0.0] * len(paths), paths
        for place, path in enumerate(paths):
            parent = nodes[above[place]]
            if path < least or parent < 0:
                continue
            prior = exp(level.scores[place])
            bin = (EAGLE, min(self.depth, 3), self.budget.bin(prior))
            own = self.budget.chance(bin, prior)
            chance = chances[above[place]] * own
            if self.budget.worth_a_row(chance):
                self.nodes[place] = self.tree.add(level.tokens[place], parent, own, bin)
                self.chances[place] = chance
