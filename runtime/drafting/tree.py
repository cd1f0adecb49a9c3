"""Draft tokens as a tree: each path from the root is one way the answer may go on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Tree:
    """Node 0 is the root, the last token decoded; the others are drafts.

    ``chances[i]`` estimates that node i is right where its parent is; ``bins[i]`` names the
    estimate, so that it can learn. Parents come before their children.
    """

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    chances: list[float] = field(default_factory=lambda: [1.0])
    bins: list[tuple[int, ...] | None] = field(default_factory=lambda: [None])

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: int, parent: int, chance: float, bin: tuple[int, ...] | None) -> int:
        """A node for ``token`` after ``parent``; one that is there already keeps the larger
        chance. Returns its index."""
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
        """Nodes from below the root down to ``node``."""
        found = []
        while node > 0:
            found.append(node)
            node = self.parents[node]
        return found[::-1]

    def joint(self) -> list[float]:
        """Estimated chance of each node to be on the right path."""
        found = [1.0]
        for node in range(1, len(self)):
            found.append(found[self.parents[node]] * self.chances[node])
        return found

    def keep(self, nodes: Sequence[int]) -> Tree:
        """The tree of ``nodes`` (with a node its parents), the likeliest path first."""
        kept = set(nodes) | {0}
        made = Tree([self.tokens[0]])
        stack = [(0, -1)]
        while stack:
            node, parent = stack.pop()
            place = 0 if node == 0 else made._append(self, node, parent)
            inside = [child for child in self.children(node) if child in kept]
            inside.sort(key=lambda child: self.chances[child])
            stack += [(child, place) for child in inside]
        return made

    def _append(self, other: Tree, node: int, parent: int) -> int:
        self.tokens.append(other.tokens[node])
        self.parents.append(parent)
        self.chances.append(other.chances[node])
        self.bins.append(other.bins[node])
        return len(self.tokens) - 1
