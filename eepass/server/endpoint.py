"""The endpoint of all three kinds of request: read a body, decode it, reply whole or in events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from pydantic_core import to_json

from eepass.server.answers import joined
from eepass.server.guards import Receive, Scope, Send, failure, log_failure
from eepass.server.jobs import Job, make_job
from eepass.server.protocol import Body, read_body
from eepass.server.records import Record
from eepass.server.refusals import ClientGone, Refused
from eepass.server.replies import Reply
from eepass.server.service import Service, Ticket

EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # a proxy must not collect them
    (b"x-accel-buffering", b"no"),
]
JSON = [(b"content-type", b"application/json")]


class Generate:
    """An ASGI endpoint: reads a body, decodes it, and replies whole or in events."""

    def __init__(self, service: Service, kind: Any, reply: Callable[[Any], Reply]) -> None:
        self.service, self.kind, self.reply = service, kind, reply

    async def __call__(self, scope: Scope, receive: Receive, send: Any) -> None:
        record: Record = scope["eepass.record"]
        record.route = scope["path"]
        self.service.refuse_stopping()
        data = await _read_all(receive)
        with self.service.admitted(record) as ticket:
            await _unless_gone(receive, send, self._answer(data, ticket, send))

    async def _answer(self, data: bytes, ticket: Ticket, send: Send) -> None:
        body, job = await self.service.in_thread(self._read, data)
        del data
        ticket.record.prompt_tokens = job.prompt_tokens
        reply = self.reply(body)
        answering = self._stream if body.stream else self._whole
        await answering(job, ticket, reply, send)

    def _read(self, data: bytes) -> tuple[Body, Job]:
        body = read_body(self.kind, data)
        return body, make_job(body, self.service.model, self.service.options)

    async def _whole(self, job: Job, ticket: Ticket, reply: Reply, send: Send) -> None:
        pieces = []
        async with aclosing(self.service.decode(job, ticket)) as groups:
            async for group in groups:
                pieces += group
        whole = sorted(joined(pieces), key=lambda piece: piece.index)
        data = to_json(reply.whole(whole, (job.prompt_tokens, job.answer_tokens)))
        headers = [*JSON, (b"content-length", str(len(data)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data})

    async def _stream(self, job: Job, ticket: Ticket, reply: Reply, send: Send) -> None:
        begun = False
        try:
            async with aclosing(self.service.decode(job, ticket)) as groups:
                async for group in groups:
                    events = list[bytes]()
                    if not begun:
                        begun = True
                        start = {"type": "http.response.start", "status": 200, "headers": EVENTS}
                        await send(start)
                        events += reply.begin(len(job.answers))
                    for piece in group:
                        events += reply.grow(piece)
                    await _send_events(send, events, True)
            last = reply.end((job.prompt_tokens, job.answer_tokens))
        except Exception as error:
            # before the first token there is still a status to answer with
            if not begun:
                raise
            last = _broken_off(error, job, ticket.record, reply)
        await _send_events(send, list(last), False)


def _broken_off(error: Exception, job: Job, record: Record, reply: Reply) -> Iterator[bytes]:
    """The last events of answers that cannot go on."""
    if not isinstance(error, Refused):
        log_failure(error, record)
        error = failure(record)
    record.code = error.code
    if error.code != "stopping":
        yield from reply.fail(error)
        return
    for answer in job.answers:
        if not answer.ended:
            yield from reply.grow(answer.end("length"))
    yield from reply.end((job.prompt_tokens, job.answer_tokens))


async def _send_events(send: Send, events: Sequence[bytes], more: bool) -> None:
    data = b"".join(events)
    if data or not more:
        await send({"type": "http.response.body", "body": data, "more_body": more})


async def _read_all(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _unless_gone(receive: Receive, send: Any, answer: Coroutine[Any, Any, None]) -> None:
    """Await ``answer``, but not once the client has hung up."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answering, watching = asyncio.create_task(answer), asyncio.create_task(gone())
    try:
        await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
        # after the answer a server says "disconnect" as well
        if not answering.done() and not send.complete:
            raise ClientGone
        await answering
    finally:
        for task in (answering, watching):
            task.cancel()
        await asyncio.gather(answering, watching, return_exceptions=True)
