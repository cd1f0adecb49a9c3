"""The text of tokens while they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# what stands for bytes that are no whole character
INCOMPLETE = "\ufffd"


class TextStream:
    """Text in pieces that are whole characters: several tokens may make one of them.

    ``decode`` gives the text of some tokens; that of a token depends on the tokens before it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.ids: list[int] = []
        self._decode = decode
        # tokens whose text stands before what is decoded next, and tokens whose text was given
        self._context = self._given = 0

    def add(self, token: int) -> str:
        """The text that ``token`` completes."""
        self.ids.append(token)
        text = self.rest()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._context, self._given = self._given, len(self.ids)
        return text

    def rest(self) -> str:
        """The text that was not given yet, incomplete as it is."""
        before = self._decode(self.ids[self._context : self._given])
        return self._decode(self.ids[self._context :])[len(before) :]
