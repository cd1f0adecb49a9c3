"""How likely a draft token is to be accepted, learned by bins."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from eepass.runtime.drafting.tree import Tree

Bin = tuple[int, ...]
# the sources of draft tokens, first in their bins
EAGLE, TEXT, MODEL = range(3)
# A draft token's *chance* is the probability that it is accepted if its parent is. Draft tokens are
# sorted into bins (source, what the source knows of them), and a bin's chance is learned. The edges
# of the bins of a source's own estimates:
CHANCE_EDGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96)
# usual chances of a model's likeliest draft tokens below an accepted one, and how fast they follow
CHILD_CHANCES, CHILD_RATE = (0.5, 0.13, 0.06), 0.03
# an estimate counts like so many observations; older observations fade
PRIOR_WEIGHT, FADE = 8.0, 0.99
# no bin is surer than this
LEAST, MOST = 0.001, 0.998


def estimate_bin(chance: float) -> int:
    """The bin of a source's own estimate."""
    return bisect(CHANCE_EDGES, chance)


@dataclass(slots=True)
class Acceptance:
    """``observed``: by bin, how many draft tokens were accepted and how many verified, older ones
    fading."""

    observed: dict[Bin, tuple[float, float]] = field(default_factory=dict)
    # of the likeliest tokens that a draft's model names below an accepted draft token
    children: list[float] = field(default_factory=lambda: list(CHILD_CHANCES))

    def chance(self, bin: Bin, prior: float) -> float:
        """The chance of a draft token in ``bin``, whose source estimates it at ``prior``."""
        hits, verified = self.observed.get(bin, (0.0, 0.0))
        # what was estimated fades like anything observed
        weight = PRIOR_WEIGHT * max(1 - verified * (1 - FADE), 0.0) + 1e-9
        return min(max((hits + weight * prior) / (verified + weight), LEAST), MOST)

    def learn(self, tree: Tree, tokens: Sequence[int]) -> None:
        """``tokens`` followed the root of ``tree``, whether its nodes were run or not."""
        node = 0
        for token in tokens:
            follower, children = 0, list(tree.children(node))
            if node and children:
                self._learn_children(tree, children, token)
            for child in children:
                hit = tree.tokens[child] == token
                follower = child if hit else follower
                if (bin := tree.bins[child]) is not None:
                    hits, verified = self.observed.get(bin, (0.0, 0.0))
                    self.observed[bin] = (hits * FADE + hit, verified * FADE + 1)
            if not follower:
                return
            node = follower

    def _learn_children(self, tree: Tree, children: Sequence[int], token: int) -> None:
        named = [child for child in children if (tree.bins[child] or (TEXT,))[0] != TEXT]
        named.sort(key=lambda child: -tree.chances[child])
        for rank, child in enumerate(named[: len(self.children)]):
            hit = tree.tokens[child] == token
            self.children[rank] += CHILD_RATE * (hit - self.children[rank])
