"""uvicorn's HTTP/1.1 connections, with an end to clients that send, or read, too slowly."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from eepass.server.options import ServerOptions
from eepass.server.refusals import Refused


def protocol_for(options: ServerOptions) -> type[H11Protocol]:
    """The class of connections within the limits of ``options``."""

    class Connection(_Connection):
        slow_timeout, max_connections = options.slow_timeout, options.max_connections

    return Connection


class _Connection(H11Protocol):
    """A connection has ``slow_timeout`` seconds to send each whole request, the first one from when
    it is opened, and as long to read on when its buffer is full."""

    slow_timeout: float
    max_connections: int
    _receiving: asyncio.TimerHandle | None = None
    _sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            message = f"more than {self.max_connections} connections: try again"
            self._answer(Refused(503, message, None, "too_many_connections"))
            return
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("_receiving")
        self._stop("_sending")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._await_request()
        else:
            self._stop("_receiving")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._sending = self.loop.call_later(self.slow_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("_sending")

    def send_400_response(self, msg: str) -> None:
        """In the same shape as every other error."""
        self._answer(Refused(400, msg))

    def _await_request(self) -> None:
        if self._receiving is None:
            self._receiving = self.loop.call_later(self.slow_timeout, self.transport.abort)

    def _stop(self, name: str) -> None:
        timer: asyncio.TimerHandle | None = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)

    def _answer(self, refused: Refused) -> None:
        """Answer without the application, and close."""
        body = refused.encoded
        headers = [
            ("content-type", "application/json"), ("content-length", str(len(body))),
            ("connection", "close"),
        ]  # fmt: skip
        for event in (
            h11.Response(status_code=refused.status, headers=headers), h11.Data(data=body),
            h11.EndOfMessage(),
        ):  # fmt: skip
            self.transport.write(self.conn.send(event))
        self.transport.close()
