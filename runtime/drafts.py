"""Where draft tokens come from: one interface, several sources, and cascades of them.

A draft that is wrong costs time, never correctness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from eepass.runtime.costs import seconds_of
from eepass.runtime.eagle import EagleDraft
from eepass.runtime.planner import Budget
from eepass.runtime.tree import Tree

# names of the sources in the bins that chances are learned in
EAGLE, NGRAM = range(2)
# tokens offered after one node, and nodes of a level that are taken further
WIDTH, BEAM = 6, 4
DEEPEST = 8


class Draft(Protocol):
    """A source of drafts for one sequence.

    ``feature_layers``: boundaries whose states it wants with each token, besides z; None if it
    wants no states at all.
    """

    feature_layers: tuple[int, ...] | None

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
    """Prompt look-up: what followed the last few tokens when they stood here before."""

    feature_layers = None
    LONGEST = 4

    def __init__(self) -> None:
        self.tokens: list[int] = []
        # where the n tokens before a place stood last
        self._seen: dict[tuple[int, ...], int] = {}

    def follow(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        for token in tokens:
            end = len(self.tokens)
            for n in range(1, min(self.LONGEST, end) + 1):
                self._seen[tuple(self.tokens[end - n :])] = end
            self.tokens.append(token)

    def propose(self, root: int, budget: Budget) -> Tree:
        tree = Tree([root])
        self.continue_path(tree, 0, [], budget)
        return tree

    def continue_path(self, tree: Tree, leaf: int, path: Sequence[int], budget: Budget) -> None:
        """Add to ``tree`` what followed before, after ``leaf``, reached over the tokens ``path``."""
        start, matched = self._find([*self.tokens[-self.LONGEST :], *path][-self.LONGEST :])
        node = leaf
        joint = tree.joint()[leaf]
        for depth, token in enumerate(self.tokens[start : start + budget.most]):
            bin = (NGRAM, matched, min(depth, 4))
            chance = budget.chance(bin, prior=(0.2, 0.4, 0.6, 0.75)[matched - 1])
            joint *= chance
            if not budget.worth_a_row(joint):
                return
            node = tree.add(token, node, chance, bin)

    def _find(self, last: Sequence[int]) -> tuple[int, int]:
        for n in range(len(last), 0, -1):
            place = self._seen.get(tuple(last[-n:]))
            # an entry may be of tokens that were taken back since
            if place is not None and place < len(self.tokens):
                return place, n
        return len(self.tokens), 1

    def truncate(self, length: int) -> None:
        del self.tokens[length:]

    def call_seconds(self) -> float:
        return 0.0

    def fresh(self) -> NgramDraft:
        return NgramDraft()


class EagleTree:
    """A tree from the trained draft head, grown level by level while a level pays."""

    def __init__(self, head: EagleDraft) -> None:
        self.head = head
        self.feature_layers: tuple[int, ...] | None = head.feature_layers
        self._tokens: list[int] = []
        self._features: list[Tensor] = []
        self._logits: Tensor | None = None

    def follow(self, tokens: Sequence[int], features: Tensor | None) -> None:
        assert features is not None
        # told to the head only when it is asked: what is rolled back by then costs nothing
        self._tokens += tokens
        self._features.append(features)

    def propose(self, root: int, budget: Budget) -> Tree:
        tree = Tree([root])
        logits = self.first()
        if logits is None:
            return tree
        self._offer(tree, [0], logits[None], budget)
        grown: dict[int, int] = {}
        for _ in range(DEEPEST - 1):
            joint = tree.joint()
            level = [node for node in self._leaves(tree, grown) if budget.worth_a_call(joint[node])]
            level = sorted(level, key=lambda node: -joint[node])[:BEAM]
            if not level:
                break
            self.grow(tree, level, grown, budget)
        return tree

    def candidates(self, count: int) -> Tensor:
        """The likeliest ``count`` tokens [K] after the last one, as drafts of an exit."""
        logits = self.first()
        if logits is None:
            return self.head.hot_ids[:count]
        return self.head.hot_ids[logits.topk(count).indices]

    def first(self) -> Tensor | None:
        """Logits [N] of what follows the last token; None before any."""
        if self._tokens:
            self._logits = self.head.extend(self._tokens, torch.cat(self._features))
            self._tokens, self._features = [], []
        return self._logits

    def grow(self, tree: Tree, level: list[int], grown: dict[int, int], budget: Budget) -> None:
        """Run the nodes of ``level`` and offer what may follow them; ``grown`` numbers the rows."""
        parents = [grown.get(tree.parents[node], -1) for node in level]
        logits = self.head.grow([tree.tokens[node] for node in level], parents)
        for node in level:
            grown[node] = len(grown)
        self._offer(tree, level, logits, budget)

    def run_chain(self, tree: Tree, chain: list[int], budget: Budget) -> dict[int, int]:
        """Run a chain of nodes below the root in one call (a draft for the draft)."""
        parents = list(range(-1, len(chain) - 1))
        logits = self.head.grow([tree.tokens[node] for node in chain], parents)
        self._offer(tree, chain, logits, budget)
        return {node: row for row, node in enumerate(chain)}

    def _offer(self, tree: Tree, nodes: list[int], logits: Tensor, budget: Budget) -> None:
        best = logits.softmax(-1).topk(WIDTH, -1)
        ids = self.head.hot_ids[best.indices].tolist()
        for node, tokens, chances in zip(nodes, ids, best.values.tolist(), strict=True):
            depth = min(len(tree.path(node)), 3)
            for token, chance in zip(tokens, chances, strict=True):
                bin = (EAGLE, depth, budget.bin(chance))
                tree.add(token, node, budget.chance(bin, prior=chance * 0.9**depth), bin)

    @staticmethod
    def _leaves(tree: Tree, grown: dict[int, int]) -> list[int]:
        return [
            node
            for node in range(1, len(tree))
            if node not in grown and (tree.parents[node] == 0 or tree.parents[node] in grown)
        ]

    def truncate(self, length: int) -> None:
        told = self.head.length
        if length < told:
            self.head.truncate(length)
            self._logits = None
            self._tokens, self._features = [], []
        else:
            kept = length - told
            features = torch.cat(self._features)[:kept] if self._features else None
            del self._tokens[kept:]
            self._features = [] if features is None else [features]

    def call_seconds(self) -> float:
        head = self.head.fresh()
        state = torch.zeros(1, head.feature_size, dtype=head.embedding.dtype)
        head.extend([0], state)
        head.grow([0, 0], [-1, -1])
        return seconds_of(lambda: head.grow([0], [-1]))

    def fresh(self) -> EagleTree:
        return EagleTree(self.head.fresh())


class Cascade:
    """Prompt look-up and the draft head together (after Cascade Speculative Drafting, Chen 2024).

    Down: what look-up names is a draft for the head, which runs it in one call and adds what it
    thinks better. Along: the likeliest path of the head's tree goes on with look-up.
    """

    def __init__(self, head: EagleTree, ngram: NgramDraft | None = None) -> None:
        self.head, self.ngram = head, ngram or NgramDraft()
        self.feature_layers = head.feature_layers

    def follow(self, tokens: Sequence[int], features: Tensor | None) -> None:
        self.head.follow(tokens, features)
        self.ngram.follow(tokens)

    def propose(self, root: int, budget: Budget) -> Tree:
        found = self.ngram.propose(root, budget)
        joint = found.joint()
        chain = [node for node in range(1, len(found)) if joint[node] > 0.2][:7]
        if len(chain) < 2:
            tree = self.head.propose(root, budget)
        else:
            tree = found
            logits = self.head.first()
            if logits is not None and joint[chain[-1]] < 0.9:
                self.head._offer(tree, [0], logits[None], budget)
                self.head.run_chain(tree, chain, budget)
        joint = tree.joint()
        leaf = max(
            (n for n in range(len(tree)) if not any(True for _ in tree.children(n))),
            key=joint.__getitem__,
        )
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
