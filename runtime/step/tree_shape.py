"""Which rows of a speculative pass hold draft tokens, and where those come from."""

from __future__ import annotations

from dataclasses import dataclass

# Fewer draft tokens from the text are one chain. A longer one gains next to nothing: over pages of
# code and prose, 7 in a chain give 1.47 tokens a pass, 15 give 1.47, in branches 1.58
LEAST_FOR_BRANCHES = 8


@dataclass(frozen=True, slots=True)
class TreeShape:
    """The rows after row 0: first ``named`` draft tokens of the trained draft head, the likeliest
    of a tree of ``levels`` levels, then ``branches`` from the text, chains of so many tokens."""

    branches: tuple[int, ...] = ()
    named: int = 0
    levels: int = 0

    @property
    def rows(self) -> int:
        return 1 + self.named + sum(self.branches)

    @property
    def deepest(self) -> int:
        """How many draft tokens can be accepted in one pass."""
        return max(self.levels if self.named else 0, *self.branches, 0)

    @property
    def is_chain(self) -> bool:
        """Whether a path's keys and values always lie where its positions are."""
        return not self.named and len(self.branches) <= 1


def text_branches(drafts: int) -> tuple[int, ...]:
    """The branches of ``drafts`` draft tokens from the text: half of them go on with the likeliest
    place, half of what is left with the next, and so on; few are one chain."""
    if 0 < drafts < LEAST_FOR_BRANCHES:
        return (drafts,)
    branches = []
    while drafts:
        branches.append((drafts + 1) // 2)
        drafts -= branches[-1]
    return tuple(branches)
