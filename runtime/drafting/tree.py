"""Draft tokens as a tree: each path from the root is one possible continuation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Tree:
    """Node 0 is the root, the last token decoded; the others are draft tokens.

    ``chances[i]`` is the estimated probability that node i is accepted if its parent is, and
    ``bins[i]`` the bin it was estimated from. Parents come before their children.
    """

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    chances: list[float] = field(default_factory=lambda: [1.0])
    bins: list[tuple[int, ...] | None] = field(default_factory=lambda: [None])

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: int, parent: int, chance: float, bin: tuple[int, ...] | None) -> int:
        """Index of a node for ``token`` below ``parent``: a new one, or the one that is there, with
        the larger of the two chances."""
        for node in self.children(parent):
            if self.tokens[node] == token:
                if chance > self.chances[node]:
                    self.chances[node], self.bins[node] = chance, bin
                return node
        self.tokens.append(token)
        self.parents.append(parent)
        self.chances.append(chance)
        self.bins.append(bin)
        return len(self.tokens) - 1

    def children(self, node: int) -> Iterator[int]:
        return (i for i in range(node + 1, len(self.parents)) if self.parents[i] == node)

    def path(self, node: int) -> list[int]:
        """The nodes from below the root down to ``node``."""
        found = []
        while node > 0:
            found.append(node)
            node = self.parents[node]
        return found[::-1]

    def joint(self) -> list[float]:
        """Estimated probability of each node to be accepted."""
        found = [1.0]
        for node in range(1, len(self)):
            found.append(found[self.parents[node]] * self.chances[node])
        return found

    def sorted_joint(self) -> list[float]:
        """The probabilities of the draft tokens, the largest first."""
        return sorted(self.joint()[1:], reverse=True)

    def keep(self, nodes: Sequence[int]) -> Tree:
        """The tree of ``nodes``, which include their parents, the likeliest path first."""
        kept = set(nodes) | {0}
        result = Tree([self.tokens[0]])
        stack = [(0, -1)]
        while stack:
            node, parent = stack.pop()
            index = 0 if node == 0 else result._append(self, node, parent)
            children = [child for child in self.children(node) if child in kept]
            children.sort(key=lambda child: self.chances[child])
            stack += [(child, index) for child in children]
        return result

    def _append(self, other: Tree, node: int, parent: int) -> int:
        self.tokens.append(other.tokens[node])
        self.parents.append(parent)
        self.chances.append(other.chances[node])
        self.bins.append(other.bins[node])
        return len(self.tokens) - 1
