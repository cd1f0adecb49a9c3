"""Several prompts through one engine: as many at a time as its cache has slots for."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from eepass.runtime.engine.engine import Engine
from eepass.runtime.engine.sequence import Sequence
from eepass.runtime.sampling import Sampling


@dataclass(slots=True, eq=False)
class Request:
    """A prompt to continue by at most ``limit`` tokens, up to the first of ``stop``.

    The consumer of the tokens may set ``enough``: then no more of this request follow.
    ``sequence`` is the one that answers it, once it has started.
    """

    ids: list[int]
    limit: int
    stop: frozenset[int]
    sampling: Sampling
    enough: bool = False
    sequence: Sequence | None = None

    @property
    def slots(self) -> int:
        """Slots of the cache it needs."""
        return len(self.ids) + self.limit


class Batch:
    """Requests that are being decoded together, a pass at a time; ``most`` of them at once.

    With more than a pass has rows for, each token takes several passes.
    """

    def __init__(self, engine: Engine, most: int) -> None:
        self.engine, self.most = engine, most
        self.running: dict[Sequence, Request] = {}

    def has_room(self, request: Request) -> bool:
        """Whether ``request`` may start now; an empty batch lets it try."""
        if not self.running:
            return True
        return len(self.running) < self.most and self.engine.decoder.kv.fits(request.slots)

    def start(self, request: Request, slots: int = 0) -> None:
        """Run the prompt of ``request``, which gets at least ``slots`` slots; ``EngineError`` for
        one that is empty, or that does not fit into the empty cache."""
        sequence = self.engine.start(
            request.ids, request.limit, request.stop, request.sampling,
            capacity=max(request.slots, slots),
        )  # fmt: skip
        self.running[sequence] = request
        request.sequence = sequence

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
        ending = [sequence for sequence in self.running if sequence.at_its_end]
        if ending:
            # all that is missing is the last layer's verification
            self.engine.catch_up(ending)
        return bool(ending)

    def step(self) -> None:
        """One pass over the requests that are not at their end."""
        if going := [sequence for sequence in self.running if not sequence.at_its_end]:
            self.engine.step(going)

    def end(self) -> None:
        """Take all requests out of the cache."""
        for sequence in self.running:
            self.engine.end(sequence)
        self.running.clear()


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
    # alone it takes the whole cache: contiguous rows from slot 0 on are the cheapest
    slots = engine.decoder.max_sequence_length if len(requests) == 1 else 0
    try:
        while waiting or batch.running:
            while waiting and batch.has_room(waiting[0]):
                batch.start(waiting.popleft(), slots)
            yield from batch.confirmed()
            if batch.catch_up():
                yield from batch.confirmed()
            batch.step()
    finally:
        batch.end()
