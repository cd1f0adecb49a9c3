"""Answers in the shapes of the OpenAI protocol, whole and as server-sent events."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from pydantic_core import to_json

from eepass.server.answers import Piece, Placed
from eepass.server.refusals import Refused

DONE = b"data: [DONE]\n\n"
TokenText = Callable[[int], str]


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + to_json(data) + b"\n\n"


class Reply(ABC):
    """What is sent for one body; ``usage`` is (prompt tokens, answer tokens)."""

    prefix: ClassVar[str]

    def __init__(self, model: str, token_text: TokenText, with_usage: bool = False) -> None:
        self.id = f"{self.prefix}{secrets.token_hex(12)}"
        self.created, self.model = int(time.time()), model
        self.token_text, self.with_usage = token_text, with_usage

    @abstractmethod
    def whole(self, pieces: Sequence[Piece], usage: tuple[int, int]) -> dict[str, Any]:
        """The answer as one object, of one piece a choice."""

    def begin(self, choices: int) -> Iterator[bytes]:
        """Events before any text."""
        yield from ()

    @abstractmethod
    def grow(self, piece: Piece) -> Iterator[bytes]:
        """Events for what one choice has grown by."""

    @abstractmethod
    def end(self, usage: tuple[int, int]) -> Iterator[bytes]:
        """Events after all choices have ended."""

    def fail(self, refused: Refused) -> Iterator[bytes]:
        """Events in place of the rest of an answer."""
        yield event(refused.body)
        yield DONE


class ChoicesReply(Reply):
    """What chat and text completions have in common."""

    whole_object: ClassVar[str]
    part_object: ClassVar[str]

    def whole(self, pieces: Sequence[Piece], usage: tuple[int, int]) -> dict[str, Any]:
        choices = [self.choice(piece) for piece in pieces]
        return {**self._head(self.whole_object), "choices": choices, "usage": _usage(usage)}

    def grow(self, piece: Piece) -> Iterator[bytes]:
        choices = [self.part(piece)]
        usage = {"usage": None} if self.with_usage else {}
        yield event({**self._head(self.part_object), "choices": choices, **usage})

    def end(self, usage: tuple[int, int]) -> Iterator[bytes]:
        if self.with_usage:
            last = {"choices": [], "usage": _usage(usage)}
            yield event({**self._head(self.part_object), **last})
        yield DONE

    @abstractmethod
    def choice(self, piece: Piece) -> dict[str, Any]:
        """A choice of the whole answer."""

    @abstractmethod
    def part(self, piece: Piece) -> dict[str, Any]:
        """A choice of an event."""

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class ChatReply(ChoicesReply):
    """``/v1/chat/completions``"""

    prefix = "chatcmpl-"
    whole_object, part_object = "chat.completion", "chat.completion.chunk"

    def begin(self, choices: int) -> Iterator[bytes]:
        for index in range(choices):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield event({**self._head(self.part_object), "choices": [choice]})

    def choice(self, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"message": message, **self._common(piece)}

    def part(self, piece: Piece) -> dict[str, Any]:
        return {"delta": {"content": piece.text} if piece.text else {}, **self._common(piece)}

    def _common(self, piece: Piece) -> dict[str, Any]:
        scored = [self._logprob(placed) for placed in piece.scored]
        logprobs = {"content": scored, "refusal": None} if scored else None
        return {"index": piece.index, "logprobs": logprobs, "finish_reason": piece.reason}

    def _logprob(self, placed: Placed) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.token_text(token)
            # of a part of a character the bytes are not known here
            known = None if "�" in text else list(text.encode())
            return {"token": text, "logprob": logprob, "bytes": known}

        scored = placed.scored
        top = [entry(*pair) for pair in scored.top]
        return {**entry(scored.token, scored.logprob), "top_logprobs": top}


class CompletionReply(ChoicesReply):
    """``/v1/completions``"""

    prefix = "cmpl-"
    whole_object = part_object = "text_completion"

    def choice(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.index, "text": piece.text, "logprobs": self._logprobs(piece),
            "finish_reason": piece.reason,
        }  # fmt: skip

    part = choice

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not piece.scored:
            return None
        scored, text = [placed.scored for placed in piece.scored], self.token_text
        return {
            "tokens": [text(one.token) for one in scored],
            "token_logprobs": [one.logprob for one in scored],
            "top_logprobs": [{text(token): value for token, value in one.top} for one in scored],
            "text_offset": [placed.offset for placed in piece.scored],
        }


def _usage(usage: tuple[int, int]) -> dict[str, int]:
    prompt, answer = usage
    return {
        "prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer
    }  # fmt: skip
