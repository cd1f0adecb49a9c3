"""The model's own continuations of many prompts at once, through the compiled segments."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from eepass.runtime.engine.batch import Request, decode_batch
from eepass.runtime.engine.recorder import Recorder
from eepass.runtime.sampling import Sampling
from eepass.training.dense_model import DenseModel

# prompts started at a time, in batches: more keep the rows of a pass fuller, and hold back more
# continuations that are done before the first of them is
BATCHES = 8


class Task(NamedTuple):
    """A prompt to continue by at most ``room`` tokens."""

    ids: list[int]
    room: int
    sampling: Sampling


class Written(NamedTuple):
    """What the model wrote, its stop token included, and the hidden states [n, H] by layer of all
    tokens but the last."""

    tokens: list[int]
    hidden: dict[int, Tensor]


class Writer:
    """Continues prompts densely, as many at a time as ``model`` has rows for.

    What is written for a prompt depends on nothing but the prompt and its sampling. ``layers``:
    whose hidden states are recorded.
    """

    def __init__(self, model: DenseModel, stop: frozenset[int], layers: Iterable[int] = ()) -> None:
        self.model, self.stop, self.layers = model, stop, tuple(layers)

    def write(self, tasks: Iterable[Task]) -> Generator[Written, None, None]:
        """In the order of ``tasks``, which are taken as they are needed."""
        engine, waiting = self.model.engine, iter(tasks)
        while block := list(itertools.islice(waiting, BATCHES * self.model.batch)):
            engine.recorder = Recorder(self.layers) if self.layers else None
            try:
                yield from self._written(block, engine.recorder)
            finally:
                engine.recorder = None

    def _written(self, block: Sequence[Task], recorder: Recorder | None) -> Iterator[Written]:
        requests = [Request(t.ids, t.room, self.stop, t.sampling) for t in block]
        place = {id(request): number for number, request in enumerate(requests)}
        tokens: list[list[int]] = [[] for _ in block]
        done: dict[int, Written] = {}
        following = 0
        decoded = decode_batch(self.model.engine, requests, self.model.batch)
        with torch.no_grad(), closing(decoded):
            for request, token in decoded:
                number = place[id(request)]
                own = tokens[number]
                own.append(token)
                if token not in self.stop and len(own) < request.limit:
                    continue
                assert request.sequence is not None
                hidden = recorder.take(request.sequence) if recorder is not None else {}
                done[number] = Written(own, hidden)
                while following in done:
                    yield done.pop(following)
                    following += 1
