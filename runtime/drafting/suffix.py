"""Text drafts: what followed the same tokens before, in this text and in earlier ones.

After SuffixDecoding (Oliaro et al., 2024): the places where the last tokens of the text stood
before are found, the longest matches first. How much matches there, and how often each continuation
was taken, decide which branches are drafted and how far.
"""

from __future__ import annotations

from bisect import bisect, bisect_left
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from eepass.runtime.drafting.budget import Budget
from eepass.runtime.drafting.draft import TEXT
from eepass.runtime.drafting.features import ReadFeatures
from eepass.runtime.drafting.tree import Tree

# no more tokens of a match are counted, and no more places looked at
LONGEST, PLACES = 24, 6
# so many places that match as far as is counted are enough
ENOUGH = 4
# after the last token of a text
END = -1
# the bins of a branch: by the tokens that match, and by its share of the places that match as far
LENGTH_EDGES, SHARE_EDGES = (3, 4, 6, 9, 14, 22), (0.2, 0.4, 0.6, 0.999)
# estimated chance of a branch by its bin of tokens that match, until it is learned; and by how much
# it is lower where a longer match goes on with another token
PRIORS, OUTDONE = (0.3, 0.45, 0.6, 0.7, 0.8, 0.9, 0.95), 0.25


class Place(NamedTuple):
    """``tokens[at]`` follows ``matched`` tokens that are the last ones of the text drafted for."""

    tokens: Sequence[int]
    at: int
    matched: int


class Branch(NamedTuple):
    """One continuation: how far the longest of its ``places`` matches, its share of all the places
    that match so far, and whether a longer match goes on with another token."""

    token: int
    matched: int
    share: float
    outdone: bool
    places: list[Place]


