"""Requests of any thread, decoded together: they join and leave at any pass.

Prompts are run in chunks between passes, so that no running answer waits for a long one. The loop
has a thread of its own as long as there is something to decode, and the engine is that thread's
alone. Each request says what it says alone, so nobody sees who else was there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from queue import SimpleQueue
from threading import Event, Lock, Thread, current_thread
from typing import NamedTuple

import torch
from torch import Tensor

from eepass.errors import EngineError
from eepass.runtime.engine.batch import Batch, Request
from eepass.runtime.engine.engine import Engine
from eepass.runtime.sampling import Process

# how long running answers wait at most for others' prompts, between two passes: a chunk that is
# smaller than all there is code for takes as long as it takes
STALL_SECONDS = 0.5

# a token of a request, None where it has ended; or what ended all requests of a caller
Given = tuple[Request, int | None] | BaseException


class LoopState(NamedTuple):
    """How many requests are being decoded, and how many wait for room; how many of the cache's
    slots belong to sequences, and how many more hold texts that are kept for others."""

    running: int
    waiting: int
    slots_used: int
    slots_kept: int
    slots: int


class _Submission:
    """Requests of one caller, where to put what they give, and whether they have left the loop."""

    def __init__(self, requests: SequenceOf[Request], put: Callable[[Given], object]) -> None:
        self.requests, self.put = list(requests), put
        self.left = set(requests)
        self.gone = Event()
        self.error: BaseException | None = None

    def leave(self, request: Request) -> None:
        self.left.discard(request)
        self.put((request, None) if self.error is None else self.error)
        if not self.left:
            self.gone.set()

    def fail(self, error: BaseException) -> None:
        """No more of these requests: ``error`` is raised where their tokens are read."""
        self.error = self.error or error
        self.cancel()

    def cancel(self) -> None:
        for request in self.requests:
            request.enough = True


class Tokens(Iterator[tuple[Request, int]]):
    """The tokens of some requests, as they are confirmed; ``close`` takes the requests out."""

    def __init__(self, submission: _Submission, given: SimpleQueue[Given]) -> None:
        self._submission, self._going = submission, len(submission.requests)
        self._given = given

    def __next__(self) -> tuple[Request, int]:
        while self._going:
            found = self._given.get()
            if isinstance(found, BaseException):
                self.close()
                raise found
            request, token = found
            if token is None:
                self._going -= 1
            elif not request.enough:
                return request, token
        self.close()
        raise StopIteration

    def close(self) -> None:
        """Returns when the slots of all requests are free."""
        self._going = 0
        self.cancel()
        self._submission.gone.wait()

    def cancel(self) -> None:
        """The requests leave before the next pass; what they have given is not read any more."""
        self._submission.cancel()

    def __del__(self) -> None:
        # nobody reads on
        self.cancel()


class EngineLoop:
    """Decodes with ``engine`` what is submitted, as many requests at once as it has rows for."""

    def __init__(self, engine: Engine, release: Callable[[], None] = lambda: None) -> None:
        """``release`` is called by a thread that submits, before the loop's own thread begins: that
        computes, and the other one should leave it the processors."""
        self.engine, self._release = engine, release
        self._lock = Lock()
        self._new: deque[tuple[Request, _Submission]] = deque()
        self._thread: Thread | None = None
        self._decoding: _Decoding | None = None

    def state(self) -> LoopState:
        """As of now; of any thread."""
        regions = self.engine.decoder.kv.regions
        with self._lock:
            decoding, waiting = self._decoding, len(self._new)
            kept = sum(len(text.tokens) for text in list(regions.kept))
            running = 0
            if decoding is not None:
                running, waiting = len(decoding.running), waiting + len(decoding.waiting)
            return LoopState(running, waiting, regions.used, kept, regions.slots)

    def submit(
        self, requests: SequenceOf[Request], put: Callable[[Given], object] | None = None
    ) -> Tokens:
        """Tokens of ``requests`` as they are confirmed, those of one request in order.

        They are decoded from now on, whether tokens are read or not. When the iterator has ended,
        failed, or is closed, none of the requests is in the cache any more: a request whose
        ``enough`` is set leaves before the next pass. With ``put`` there is nothing to iterate
        over: it is called with what comes, in the loop's own thread, and must neither wait nor
        fail; what ends all requests it is given once for each. Raises ``EngineError`` as
        ``decode_batch`` does, or where a ``process`` that it calls submits and would wait for it,
        and whatever a ``process`` of their own raises.
        """
        if put is None and current_thread() is self._thread:
            raise EngineError(
                "a process of a request asks the model that waits for it: it would wait for ever; "
                "give it a model of its own"
            )
        given: SimpleQueue[Given] = SimpleQueue()
        submission = _Submission(requests, put or given.put)
        if not requests:
            submission.gone.set()
        for request in requests:
            if request.sampling.process is not None:
                guarded = _guarded(request.sampling.process, submission)
                request.sampling = replace(request.sampling, process=guarded)
        with self._lock:
            self._new += [(request, submission) for request in requests]
            if self._thread is None and requests:
                self._release()
                thread = Thread(target=self._run, name="eepass")
                thread.start()
                self._thread = thread
        return Tokens(submission, given)

    @torch.no_grad()
    def _run(self) -> None:
        # a thread begins with all cores, whatever was asked for
        torch.set_num_threads(torch.get_num_threads())
        decoding = _Decoding(Batch(self.engine, self.engine.step_rows))
        while True:
            with self._lock:
                self._decoding = decoding
                decoding.waiting += self._new
                self._new.clear()
                if not decoding.busy:
                    self._thread = self._decoding = None
                    return
            try:
                decoding.advance()
            except BaseException as error:
                # whatever it is, the callers wait for it
                decoding.fail(error)


class _Decoding:
    """What the loop's thread is decoding."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.waiting: deque[tuple[Request, _Submission]] = deque()
        self.running: dict[Request, _Submission] = {}

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def advance(self) -> None:
        """One pass, before which requests join and after which others leave."""
        self._start()
        self.batch.run_prompts(STALL_SECONDS)
        self._deliver()
        if self.batch.catch_up():
            self._deliver()
        self.batch.step()
        # before others' prompts are run
        self._deliver()

    def fail(self, error: BaseException) -> None:
        self.batch.end()
        for request, submission in [*self.running.items(), *self.waiting]:
            submission.fail(error)
            submission.leave(request)
        self.running.clear()
        self.waiting.clear()

    def _start(self) -> None:
        # nobody waits for these any more, wherever in the queue they are
        for entry in [entry for entry in self.waiting if entry[0].enough]:
            self.waiting.remove(entry)
            entry[1].leave(entry[0])
        while self.waiting and self.batch.has_room(self.waiting[0][0]):
            request, submission = self.waiting.popleft()
            try:
                self.batch.start(request)
                self.running[request] = submission
            except Exception as error:
                # the one request's; its neighbours go on
                submission.fail(error)
                submission.leave(request)

    def _deliver(self) -> None:
        for request, token in self.batch.confirmed():
            self.running[request].put((request, token))
        still = set(self.batch.running.values())
        for request in [request for request in self.running if request not in still]:
            self.running.pop(request).leave(request)


def _guarded(process: Process, submission: _Submission) -> Process:
    """``process``, whose errors are those of its own requests and not of the others in the pass."""

    def guarded(context: SequenceOf[int], logits: Tensor) -> Tensor:
        if submission.error is None:
            try:
                return process(context, logits)
            except Exception as error:
                submission.fail(error)
        return logits

    return guarded
