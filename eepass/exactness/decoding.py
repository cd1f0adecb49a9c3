"""Answers alone and in company, with what an exact answer has to repeat beside its tokens."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from eepass.runtime.cache.kv_cache import KvCache
from eepass.runtime.engine.engine import Engine
from eepass.runtime.engine.sequence import Sequence
from eepass.runtime.engine.verifier import Verifier
from eepass.runtime.sampling import Sampling

# slots that a sequence is moved by, at most
MOVED = 40


class Question(NamedTuple):
    """A prompt, the most tokens of its answer, and how these are chosen."""

    ids: list[int]
    new_tokens: int
    stop: frozenset[int]
    sampling: Sampling

    @property
    def slots(self) -> int:
        return len(self.ids) + self.new_tokens


@dataclass(frozen=True, slots=True)
class Company:
    """How questions are answered: at most ``most`` at once, in a random order where these are
    several; each waits with the chance ``waits`` before a pass instead of joining it; ``moved``:
    in slots of the cache that chance decides."""

    most: int = 1
    waits: float = 0.0
    moved: bool = False


class Answer(NamedTuple):
    """The tokens, by token a hash of the logits that decided it, and by layer one of the keys and
    values of everything before the last token."""

    tokens: list[int]
    logits: list[bytes]
    cache: list[bytes]


@torch.no_grad()
def answers_of(
    engine: Engine, questions: SequenceOf[Question], company: Company, chance: Random
) -> list[Answer]:
    """The answers to ``questions``, in their order."""
    engine.measure()
    verifier = engine.verifier
    engine.verifier = noting = _NotingVerifier(verifier)
    waiting = list(range(len(questions)))
    if company.most > 1:
        chance.shuffle(waiting)
    running: dict[Sequence, int] = {}
    found: dict[int, Answer] = {}
    try:
        while waiting or running:
            while waiting and len(running) < company.most:
                if running and chance.random() < company.waits:
                    break
                sequence = _started(engine, questions[waiting[-1]], company.moved, chance)
                if sequence is None:
                    break
                running[sequence] = waiting.pop()
            # all that is missing there is the last layer's verification
            engine.catch_up([sequence for sequence in running if sequence.at_its_end])
            for sequence in [sequence for sequence in running if sequence.finished]:
                logits = noting.noted.pop(sequence)
                found[running.pop(sequence)] = _answer(sequence, engine.decoder.kv, logits)
                engine.end(sequence)
            if running:
                engine.step(list(running))
    finally:
        engine.verifier = verifier
        for sequence in running:
            engine.end(sequence)
    return [found[number] for number in range(len(questions))]


def _started(engine: Engine, question: Question, moved: bool, chance: Random) -> Sequence | None:
    """The sequence that answers ``question``; None where others have its slots."""
    kv = engine.decoder.kv
    before = kv.allocate(chance.randint(1, MOVED)) if moved and engine.sequences else None
    try:
        if engine.sequences and not kv.fits(question.slots):
            return None
        return engine.start(
            question.ids, question.new_tokens, question.stop, question.sampling, question.slots
        )
    finally:
        if before is not None:
            kv.release(before)


class _NotingVerifier(Verifier):
    """A verifier that notes a hash of the logits after each context, by sequence and length.

    What the last layer says of a token comes after what an exit, or a rejected draft, said.
    """

    def __init__(self, verifier: Verifier) -> None:
        super().__init__(verifier.num_layers, verifier.exact, verifier.noise)
        self.noted: dict[Sequence, dict[int, bytes]] = {}

    def next_token(self, logits: Tensor, sequence: Sequence, context: SequenceOf[int]) -> int:
        self.noted.setdefault(sequence, {})[len(context)] = _digest(logits)
        return super().next_token(logits, sequence, context)


def _answer(sequence: Sequence, kv: KvCache, logits: dict[int, bytes]) -> Answer:
    begin, end = sequence.prompt_length, sequence.num_confirmed
    first, last = sequence.first_slot, sequence.first_slot + end - 1
    return Answer(
        sequence.tokens[begin:end],
        [logits[length] for length in range(begin, end)],
        [
            _digest(keys[0, :, first:last], values[0, :, first:last])
            for keys, values in zip(kv.keys, kv.values, strict=True)
        ],
    )


def _digest(*tensors: Tensor) -> bytes:
    digest = blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.digest()
