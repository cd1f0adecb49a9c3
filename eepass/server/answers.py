"""Answers as they grow: text, log-probabilities and the reason they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from eepass.checkpoints.text_stream import TextStream
from eepass.runtime.engine.batch import Request
from eepass.server.processing import Processing, Scored
from eepass.server.stop_strings import StopStrings

Reason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Placed:
    """A scored token and where its text begins in the answer."""

    scored: Scored
    offset: int


@dataclass(slots=True)
class Piece:
    """What an answer has grown by; ``reason``: why it has ended, if it has."""

    index: int
    text: str = ""
    scored: list[Placed] = field(default_factory=list)
    reason: Reason | None = None


class Answer:
    """The answer to one ``request``; ``index``: its number among those to one body."""

    def __init__(
        self, index: int, request: Request, processing: Processing,
        decode: Callable[[Sequence[int]], str], stops: Sequence[str],
    ) -> None:  # fmt: skip
        self.index, self.request, self.processing = index, request, processing
        self.tokens = 0
        self.ended = False
        self._stream, self._stops = TextStream(decode), StopStrings(stops)
        # characters decoded and shown; scored tokens whose text is not shown yet
        self._decoded = self._shown = 0
        self._scored: list[Placed] = []

    def add(self, token: int, scored: Scored | None) -> Piece:
        """What ``token`` adds. Ends the answer at an end token, the limit or a stop string."""
        self.tokens += 1
        if token in self.request.stop:
            return self.end("stop")
        if scored is not None:
            self._scored.append(Placed(scored, self._decoded))
        piece = self._show(self._stream.add(token))
        if piece.reason is None and self.tokens >= self.request.limit:
            last = self.end("length")
            piece.text, piece.reason = piece.text + last.text, last.reason
            piece.scored += last.scored
        return piece

    def end(self, reason: Reason) -> Piece:
        """The last of it: what was held back."""
        piece = self._show(self._stream.rest())
        if piece.reason is None:
            piece.text, piece.reason = piece.text + self._stops.rest(), reason
            piece.scored += self._scored
        self._finish()
        return piece

    def _show(self, text: str) -> Piece:
        self._decoded += len(text)
        shown, stopped = self._stops.add(text)
        self._shown += len(shown)
        out = [placed for placed in self._scored if placed.offset < self._shown]
        self._scored = self._scored[len(out) :]
        if stopped:
            self._finish()
        return Piece(self.index, shown, out, "stop" if stopped else None)

    def _finish(self) -> None:
        self.ended = self.request.enough = True


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """One piece for each answer that has grown or ended, of ``pieces`` in order."""
    found: dict[int, Piece] = {}
    for piece in pieces:
        into = found.setdefault(piece.index, Piece(piece.index))
        into.text += piece.text
        into.scored += piece.scored
        into.reason = piece.reason or into.reason
    return [piece for piece in found.values() if piece.text or piece.scored or piece.reason]
