"""A tree of draft tokens from the trained draft head, grown level by level while a level pays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eepass.runtime.decoder.costs import seconds_of
from eepass.runtime.drafting.draft import EAGLE
from eepass.runtime.drafting.eagle_head import EagleHead
from eepass.runtime.drafting.eagle_layer import WINDOW
from eepass.runtime.drafting.planner import Budget
from eepass.runtime.drafting.tree import Tree

# draft tokens added below one node, nodes of a level that are expanded, levels
WIDTH, BEAM, DEPTH = 6, 4, 8


class EagleTree:
    """The draft of one sequence, from its ``head``."""

    expected: float = 2.0

    def __init__(self, head: EagleHead) -> None:
        self.head = head
        self.feature_layers: tuple[int, ...] | None = head.feature_layers
        # confirmed tokens the head has not run yet: it runs them when a draft is needed, so that
        # tokens rolled back by then cost nothing
        self._tokens: list[int] = []
        self._features: list[Tensor] = []
        # how many tokens before these the head will never run
        self._skipped = 0
        self._scores: Tensor | None = None

    def follow(self, tokens: Sequence[int], features: Tensor | None) -> None:
        assert features is not None
        self._tokens += tokens
        self._features.append(features)
        if len(self._tokens) > 2 * WINDOW:
            # no later row attends further back than a window
            old = len(self._tokens) - WINDOW
            self._skipped += old
            del self._tokens[:old]
            self._features = [torch.cat(self._features)[old:]]

    def propose(self, root: int, budget: Budget) -> Tree:
        tree = Tree([root])
        self.add_to(tree, budget)
        return tree

    def add_to(self, tree: Tree, budget: Budget) -> None:
        """Grow ``tree``, which may hold draft tokens of other sources already."""
        # draft tokens the head has run, and their index there
        expanded: dict[int, int] = {}
        self._add_children(tree, [0], self.first()[None], budget)
        for _ in range(DEPTH - 1):
            joint = tree.joint()
            ready = (node for node in range(1, len(tree)) if node not in expanded)
            ready = (n for n in ready if tree.parents[n] == 0 or tree.parents[n] in expanded)
            level = sorted(ready, key=lambda node: -joint[node])[:BEAM]
            level = [node for node in level if budget.worth_a_row(joint[node])]
            if not level or not budget.worth_a_call(joint[1:], [joint[node] for node in level]):
                return
            parents = [expanded.get(tree.parents[node], -1) for node in level]
            scores = self.head.grow([tree.tokens[node] for node in level], parents)
            for node in level:
                expanded[node] = len(expanded)
            self._add_children(tree, level, scores, budget)

    def candidates(self, count: int) -> Tensor:
        """The likeliest ``count`` tokens [K] after the last one, as draft tokens of an exit."""
        return self.head.hot_ids[self.first().topk(count).indices]

    def first(self) -> Tensor:
        """Log-probabilities [N] of what follows the last token."""
        if self._tokens or self._scores is None:
            self.head.skip(self._skipped)
            self._scores = self.head.extend(self._tokens, torch.cat(self._features))
            self._tokens, self._features, self._skipped = [], [], 0
        return self._scores

    def _add_children(self, tree: Tree, nodes: list[int], scores: Tensor, budget: Budget) -> None:
        best = scores.topk(WIDTH, -1)
        ids = self.head.hot_ids[best.indices].tolist()
        for node, tokens, chances in zip(nodes, ids, best.values.exp().tolist(), strict=True):
            depth = len(tree.path(node))
            for token, chance in zip(tokens, chances, strict=True):
                bin = (EAGLE, min(depth, 3), budget.bin(chance))
                tree.add(token, node, budget.chance(bin, prior=chance), bin)

    def truncate(self, length: int) -> None:
        begin = self.head.length + self._skipped
        if length < begin:
            self.head.truncate(min(length, self.head.length))
            self._scores, self._skipped = None, max(length - self.head.length, 0)
            self._tokens, self._features = [], []
        elif self._features:
            kept = torch.cat(self._features)[: length - begin]
            del self._tokens[length - begin :]
            self._features = [kept]

    def call_seconds(self) -> float:
        head = self.head.fresh()
        dtype = head.dtype
        # every row count is compiled here, not while a sequence waits
        for count in head.row_counts:
            head.extend([0] * count, torch.zeros(count, head.feature_size, dtype=dtype))
        for count in (size for size in head.row_counts if size <= BEAM):
            head.grow([0] * count, [-1] * count)

        def three_calls() -> None:
            head.extend([0], torch.zeros(1, head.feature_size, dtype=dtype))
            head.grow([0, 0], [-1, -1])
            head.grow([0, 0], [0, 1])
            head.truncate(head.length - 1)

        three_calls()
        return seconds_of(three_calls) / 3

    def fresh(self) -> EagleTree:
        return EagleTree(self.head.fresh())
