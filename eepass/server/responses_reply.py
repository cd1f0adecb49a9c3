"""Answers in the shapes of ``/v1/responses``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from eepass.server.answers import Piece, Reason
from eepass.server.protocol import ResponsesBody
from eepass.server.refusals import Refused
from eepass.server.replies import Reply, TokenText, event


class ResponsesReply(Reply):
    """One message of output text, stored nowhere."""

    prefix = "resp_"

    def __init__(self, model: str, token_text: TokenText, body: ResponsesBody) -> None:
        super().__init__(model, token_text)
        self.body, self.message_id = body, self.id.replace("resp_", "msg_")
        self._number = 0
        self._text, self._reason = "", "stop"

    def whole(self, pieces: Sequence[Piece], usage: tuple[int, int]) -> dict[str, Any]:
        (piece,) = pieces
        return self._response(piece.text, piece.reason, usage)

    def begin(self, choices: int) -> Iterator[bytes]:
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, response=self._response("", None, None))
        item = {**self._message(""), "status": "in_progress", "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._place, part=_part(""))

    def grow(self, piece: Piece) -> Iterator[bytes]:
        self._text += piece.text
        self._reason = piece.reason or self._reason
        if piece.text:
            delta = {"delta": piece.text, "logprobs": []}
            yield self._event("response.output_text.delta", **self._place, **delta)

    def end(self, usage: tuple[int, int]) -> Iterator[bytes]:
        text = self._text
        done = {"text": text, "logprobs": []}
        yield self._event("response.output_text.done", **self._place, **done)
        yield self._event("response.content_part.done", **self._place, part=_part(text))
        yield self._event("response.output_item.done", output_index=0, item=self._message(text))
        last = self._response(text, self._reason, usage)
        yield self._event(f"response.{last['status']}", response=last)

    def fail(self, refused: Refused) -> Iterator[bytes]:
        said = {"code": refused.code, "message": refused.message, "param": refused.param}
        yield self._event("error", **said)

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.message_id, "output_index": 0, "content_index": 0}

    def _event(self, name: str, **data: Any) -> bytes:
        number = self._number
        self._number += 1
        return event({"type": name, "sequence_number": number, **data}, name)

    def _message(self, text: str) -> dict[str, Any]:
        status = "incomplete" if self._reason == "length" else "completed"
        return {
            "id": self.message_id, "type": "message", "role": "assistant", "status": status,
            "content": [_part(text)],
        }  # fmt: skip

    def _response(
        self, text: str, reason: Reason | str | None, usage: tuple[int, int] | None
    ) -> dict[str, Any]:
        """The response object; without a ``reason`` it has not ended."""
        status, why = "in_progress", None
        if reason is not None:
            self._reason = reason
            status = "incomplete" if reason == "length" else "completed"
            why = {"reason": "max_output_tokens"} if reason == "length" else None
        body = self.body
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status,
            "error": None, "incomplete_details": why, "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens, "model": self.model,
            "output": [] if reason is None else [self._message(text)],
            "parallel_tool_calls": False, "previous_response_id": None, "store": False,
            "temperature": body.temperature, "top_p": body.top_p, "tool_choice": "none",
            "tools": [], "metadata": {}, "usage": None if usage is None else _usage(usage),
        }  # fmt: skip


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: tuple[int, int]) -> dict[str, Any]:
    prompt, answer = usage
    return {
        "input_tokens": prompt, "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": answer, "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + answer,
    }  # fmt: skip
