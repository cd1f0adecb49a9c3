"""Prompt look-up: draft the tokens that followed the last few tokens earlier in the text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eepass.runtime.drafting.draft import NGRAM
from eepass.runtime.drafting.planner import Budget
from eepass.runtime.drafting.tree import Tree

# estimated chance of a draft token by how many tokens matched, until it is learned
PRIORS = (0.2, 0.4, 0.6, 0.75)


class NgramDraft:
    """Looks up the longest of the last 1 to ``LONGEST`` tokens that occurred before.

    Memory is bounded: of a long text it indexes the last ``REACH`` to 2 * ``REACH`` tokens.
    """

    feature_layers: tuple[int, ...] | None = None
    expected: float = 1.2
    LONGEST = 4
    REACH = 8192

    def __init__(self) -> None:
        self.tokens: list[int] = []
        # the last position after each n-gram; the older half is dropped as a whole
        self._positions: dict[tuple[int, ...], int] = {}
        self._older_positions: dict[tuple[int, ...], int] = {}

    def follow(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        for token in tokens:
            end = len(self.tokens)
            for n in range(1, min(self.LONGEST, end) + 1):
                self._positions[tuple(self.tokens[end - n :])] = end
            self.tokens.append(token)
            if len(self._positions) >= self.LONGEST * self.REACH:
                self._older_positions, self._positions = self._positions, {}

    def propose(self, root: int, budget: Budget) -> Tree:
        tree = Tree([root])
        self.continue_path(tree, 0, [], budget)
        return tree

    def continue_path(self, tree: Tree, leaf: int, path: Sequence[int], budget: Budget) -> None:
        """Add to ``tree``, below ``leaf``, what followed the text and ``path`` (the draft tokens
        down to ``leaf``) before."""
        found, matched = self.continuation(path, budget.most)
        node, joint = leaf, tree.joint()[leaf]
        for depth, token in enumerate(found):
            bin = (NGRAM, matched, min(depth, 4))
            chance = budget.chance(bin, prior=PRIORS[matched - 1])
            joint *= chance
            if not budget.worth_a_row(joint):
                return
            node = tree.add(token, node, chance, bin)

    def continuation(self, path: Sequence[int], most: int) -> tuple[list[int], int]:
        """Up to ``most`` tokens that followed the text and ``path`` before, and the length of the
        n-gram that matched."""
        last = [*self.tokens[-self.LONGEST :], *path][-self.LONGEST :]
        for n in range(len(last), 0, -1):
            key = tuple(last[-n:])
            position = self._positions.get(key, self._older_positions.get(key))
            # an entry may point at tokens that were rolled back since
            if position is not None and position < len(self.tokens):
                return self.tokens[position : position + most], n
        return [], 1

    def truncate(self, length: int) -> None:
        del self.tokens[length:]

    def call_seconds(self) -> float:
        return 0.0

    def fresh(self) -> NgramDraft:
        return NgramDraft()
