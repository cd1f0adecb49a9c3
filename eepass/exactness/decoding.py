"""Answers alone and in company, with what an exact answer has to repeat beside its tokens."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from hashlib import blake2b
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from eepass.runtime.cache.kv_cache import KvCache
from eepass.runtime.engine.batch import Batch, Request
from eepass.runtime.engine.engine import Engine
from eepass.runtime.engine.sequence import Sequence
from eepass.runtime.engine.verifier import Verifier

# slots that a sequence is moved by, at most
MOVED = 40
# how often one loses its slots before a pass, and goes on elsewhere
SUSPENDED = 0.1


@dataclass(frozen=True, slots=True)
class Company:
    """How questions are answered: at most ``most`` at once, in a random order where these are
    several; each waits with the chance ``waits`` before a pass instead of joining it; ``moved``:
    in slots of the cache that chance decides, losing them now and then, and beginning with what
    others have left there."""

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
    engine: Engine, questions: SequenceOf[Request], company: Company, chance: Random
) -> list[Answer]:
    """The answers to ``questions``, in their order."""
    engine.measure()
    verifier = engine.verifier
    engine.verifier = noting = _NotingVerifier(verifier)
    # they may have been answered before
    requests = [
        replace(question, shares=company.moved, enough=False, sequence=None)
        for question in questions
    ]
    waiting, batch = list(requests), Batch(engine, company.most)
    if company.most > 1:
        chance.shuffle(waiting)
    found: dict[Request, Answer] = {}
    try:
        while waiting or batch.running:
            while waiting:
                if batch.running and chance.random() < company.waits:
                    break
                if not _started(batch, waiting[-1], company.moved, chance):
                    break
                waiting.pop()
            if company.moved and chance.random() < SUSPENDED:
                _suspend_one(batch, chance)
            batch.run_prompts(0.0)
            batch.catch_up()
            for sequence, request in batch.running.items():
                if sequence.finished:
                    logits = noting.noted.pop(sequence)
                    found[request] = _answer(sequence, engine.decoder.kv, logits)
            for _ in batch.confirmed():
                # what is finished leaves
                pass
            batch.step()
    finally:
        engine.verifier = verifier
        batch.end()
    return [found[request] for request in requests]


def _started(batch: Batch, request: Request, moved: bool, chance: Random) -> bool:
    """Whether ``request`` has started: others may have its slots."""
    kv = batch.engine.decoder.kv
    before = kv.allocate(chance.randint(1, MOVED)) if moved and batch.running else None
    try:
        if not batch.has_room(request):
            return False
        batch.start(request)
        return True
    finally:
        if before is not None:
            kv.release(before)


def _suspend_one(batch: Batch, chance: Random) -> None:
    # one that is finished is compared where it lies
    going = [s for s in batch.running if s.capacity and not s.pending and not s.at_its_end]
    if going:
        batch.engine.suspend(chance.choice(going))


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
