"""Several sources of draft tokens as one: text drafts for free, a model's where they pay."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from eepass.runtime.drafting.budget import Budget
from eepass.runtime.drafting.draft import Draft
from eepass.runtime.drafting.features import ReadFeatures
from eepass.runtime.drafting.suffix import SuffixDraft
from eepass.runtime.drafting.tree import Tree


class Head(Draft, Protocol):
    """A draft with a model, which can add to a tree that holds draft tokens already."""

    def add_to(self, tree: Tree, budget: Budget, read: ReadFeatures) -> None: ...

    def fresh(self) -> Head: ...


class Cascade:
    """What the text repeats, and ``head`` wherever the planner expects it to gain more than its
    calls take.

    After Cascade Speculative Drafting (Chen et al., 2024): text drafts start the head's tree, and
    later positions of its likeliest path are left to them alone (horizontal); in ``ModelDraft``
    they draft for the small model (vertical).
    """

    def __init__(self, head: Head, text: SuffixDraft | None = None) -> None:
        self.head, self.text = head, text
        self.feature_layers = head.feature_layers
        self.expected, self.calls = head.expected, head.calls

    def follow(self, tokens: Sequence[int]) -> None:
        self.head.follow(tokens)
        if self.text is not None:
            self.text.follow(tokens)

    def propose(self, root: int, budget: Budget, read: ReadFeatures) -> Tree:
        tree = Tree([root]) if self.text is None else self.text.propose(root, budget)
        asked = budget.ask(tree, partial(self.head.add_to, read=read))
        if asked and self.text is not None and len(tree) > 1:
            joint = tree.joint()
            parents = set(tree.parents)
            leaf = max((n for n in range(len(tree)) if n not in parents), key=joint.__getitem__)
            self.text.add_to(tree, leaf, budget)
        return tree

    def truncate(self, length: int) -> None:
        self.head.truncate(length)
        if self.text is not None:
            self.text.truncate(length)

    def call_seconds(self) -> float:
        return self.head.call_seconds()

    def fresh(self) -> Cascade:
        return Cascade(self.head.fresh(), self.text and self.text.fresh())
