"""Where draft tokens come from: one interface, several sources, and cascades of them.

A draft that is wrong costs time, never correctness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from eepass.runtime.decoder.costs import seconds_of
from eepass.runtime.drafting.eagle import WINDOW, EagleDraft
from eepass.runtime.drafting.planner import Budget
from eepass.runtime.drafting.tree import Tree

# names of the sources in the bins that chances are learned in
EAGLE, NGRAM = range(2)
# tokens offered after one node, and nodes of a level that are taken further
WIDTH, BEAM = 6, 4
DEEPEST = 8
# joint chance of look-up's first three tokens above which nobody else is asked
SURE = 0.7


class Draft(Protocol):
    """A source of drafts for one sequence.

    ``feature_layers``: boundaries whose states it wants with each token, besides z; None if it
    wants no states at all.
    """

    feature_layers: tuple[int, ...] | None
    # tokens a pass gives with it, as long as nothing is measured
    expected: float

    def follow(self, tokens: Sequence[int], features: Tensor | None) -> None:
        """The sequence goes on with ``tokens``; ``features`` [n, F·H] of the token before each."""
        ...

    def propose(self, root: int, budget: Budget) -> Tree:
        """Drafts after ``root``, the last token followed."""
        ...

    def truncate(self, length: int) -> None:
        """Of the tokens followed only the first ``length`` still hold."""
        ...

    def fresh(self) -> Draft:
        """The same source for another sequence."""
        ...

    def call_seconds(self) -> float:
        """What asking it once costs."""
        ...


class NgramDraft:
    """Prompt look-up: what followed the last few tokens when they stood here before.

    What it remembers is bounded: of a long text the last ``REACH`` to 2 · ``REACH`` tokens.
    """

    feature_layers: tuple[int, ...] | None = None
    expected: float = 1.2
    LONGEST = 4
    REACH = 8192

    def __init__(self) -> None:
        self.tokens: list[int] = []
        # where the n tokens before a place stood last; the older half is forgotten as a whole
        self._seen: dict[tuple[int, ...], int] = {}
        self._seen_before: dict[tuple[int, ...], int] = {}

    def follow(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        for token in tokens:
            end = len(self.tokens)
            for n in range(1, min(self.LONGEST, end) + 1):
                self._seen[tuple(self.tokens[end - n :])] = end
            self.tokens.append(token)
            if len(self._seen) >= self.LONGEST * self.REACH:
                self._seen_before, self._seen = self._seen, {}

    def propose(self, root: int, budget: Budget) -> Tree:
        tree = Tree([root])
        self.continue_path(tree, 0, [], budget)
        return tree

    def continue_path(self, tree: Tree, leaf: int, path: Sequence[int], budget: Budget) -> None:
        """Add to ``tree`` what followed ``path``, the tokens down to ``leaf``, before."""
        found, matched = self.continuation(path, budget.most)
        node = leaf
        joint = tree.joint()[leaf]
        for depth, token in enumerate(found):
            bin = (NGRAM, matched, min(depth, 4))
            chance = budget.chance(bin, prior=(0.2, 0.4, 0.6, 0.75)[matched - 1])
            joint *= chance
            if not budget.worth_a_row(joint):
                return
            node = tree.add(token, node, chance, bin)

    def continuation(self, path: Sequence[int], most: int) -> tuple[list[int], int]:
        """Up to ``most`` tokens that followed the text and ``path`` before, and how many tokens of
        these matched there."""
        last = [*self.tokens[-self.LONGEST :], *path][-self.LONGEST :]
        for n in range(len(last), 0, -1):
            key = tuple(last[-n:])
            place = self._seen.get(key, self._seen_before.get(key))
            # an entry may be of tokens that were taken back since
            if place is not None and place < len(self.tokens):
                return self.tokens[place : place + most], n
        return [], 1

    def truncate(self, length: int) -> None:
        del self.tokens[length:]

    def call_seconds(self) -> float:
        return 0.0

    def fresh(self) -> NgramDraft:
        return NgramDraft()


class EagleTree:
    """A tree from the trained draft head, grown level by level while a level pays."""

    expected: float = 2.0

    def __init__(self, head: EagleDraft) -> None:
        self.head = head
        self.feature_layers: tuple[int, ...] | None = head.feature_layers
        # told to the head only when it is asked: what is taken back by then costs nothing
        self._tokens: list[int] = []
        self._features: list[Tensor] = []
        # tokens after those the head was told, and before the ones that wait to be
        self._skipped = 0
        self._scores: Tensor | None = None

    def follow(self, tokens: Sequence[int], features: Tensor | None) -> None:
        assert features is not None
        self._tokens += tokens
        self._features.append(features)
        if len(self._tokens) > 2 * WINDOW:
            # what nobody will see again need not be told
            old = len(self._tokens) - WINDOW
            self._skipped += old
            del self._tokens[:old]
            self._features = [torch.cat(self._features)[old:]]

    def propose(self, root: int, budget: Budget) -> Tree:
        tree = Tree([root])
        self.add_to(tree, budget)
        return tree

    def add_to(self, tree: Tree, budget: Budget) -> None:
        """Grow ``tree``, which may hold drafts of others already."""
        grown: dict[int, int] = {}
        self._offer(tree, [0], self.first()[None], budget)
        for _ in range(DEEPEST - 1):
            joint = tree.joint()
            ready = (node for node in range(1, len(tree)) if node not in grown)
            ready = (n for n in ready if tree.parents[n] == 0 or tree.parents[n] in grown)
            level = sorted(ready, key=lambda node: -joint[node])[:BEAM]
            level = [node for node in level if budget.worth_a_row(joint[node])]
            if not level or not budget.worth_a_call(joint[1:], [joint[node] for node in level]):
                return
            parents = [grown.get(tree.parents[node], -1) for node in level]
            scores = self.head.grow([tree.tokens[node] for node in level], parents)
            for node in level:
                grown[node] = len(grown)
            self._offer(tree, level, scores, budget)

    def candidates(self, count: int) -> Tensor:
        """The likeliest ``count`` tokens [K] after the last one, as drafts of an exit."""
        return self.head.hot_ids[self.first().topk(count).indices]

    def first(self) -> Tensor:
        """Log-probabilities [N] of what follows the last token."""
        if self._tokens or self._scores is None:
            self.head.skip(self._skipped)
            self._scores = self.head.extend(self._tokens, torch.cat(self._features))
            self._tokens, self._features, self._skipped = [], [], 0
        return self._scores

    def _offer(self, tree: Tree, nodes: list[int], scores: Tensor, budget: Budget) -> None:
        best = scores.topk(WIDTH, -1)
        ids = self.head.hot_ids[best.indices].tolist()
        for node, tokens, chances in zip(nodes, ids, best.values.exp().tolist(), strict=True):
            depth = len(tree.path(node))
            for token, chance in zip(tokens, chances, strict=True):
                bin = (EAGLE, min(depth, 3), budget.bin(chance))
                tree.add(token, node, budget.chance(bin, prior=chance), bin)

    def truncate(self, length: int) -> None:
        told = self.head.length + self._skipped
        if length < told:
            self.head.truncate(min(length, self.head.length))
            self._scores, self._skipped = None, max(length - self.head.length, 0)
            self._tokens, self._features = [], []
        elif self._features:
            kept = torch.cat(self._features)[: length - told]
            del self._tokens[length - told :]
            self._features = [kept]

    def call_seconds(self) -> float:
        head = self.head.fresh()
        dtype = self.head.hidden_dtype
        # every row count is compiled here, not while a sequence waits
        for count in head.row_counts:
            head.extend([0] * count, torch.zeros(count, head.feature_size, dtype=dtype))
        for count in (size for size in head.row_counts if size <= BEAM):
            head.grow([0] * count, [-1] * count)

        def once() -> None:
            head.extend([0], torch.zeros(1, head.feature_size, dtype=dtype))
            head.grow([0, 0], [-1, -1])
            head.grow([0, 0], [0, 1])
            head.truncate(head.length - 1)

        once()
        return seconds_of(once) / 3

    def fresh(self) -> EagleTree:
        return EagleTree(self.head.fresh())


class Cascade:
    """A dear source for the next positions, look-up for what is cheaper found in the text.

    After Cascade Speculative Drafting (Chen et al., 2024): what look-up names is offered to the
    draft head's tree at once, later positions of the likeliest path are left to look-up alone
    (horizontal); ``ModelDraft`` has look-up draft for it (vertical).
    """

    expected: float = 2.0

    def __init__(self, head: EagleTree, ngram: NgramDraft | None = None) -> None:
        self.head, self.ngram = head, ngram or NgramDraft()
        self.feature_layers = head.feature_layers

    def follow(self, tokens: Sequence[int], features: Tensor | None) -> None:
        self.head.follow(tokens, features)
        self.ngram.follow(tokens)

    def propose(self, root: int, budget: Budget) -> Tree:
        tree = self.ngram.propose(root, budget)
        # sure of the next tokens, it goes on by itself
        if len(tree) < 4 or tree.joint()[3] < SURE:
            self.head.add_to(tree, budget)
        joint = tree.joint()
        parents = set(tree.parents)
        leaf = max((n for n in range(len(tree)) if n not in parents), key=joint.__getitem__)
        path = [tree.tokens[node] for node in tree.path(leaf)]
        if path:
            self.ngram.continue_path(tree, leaf, path, budget)
        return tree

    def truncate(self, length: int) -> None:
        self.head.truncate(length)
        self.ngram.truncate(length)

    def call_seconds(self) -> float:
        return self.head.call_seconds()

    def fresh(self) -> Cascade:
        return Cascade(self.head.fresh(), self.ngram.fresh())
