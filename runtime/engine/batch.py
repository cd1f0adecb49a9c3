"""Several prompts through one engine: as many at a time as its cache has slots for."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from time import perf_counter

from eepass.runtime.decoder.decoder import LEAST_CHUNK
from eepass.runtime.engine.engine import Engine, no_slots
from eepass.runtime.engine.placement import BLOCK
from eepass.runtime.engine.sequence import Sequence
from eepass.runtime.sampling import Sampling


@dataclass(slots=True, eq=False)
class Request:
    """A prompt to continue by at most ``limit`` tokens, up to the first of ``stop``.

    ``shares``: it may begin with keys and values that another request with the same beginning has
    left, and leave its own. The consumer of the tokens may set ``enough``: then no more of this
    request follow. ``sequence`` is the one that answers it, once it has started.
    """

    ids: list[int]
    limit: int
    stop: frozenset[int]
    sampling: Sampling
    shares: bool = False
    enough: bool = False
    sequence: Sequence | None = None

    @property
    def slots(self) -> int:
        """Slots of the cache it may come to need."""
        return len(self.ids) + self.limit


class Batch:
    """Requests that are being decoded together, a pass at a time; ``most`` of them at once.

    With more than a pass has rows for, each token takes several passes. Where answers come to need
    more slots than there are, the request that came last is suspended until there are enough.
    """

    def __init__(self, engine: Engine, most: int) -> None:
        self.engine, self.most = engine, most
        # in the order in which they came
        self.running: dict[Sequence, Request] = {}
        # what a chunk of so many rows took the last time
        self._chunk_seconds: dict[int, float] = {}

    def has_room(self, request: Request) -> bool:
        """Whether ``request`` may start now; an empty batch lets it try."""
        if not self.running:
            return True
        if len(self.running) >= self.most or not all(s.capacity for s in self.running):
            return False
        growing = sum(sequence.capacity < self._longest(sequence) for sequence in self.running)
        return self.engine.placement.fits(self._first_slots(request), growing)

    def start(self, request: Request) -> None:
        """Let ``request`` join; ``EngineError`` for a prompt that is empty, or that does not fit
        into the empty cache with its answer."""
        sequence = self.engine.admit(
            request.ids, request.limit, request.stop, request.sampling,
            capacity=request.slots, slots=self._first_slots(request), shares=request.shares,
        )  # fmt: skip
        self.running[sequence] = request
        request.sequence = sequence

    def run_prompts(self, seconds: float | None = None) -> None:
        """Run the prompts of those that joined, chunk by chunk, as long as the next one is done
        within ``seconds``; at least one chunk, and all by default."""
        self._resume()
        began, chunks = perf_counter(), 0
        for sequence in [s for s in self.running if s.in_prompt and s.capacity]:
            while sequence.in_prompt:
                left = None if seconds is None else seconds - (perf_counter() - began)
                rows = self._chunk_rows(left)
                if chunks and left is not None and self._chunk_seconds.get(rows, 0.0) > left:
                    return
                start = perf_counter()
                self.engine.run_prompt(sequence, rows)
                self._chunk_seconds[rows] = perf_counter() - start
                chunks += 1

    def confirmed(self) -> Iterator[tuple[Request, int]]:
        """The tokens confirmed since the last call; ends the requests that are done."""
        for sequence, request in list(self.running.items()):
            for step in sequence.take_confirmed():
                if request.enough:
                    break
                yield request, step.token
            if request.enough or sequence.finished:
                del self.running[sequence]
                self.engine.end(sequence)

    def catch_up(self) -> bool:
        """Verify the last tokens of the requests that are at their end; whether there were any."""
        ending = [sequence for sequence in self.decoding if sequence.at_its_end]
        if ending:
            # all that is missing is the last layer's verification
            self.engine.catch_up(ending)
        return bool(ending)

    def step(self) -> None:
        """One pass over the requests whose prompts were run and that are not at their end."""
        for sequence in self.decoding:
            # one that needed slots may have suspended it
            if sequence.capacity and not sequence.at_its_end:
                self._make_room(sequence)
        if going := [sequence for sequence in self.decoding if not sequence.at_its_end]:
            self.engine.step(going)

    def end(self) -> None:
        """Take all requests out of the cache."""
        for sequence in self.running:
            self.engine.end(sequence)
        self.running.clear()

    @property
    def decoding(self) -> list[Sequence]:
        return [s for s in self.running if s.capacity and not s.in_prompt]

    def _resume(self) -> None:
        for sequence in [sequence for sequence in self.running if not sequence.capacity]:
            slots = min(len(sequence.tokens) + BLOCK, self._longest(sequence))
            if not self.engine.resume(sequence, slots):
                if not any(other.capacity for other in self.running):
                    raise no_slots(slots)
                return

    def _make_room(self, sequence: Sequence) -> None:
        """Give ``sequence`` the slots that its next pass may need, if need be from others."""
        longest = self._longest(sequence)
        needed = min(sequence.position + 1 + self.engine.step_rows, longest)
        if needed <= sequence.capacity:
            return
        slots = min(sequence.capacity + BLOCK, longest)
        while not self.engine.placement.grow(sequence, slots):
            last = next(one for one in reversed(self.running) if one.capacity)
            self.engine.suspend(last)
            if last is sequence:
                return

    def _first_slots(self, request: Request) -> int:
        return min(len(request.ids) + BLOCK, self._limit(request))

    def _longest(self, sequence: Sequence) -> int:
        return self._limit(self.running[sequence])

    def _limit(self, request: Request) -> int:
        # with room for padding rows behind the last token
        return min(request.slots + self.engine.step_rows, self.engine.decoder.max_sequence_length)

    def _chunk_rows(self, seconds: float | None) -> int:
        """The largest chunk that is done within ``seconds``, as far as is known."""
        sizes = [size for size in self.engine.decoder.buckets[::-1] if size >= LEAST_CHUNK]
        sizes = sizes or [self.engine.decoder.buckets[-1]]
        if seconds is None:
            return sizes[0]
        known = self._chunk_seconds
        return next((size for size in sizes if known.get(size, 0.0) <= seconds), sizes[-1])


def decode_batch(
    engine: Engine, requests: SequenceOf[Request], most: int | None = None
) -> Generator[tuple[Request, int], None, None]:
    """Tokens of ``requests`` as they are confirmed, those of one request in order.

    A request starts when the cache has enough free slots for it, and fewer than ``most`` are being
    decoded. When the iterator ends, is closed, or fails, none of the requests is in the cache any
    more. Raises ``EngineError`` for a prompt that is empty, or that does not fit into the empty
    cache.
    """
    waiting, batch = deque(requests), Batch(engine, most or len(requests))
    try:
        while waiting or batch.running:
            while waiting and batch.has_room(waiting[0]):
                batch.start(waiting.popleft())
            batch.run_prompts()
            yield from batch.confirmed()
            if batch.catch_up():
                yield from batch.confirmed()
            batch.step()
    finally:
        batch.end()
