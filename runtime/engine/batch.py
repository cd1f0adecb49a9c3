"""Several prompts through one engine: as many together as its cache has room for."""

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
    """A prompt and what follows it: at most ``limit`` tokens, up to the first of ``stop``.

    Whoever reads the tokens may set ``enough``: none of this prompt follow then.
    """

    ids: list[int]
    limit: int
    stop: frozenset[int]
    sampling: Sampling
    enough: bool = False

    @property
    def room(self) -> int:
        """Slots of the cache it needs."""
        return len(self.ids) + self.limit


def decode_batch(
    engine: Engine, requests: SequenceOf[Request]
) -> Generator[tuple[Request, int], None, None]:
    """Tokens of ``requests`` as they are confirmed, those of one request in order.

    A request waits until the cache has room for it; one that ends makes room for the next. When
    the iterator ends, is closed, or fails, none of them is in the cache any more. Raises
    ``EngineError`` for a prompt that is empty, or that does not fit into the empty cache.
    """
    waiting = deque(requests)
    running: dict[Sequence, Request] = {}
    try:
        while waiting or running:
            while waiting and (not running or engine.decoder.kv.fits(waiting[0].room)):
                request = waiting.popleft()
                # alone it takes the whole cache: neighbours in front are the cheapest to place
                alone = engine.decoder.longest if len(requests) == 1 else 0
                room = max(request.room, alone)
                sequence = engine.start(
                    request.ids, request.limit, request.stop, request.sampling, room
                )
                running[sequence] = request
            yield from _take(engine, running)
            ending = [sequence for sequence in running if sequence.at_its_end]
            if ending:
                # nothing follows but the word of the deeper layers
                engine.catch_up(ending)
                yield from _take(engine, running)
            if going := [sequence for sequence in running if not sequence.at_its_end]:
                engine.step(going)
    finally:
        for sequence in running:
            engine.end(sequence)


def _take(engine: Engine, running: dict[Sequence, Request]) -> Iterator[tuple[Request, int]]:
    """Hand on what is confirmed, and let go of what is done."""
    for sequence, request in list(running.items()):
        for step in sequence.take():
            yield request, step.token
            if request.enough:
                break
        if request.enough or sequence.finished:
            del running[sequence]
            engine.end(sequence)
