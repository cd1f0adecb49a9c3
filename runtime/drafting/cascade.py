"""The draft head and prompt look-up together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eepass.runtime.drafting.eagle_tree import EagleTree
from eepass.runtime.drafting.ngram import NgramDraft
from eepass.runtime.drafting.planner import Budget
from eepass.runtime.drafting.tree import Tree

# joint chance of look-up's first three tokens from which on the head is not run
SURE = 0.7


class Cascade:
    """The expensive source for the next positions, look-up for whatever the text repeats.

    After Cascade Speculative Drafting (Chen et al., 2024): look-up's draft tokens start the draft
    head's tree, and later positions of the likeliest path are left to look-up alone (horizontal);
    in ``ModelDraft`` look-up drafts for the small model (vertical).
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
        if len(tree) < 4 or tree.joint()[3] < SURE:
            self.head.add_to(tree, budget)
        joint = tree.joint()
        parents = set(tree.parents)
        leaf = max((n for n in range(len(tree)) if n not in parents), key=joint.__getitem__)
        if path := [tree.tokens[node] for node in tree.path(leaf)]:
            self.ngram.continue_path(tree, leaf, path, budget)
        return tree

    def truncate(self, length: int) -> None:
        self.head.truncate(length)
        self.ngram.truncate(length)

    def call_seconds(self) -> float:
        return self.head.call_seconds()

    def fresh(self) -> Cascade:
        return Cascade(self.head.fresh(), self.ngram.fresh())
