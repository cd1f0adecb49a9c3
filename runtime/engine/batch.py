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


def decode_batch(
    engine: Engine, requests: SequenceOf[Request], most: int | None = None
) -> Generator[tuple[Request, int], None, None]:
    """Tokens of ``requests`` as they are confirmed, those of one request in order.

    A request starts when the cache has enough free slots for it, and fewer than ``most`` are being
    decoded: with more than a pass has rows for, each token takes several passes. When the iterator
    ends, is closed, or fails, none of the requests is in the cache any more. Raises ``EngineError``
    for a prompt that is empty, or that does not fit into the empty cache.
    """
    queue = deque(requests)
    running: dict[Sequence, Request] = {}
    try:
        while queue or running:
            while queue and (
                not running
                or (
                    (len(running) < (most or len(requests)))
                    and engine.decoder.kv.fits(queue[0].slots)
                )
            ):
                request = queue.popleft()
                # alone it takes the whole cache: contiguous rows from slot 0 on are the cheapest
                alone = engine.decoder.max_sequence_length if len(requests) == 1 else 0
                sequence = engine.start(
                    request.ids,
                    request.limit,
                    request.stop,
                    request.sampling,
                    capacity=max(request.slots, alone),
                )
                running[sequence] = request
                request.sequence = sequence
            yield from _deliver_confirmed(engine, running)
            ending = [sequence for sequence in running if sequence.at_its_end]
            if ending:
                # all that is missing is the last layer's verification
                engine.catch_up(ending)
                yield from _deliver_confirmed(engine, running)
            if going := [sequence for sequence in running if not sequence.at_its_end]:
                engine.step(going)
    finally:
        for sequence in running:
            engine.end(sequence)


def _deliver_confirmed(
    engine: Engine, running: dict[Sequence, Request]
) -> Iterator[tuple[Request, int]]:
    """Yield the confirmed tokens and end the sequences that are done."""
    for sequence, request in list(running.items()):
        for step in sequence.take_confirmed():
            yield request, step.token
            if request.enough:
                break
        if request.enough or sequence.finished:
            del running[sequence]
            engine.end(sequence)
