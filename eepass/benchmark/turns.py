"""Systems decode in turns, a block of tokens each, and are compared block by block.

A busy moment of the machine lasts longer than a block, so it hits all systems of a round alike and
leaves their ratios. A speed-up is the median of the ratios of one block and the reference's block
of the same round; where blocks disagree too much there is none.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

from torch import Tensor

from eepass.runtime.engine import sequence as running
from eepass.runtime.engine.engine import Engine

# tokens of a block: on a CPU about a tenth of a second, and several passes even with drafts
BLOCK_TOKENS = 16
# How far apart the middle half of the blocks may lie, its upper end by its lower. Text alone
# spreads those of speculation to about 1.7: drafts are right in one stretch and wrong in the next.
# More is the machine's doing, and a median of such blocks is chance.
MOST_SPREAD = 2.0


class Stream:
    """One answer in progress, a pass at a time; its first pass is the prompt's."""

    def __init__(self, passes: Iterator[Sequence[int]]) -> None:
        self.passes = passes

    def pause(self) -> None:
        """Let others decode; ``resume`` comes before the next pass."""

    def resume(self) -> None:
        """Go on after ``pause``."""


class EngineStream(Stream):
    """An answer of an engine whose cache other engines use while it is paused.

    Only one sequence at a time lies at the beginning of the cache, where passes are fastest, so
    keys and values are copied out and in again.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(iter(()))
        self.engine = engine
        self.sequence: running.Sequence | None = None
        self.followed: list[running.DecodedToken] = []
        self._saved: list[Tensor] = []

    @classmethod
    def generate(
        cls, engine: Engine, ids: list[int], new_tokens: int, stop: frozenset[int]
    ) -> EngineStream:
        """The engine's own answer to ``ids``."""
        stream = cls(engine)
        stream.passes = stream._generate(ids, new_tokens, stop)
        return stream

    @classmethod
    def follow(cls, engine: Engine, ids: list[int], answer: list[int]) -> EngineStream:
        """Teacher forcing, as ``Engine.follow``; what it finds is in ``followed``."""
        stream = cls(engine)
        stream.passes = stream._follow(ids, answer)
        return stream

    def _generate(
        self, ids: list[int], new_tokens: int, stop: frozenset[int]
    ) -> Iterator[list[int]]:
        engine = self.engine
        sequence = self.sequence = engine.start(ids, new_tokens, stop)
        yield [step.token for step in sequence.take_confirmed()]
        while not sequence.finished:
            engine.advance(sequence)
            yield [step.token for step in sequence.take_confirmed()]
        self._end()

    def _follow(self, ids: list[int], answer: list[int]) -> Iterator[list[int]]:
        sequence = self.sequence = self.engine.start(ids)
        yield []
        for token in answer[:-1]:
            self.followed.append(self.engine.step_after(sequence, token))
            yield [self.followed[-1].token]
        self._end()

    def _end(self) -> None:
        assert self.sequence is not None
        # running pending tokens through the deeper layers is part of the price
        self.engine.catch_up([self.sequence])
        self.engine.end(self.sequence)
        self.sequence = None

    def pause(self) -> None:
        if self.sequence is not None:
            self._saved = [tensor.clone() for tensor in self._state()]
            self.engine.decoder.kv.release(self.sequence.first_slot)

    def resume(self) -> None:
        if self.sequence is not None:
            first = self.engine.decoder.kv.allocate(self.sequence.capacity)
            assert first == self.sequence.first_slot
            for tensor, saved in zip(self._state(), self._saved, strict=True):
                tensor.copy_(saved)

    def _state(self) -> list[Tensor]:
        """Views of what the sequence has in tensors that it shares with others."""
        assert self.sequence is not None
        used = self.sequence.position
        found = []
        # a draft model has a cache of its own, likewise for one sequence
        for decoder in (self.engine.decoder, getattr(self.engine.draft, "decoder", None)):
            if decoder is not None:
                kv, sides = decoder.kv, decoder.side_inputs
                found += [tensor[:, :, :used] for tensor in (*kv.keys, *kv.values)]
                found += kv.states.values()
                found += [t for name, t in sides.tables.items() if name in sides.by_token]
        return found


class Block(NamedTuple):
    """Passes decoded in one turn; seconds."""

    tokens: int
    seconds: float

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / self.tokens


@dataclass(slots=True)
class Answer:
    """All tokens of an answer, and the blocks they came in, the prompt's pass apart."""

    tokens: list[int] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    @property
    def seconds_per_token(self) -> float:
        tokens = sum(block.tokens for block in self.blocks)
        return sum(block.seconds for block in self.blocks) / max(tokens, 1)


def decode_in_turns(
    streams: Mapping[str, Stream], first: int = 0, clock: Callable[[], float] = perf_counter
) -> dict[str, Answer]:
    """Exhaust ``streams``, a block of each in every round; the order rotates with the rounds,
    beginning with stream number ``first``."""
    answers = {name: Answer() for name in streams}
    for name, stream in streams.items():
        answers[name].tokens += next(stream.passes)
        stream.pause()
    names = list(streams)
    going = set(names)
    while going:
        at = first % len(names)
        for name in names[at:] + names[:at]:
            if name in going:
                streams[name].resume()
                if not _decode_block(streams[name], answers[name], clock):
                    going.remove(name)
                streams[name].pause()
        first += 1
    return answers


def _decode_block(stream: Stream, answer: Answer, clock: Callable[[], float]) -> bool:
    """Decode a block; whether the answer goes on."""
    count = 0
    tokens: Sequence[int] | None = ()
    began = clock()
    while count < BLOCK_TOKENS and (tokens := next(stream.passes, None)) is not None:
        answer.tokens += tokens
        count += len(tokens)
    block = Block(count, clock() - began)
    if answer.blocks and count < BLOCK_TOKENS // 2:
        # too short to be compared: what is left of an answer counts to the block before
        last = answer.blocks.pop()
        block = Block(last.tokens + count, last.seconds + block.seconds)
    if block.tokens:
        answer.blocks.append(block)
    return tokens is not None


@dataclass(frozen=True, slots=True)
class SpeedUp:
    """How many times as fast as the reference a system is, by block: the median, the ends of the
    middle half, and the extremes."""

    median: float
    lower: float
    upper: float
    lowest: float
    highest: float
    blocks: int

    @property
    def value(self) -> float | None:
        """The median, or None where the blocks disagree too much for one."""
        steady = self.upper <= MOST_SPREAD * self.lower
        return self.median if steady and self.blocks else None

    def spread(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "median"}

    def to_json(self, name: str) -> dict[str, Any]:
        """The value as ``name``, and the blocks' range beside it."""
        return {name: self.value, f"{name}_spread": self.spread()}


def speed_up(reference: Sequence[Answer], system: Sequence[Answer]) -> SpeedUp:
    """Compare answers to the same prompts, each block with the reference's of the same round."""
    ratios = sorted(
        other.seconds_per_token / own.seconds_per_token
        for theirs, ours in zip(reference, system, strict=True)
        for other, own in zip(theirs.blocks, ours.blocks, strict=False)
    )
    if not ratios:
        # every answer ended with its prompt's pass
        return SpeedUp(0.0, 0.0, 0.0, 0.0, 0.0, 0)
    outside = len(ratios) // 4
    return SpeedUp(
        statistics.median(ratios), ratios[outside], ratios[-1 - outside], ratios[0], ratios[-1],
        len(ratios),
    )  # fmt: skip
