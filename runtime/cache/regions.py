"""Which slots of the cache belong to whom: to sequences that are being decoded, or to kept texts.

A sequence has a contiguous region, in which a token's slot is its position: attention then takes
slots in the order of the text, and a row has the same bits wherever its sequence lies. Regions grow
in place or move. A kept text is what an ended sequence has left, for others that begin with the
same tokens; it lies in slots that nobody needs, and goes when somebody does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# no more texts are kept, however short they are
MOST_KEPT = 64


@dataclass(slots=True, eq=False)
class KeptText:
    """Tokens whose keys and values lie in the slots from ``first`` on."""

    first: int
    tokens: list[int]

    @property
    def end(self) -> int:
        return self.first + len(self.tokens)


class Regions:
    """Regions of ``slots`` slots."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        # by first slot, how many
        self._used: dict[int, int] = {}
        # the least recently used first
        self.kept: list[KeptText] = []

    @property
    def used(self) -> int:
        """Slots that belong to sequences."""
        return sum(self._used.values())

    @property
    def free(self) -> int:
        return self.slots - self.used

    def allocate(self, count: int, top: bool = False) -> int | None:
        """Reserve ``count`` contiguous slots, the lowest there are or those at the ``top``; the
        first of them, or None if there are none."""
        # as many kept texts as possible are spared, the newest above all
        for gone in range(len(self.kept) + 1):
            kept = ((text.first, len(text.tokens)) for text in self.kept[gone:])
            taken = [*self._used.items(), *kept]
            if top:
                # the lowest of the cache turned round
                taken = [(self.slots - first - size, size) for first, size in taken]
            begin = _first_gap(taken, count)
            if begin + count <= self.slots:
                begin = self.slots - begin - count if top else begin
                self._take(begin, count)
                return begin
        return None

    def extend(self, first: int, count: int) -> bool:
        """Let the region from ``first`` on have ``count`` slots; False if others have them."""
        after = [at for at in self._used if at > first]
        if first + count > min(after, default=self.slots):
            return False
        self._take(first, count)
        return True

    def release(self, first: int) -> None:
        """Free the slots that were reserved from ``first`` on."""
        self._used.pop(first, None)

    def keep(self, first: int, tokens: Sequence[int]) -> None:
        """Free the slots reserved from ``first`` on, and remember that they hold ``tokens``."""
        self.release(first)
        if tokens:
            # what it begins with is in it
            text = KeptText(first, list(tokens))
            others = [k for k in self.kept if k.tokens != text.tokens[: len(k.tokens)]]
            self.kept = [*others[1 - MOST_KEPT :], text]

    def touch(self, text: KeptText) -> None:
        """``text`` was used just now."""
        self.kept.remove(text)
        self.kept.append(text)

    def take_over(self, text: KeptText) -> int:
        """The slots of ``text`` become a sequence's; the first of them."""
        self.kept.remove(text)
        self._used[text.first] = len(text.tokens)
        return text.first

    def forget(self) -> None:
        """No text is kept any more."""
        self.kept.clear()

    def _take(self, first: int, count: int) -> None:
        self._used[first] = count
        self.kept = [k for k in self.kept if k.end <= first or k.first >= first + count]


def _first_gap(taken: Iterable[tuple[int, int]], count: int) -> int:
    """The first of ``count`` slots between or behind the regions ``taken``."""
    begin = 0
    for first, size in sorted(taken):
        if first - begin >= count:
            break
        begin = max(begin, first + size)
    return begin


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    least, most = 0, min(len(one), len(other))
    # comparing slices is a call, comparing tokens one by one is many
    while least < most:
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least