class TextIndex:
    """A text, and chains of the positions that follow the same two tokens.

    What follows one token alone is not worth looking for: it is right too rarely.

    Memory is bounded: beside the text itself, of its last ``reach`` to 2 * ``reach`` tokens.
    """

    def __init__(self, reach: int) -> None:
        self.tokens: list[int] = []
        self.reach = reach
        # the newest position after some tokens, and from position ``_first`` on, the one before
        self._newest: dict[tuple[int, int], int] = {}
        self._older: list[int] = []
        self._first = 0

    def extend(self, tokens: Sequence[int]) -> None:
        text, newest = self.tokens, self._newest
        for token in tokens:
            older = END
            if len(text) > 1:
                pair = text[-2], text[-1]
                older = newest.get(pair, END)
                newest[pair] = len(text)
            self._older.append(older)
            text.append(token)
        if len(self._older) >= 2 * self.reach:
            self._forget(len(text) - self.reach)

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens, as if no others had been there."""
        text = self.tokens
        for _ in range(len(text) - max(length, self._first)):
            text.pop()
            at = self._older.pop()
            if len(text) > 1:
                pair = text[-2], text[-1]
                if at < self._first:
                    del self._newest[pair]
                else:
                    self._newest[pair] = at
        if length < self._first:
            del text[length:]
            self._first = length

    def places(self, context: Sequence[int]) -> Iterator[Place]:
        """Where the last two tokens of ``context`` stand, the newest first."""
        text, size = self.tokens, len(context)
        at = self._newest.get((context[-2], context[-1]), END) if size > 1 else END
        while at >= self._first and at > 0:
            matched, most = 2, min(LONGEST, size, at)
            while matched < most and text[at - 1 - matched] == context[-1 - matched]:
                matched += 1
            yield Place(text, at, matched)
            at = self._older[at - self._first]

    def _forget(self, first: int) -> None:
        """Index nothing before position ``first``."""
        del self._older[: first - self._first]
        self._first = first
        self._newest = {key: at for key, at in self._newest.items() if at >= first}


class EarlierTexts:
    """Texts of earlier requests of this process: the last ``reach`` to 2 * ``reach`` tokens."""

    def __init__(self, reach: int = 16384) -> None:
        self.reach = reach
        self.indexes = [TextIndex(reach)]

    def add(self, tokens: Sequence[int]) -> None:
        if len(self.indexes[-1].tokens) >= self.reach:
            self.indexes = [self.indexes[-1], TextIndex(self.reach)]
        self.indexes[-1].extend([*tokens[-self.reach :], END])


class SuffixDraft:
    """Drafts a tree of what followed the last tokens of the text before, in the text itself and in
    ``earlier`` ones."""

    feature_layers: tuple[int, ...] | None = None
    expected: float = 1.2
    calls: float = 0.0
    REACH = 8192

    def __init__(self, earlier: EarlierTexts | None = None) -> None:
        self.text, self.earlier = TextIndex(self.REACH), earlier

    def follow(self, tokens: Sequence[int]) -> None:
        self.text.extend(tokens)

    def propose(self, root: int, budget: Budget, read: ReadFeatures | None = None) -> Tree:
        tree = Tree([root])
        self.add_to(tree, 0, budget)
        return tree

    def add_to(self, tree: Tree, leaf: int, budget: Budget) -> None:
        """Grow ``tree`` below ``leaf``, the likeliest draft tokens first."""
        places = self.places([tree.tokens[n] for n in tree.path(leaf)])
        if not places:
            return
        number, joint, node = 0, tree.joint()[leaf], leaf
        waiting: list[tuple[float, int, int, float, Branch, tuple[int, ...]]] = []
        for _ in range(budget.most):
            if not places:
                # the text ended there: what is drafted is a text to go on with as well
                places = self.places([tree.tokens[n] for n in tree.path(node)])
            for branch in branches(places):
                bin, prior = _bin(branch)
                chance = budget.chance(bin, prior)
                if budget.worth_a_row(joint * chance):
                    # numbered, so that branches themselves are never compared
                    number += 1
                    heappush(waiting, (-joint * chance, number, node, chance, branch, bin))
            if not waiting:
                return
            negative, _, parent, chance, branch, bin = heappop(waiting)
            joint, node = -negative, tree.add(branch.token, parent, chance, bin)
            places = [
                Place(place.tokens, place.at + 1, place.matched + 1)
                for place in branch.places
                if place.at + 1 < len(place.tokens)
            ]

    def places(self, path: Sequence[int] = ()) -> list[Place]:
        """Where the last tokens of the text and ``path`` stand."""
        context = [*self.text.tokens[-LONGEST:], *path][-LONGEST:]
        indexes = [self.text, *(self.earlier.indexes[::-1] if self.earlier else ())]
        found, full = list[Place](), 0
        for index in indexes:
            for place in index.places(context):
                found.append(place)
                full += place.matched == LONGEST
                if full == ENOUGH or len(found) == PLACES:
                    return found
        return found

    def continuation(self, path: Sequence[int], most: int) -> tuple[list[int], int]:
        """Up to ``most`` tokens that followed the longest match of the text and ``path``, the
        newest of several, and how many tokens matched there."""
        places = self.places(path)
        if not places:
            return [], 0
        best = max(places, key=lambda place: place.matched)
        found = list(best.tokens[best.at : best.at + most])
        return found[: found.index(END)] if END in found else found, best.matched

    def truncate(self, length: int) -> None:
        self.text.truncate(length)

    def call_seconds(self) -> float:
        return 0.0

    def fresh(self) -> SuffixDraft:
        return SuffixDraft(self.earlier)


def branches(places: list[Place]) -> list[Branch]:
    """The tokens that follow at ``places``."""
    if len(places) == 1:
        tokens, at, matched = places[0]
        return [] if tokens[at] == END else [Branch(tokens[at], matched, 1.0, False, places)]
    found: dict[int, list[Place]] = {}
    for place in places:
        found.setdefault(place.tokens[place.at], []).append(place)
    lengths = sorted(place.matched for place in places)
    result = []
    for token, group in found.items():
        if token != END:
            own = [place.matched for place in group]
            matched = max(own)
            share = own.count(matched) / (len(lengths) - bisect_left(lengths, matched))
            result.append(Branch(token, matched, share, matched < lengths[-1], group))
    return result


def _bin(branch: Branch) -> tuple[tuple[int, ...], float]:
    """The bin of a branch, and its estimated chance as long as nothing is learned."""
    length = bisect(LENGTH_EDGES, branch.matched)
    bin = (TEXT, length, bisect(SHARE_EDGES, branch.share), int(branch.outdone))
    return bin, PRIORS[length] * branch.share * (OUTDONE if branch.outdone else 1.0)
