"""Requests on their way: admitted, decoded, timed out, and ended when the server stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from enum import Enum
from typing import Any, TypeVar

from eepass.runtime.engine.batch import Request
from eepass.runtime.sampling import GREEDY
from eepass.server.answers import Piece, joined
from eepass.server.jobs import Job
from eepass.server.options import ServerOptions
from eepass.server.records import Record
from eepass.server.refusals import Refused
from eepass.server.served import ServedModel

# tokenising and templates; more would take the cores that decode
TEXT_THREADS = 2
# for clients to be told that an answer was cut short
CUT_SECONDS = 2.0
CHECK_SECONDS = 20.0
T = TypeVar("T")


class Cut(Enum):
    """Why an answer ends though the model would go on."""

    TIME = "timeout"
    STOP = "stopping"


class Ticket:
    """One admitted request; ``begun``: it has its first token."""

    def __init__(self, record: Record) -> None:
        self.record, self.begun = record, False
        # tokens with their requests, an error, or a ``Cut``
        self.given: asyncio.Queue[Any] = asyncio.Queue()


class Service:
    """Decodes jobs for the handlers of one event loop, within the limits of ``options``."""

    def __init__(self, model: ServedModel, options: ServerOptions) -> None:
        self.model, self.options = model, options
        self.stopping = False
        self.tickets: set[Ticket] = set()
        self._threads = ThreadPoolExecutor(TEXT_THREADS, "eepass-text")
        self._at_once = asyncio.Semaphore(options.at_once) if options.at_once else None

    @property
    def waiting(self) -> int:
        """Requests whose answer has not begun; of any thread."""
        return sum(not ticket.begun for ticket in list(self.tickets))

    @contextmanager
    def admitted(self, record: Record) -> Iterator[Ticket]:
        """A place for one request, until its answer has been sent; ``Refused`` at once where there
        is none."""
        self.refuse_stopping()
        if self.waiting >= self.options.max_waiting:
            message = f"{self.options.max_waiting} requests are waiting already: try again"
            raise Refused(429, message, None, "rate_limit_exceeded", {"retry-after": "1"})
        ticket = Ticket(record)
        self.tickets.add(ticket)
        timer = asyncio.get_running_loop().call_later(
            self.options.timeout, ticket.given.put_nowait, Cut.TIME
        )
        try:
            yield ticket
        finally:
            timer.cancel()
            self.tickets.discard(ticket)

    def refuse_stopping(self) -> None:
        if self.stopping:
            message = "the server is stopping and takes no more requests"
            raise Refused(503, message, None, "stopping", {"connection": "close"})

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """What takes long in Python, beside the event loop."""
        running = asyncio.get_running_loop()
        return await running.run_in_executor(self._threads, function, *arguments)

    async def decode(self, job: Job, ticket: Ticket) -> AsyncGenerator[list[Piece], None]:
        """What the answers of ``job`` grow by, until all have ended.

        Whoever stops reading closes the iterator, which frees their slots within a pass. Raises
        ``Refused`` where the time is over (504) or the server stops (503).
        """
        async with _Turn(self._at_once, ticket):
            answers = {answer.request: answer for answer in job.answers}
            running, given = asyncio.get_running_loop(), ticket.given

            def put(item: Any) -> None:
                # in the engine's thread
                if isinstance(item, tuple) and item[1] is not None:
                    item = (*item, answers[item[0]].processing.take(item[1]))
                # an event loop that has ended wants no more tokens
                with suppress(RuntimeError):
                    running.call_soon_threadsafe(given.put_nowait, item)

            tokens = await self.in_thread(self.model.submit, job.requests, put)
            try:
                while not all(answer.ended for answer in job.answers):
                    pieces = []
                    for item in await _all_of(given):
                        if not isinstance(item, tuple):
                            raise _end_of(item)
                        request, token, *scored = item
                        answer = answers[request]
                        if answer.ended:
                            continue
                        if token is None:
                            pieces.append(answer.end("length"))
                            continue
                        ticket.begun = True
                        ticket.record.token()
                        pieces.append(answer.add(token, *scored))
                    if grown := joined(pieces):
                        yield grown
            finally:
                tokens.cancel()

    async def check(self) -> None:
        """Raises where the model does not decode within ``CHECK_SECONDS``; while it is busy, time
        is up to the requests."""
        if self.tickets:
            return
        given: asyncio.Queue[Any] = asyncio.Queue()
        running = asyncio.get_running_loop()

        def put(item: Any) -> None:
            running.call_soon_threadsafe(given.put_nowait, item)

        request = Request([0], 1, frozenset(), GREEDY)
        async with asyncio.timeout(CHECK_SECONDS):
            tokens = await self.in_thread(self.model.submit, [request], put)
            try:
                found = await given.get()
            finally:
                tokens.cancel()
        if isinstance(found, BaseException):
            raise found

    async def drain(self, seconds: float) -> None:
        """Take no more requests; let answers end for ``seconds``, then end them."""
        self.stopping = True
        await self._empty(seconds)
        for ticket in self.tickets:
            ticket.given.put_nowait(Cut.STOP)
        await self._empty(CUT_SECONDS)

    async def _empty(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.tickets:
                    await asyncio.sleep(0.02)


class _Turn:
    """Waits in line, where only some requests are decoded at once; a ``Cut`` ends the wait."""

    def __init__(self, line: asyncio.Semaphore | None, ticket: Ticket) -> None:
        self.line, self.ticket = line, ticket

    async def __aenter__(self) -> None:
        if self.line is None:
            return
        turn = asyncio.ensure_future(self.line.acquire())
        cut = asyncio.ensure_future(self.ticket.given.get())
        try:
            await asyncio.wait({turn, cut}, return_when=asyncio.FIRST_COMPLETED)
            if cut.done():
                raise _end_of(cut.result())
        except BaseException:
            # also where the request is cancelled: its turn is the next one's
            if turn.done() and not turn.cancelled():
                self.line.release()
            turn.cancel()
            raise
        finally:
            cut.cancel()

    async def __aexit__(self, *details: Any) -> None:
        if self.line is not None:
            self.line.release()


async def _all_of(queue: asyncio.Queue[Any]) -> list[Any]:
    """What is in ``queue``, at least one item."""
    items = [await queue.get()]
    while not queue.empty():
        items.append(queue.get_nowait())
    return items


def _end_of(item: Any) -> Refused | BaseException:
    if item is Cut.TIME:
        return Refused(504, "the answer took too long: ask for a shorter one", None, "timeout")
    if item is Cut.STOP:
        return Refused(503, "the server was stopped before the answer ended", None, "stopping")
    return item if isinstance(item, BaseException) else RuntimeError(str(item))
