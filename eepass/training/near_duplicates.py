"""Tell texts that repeat others in nearly the same words."""

from __future__ import annotations

import re
from collections import Counter

WORDS = 3
# Jaccard similarity of two texts' groups of words from which on one repeats the other
SIMILAR = 0.6
# texts remembered for one group of words: frequent ones, stems of questions say, tell little
MOST_TEXTS = 64


class NearDuplicates:
    """The texts seen so far, as sets of ``WORDS`` successive words, letters made small."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._texts: dict[int, list[int]] = {}

    def is_new(self, text: str) -> bool:
        """Whether ``text`` resembles none seen before; then it is remembered."""
        shingles = _shingles(text)
        shared = Counter(n for shingle in shingles for n in self._texts.get(shingle, ()))
        for number, common in shared.most_common(8):
            if common >= SIMILAR * (len(shingles) + self._sizes[number] - common):
                return False
        for shingle in shingles:
            texts = self._texts.setdefault(shingle, [])
            if len(texts) < MOST_TEXTS:
                texts.append(len(self._sizes))
        self._sizes.append(len(shingles))
        return True


def _shingles(text: str) -> set[int]:
    # signs count as words: two pieces of code may differ in nothing else
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    count = max(len(words) - WORDS + 1, 1)
    return {hash(tuple(words[begin : begin + WORDS])) for begin in range(count)}
