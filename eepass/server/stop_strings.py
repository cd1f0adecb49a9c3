"""Text up to the first of some stop strings."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first of ``stops``; what could begin one is held back.

    Each stop string has a Knuth-Morris-Pratt automaton, so a character costs the same however long
    they are, and where the text is cut does not depend on the parts it comes in.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = list(stops)
        self._failures = [_failure(stop) for stop in self.stops]
        self._matched = [0] * len(self.stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string has ended it."""
        if not self.stops:
            return text, False
        for at, character in enumerate(text):
            if length := self._advance(character):
                shown = self._held + text[: at + 1]
                self._held = ""
                return shown[: len(shown) - length], True
        shown = self._held + text
        end = len(shown) - max(self._matched)
        self._held = shown[end:]
        return shown[:end], False

    def rest(self) -> str:
        """What was held back, where no more text comes."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> int:
        """The length of the longest stop string that ``character`` completes, or 0."""
        found = 0
        for index, (stop, failure) in enumerate(zip(self.stops, self._failures, strict=True)):
            matched = self._matched[index]
            while matched and stop[matched] != character:
                matched = failure[matched - 1]
            matched += stop[matched] == character
            self._matched[index] = matched
            if matched == len(stop):
                found = max(found, matched)
        return found


def _failure(stop: str) -> list[int]:
    """For each prefix of ``stop``: the length of its longest proper prefix that also ends it."""
    failure, matched = [0] * len(stop), 0
    for at in range(1, len(stop)):
        while matched and stop[matched] != stop[at]:
            matched = failure[matched - 1]
        matched += stop[matched] == stop[at]
        failure[at] = matched
    return failure
