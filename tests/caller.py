"""A serving loop in short: a caller with a model and a static cache of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from models import random_artifact
from torch import Tensor
from transformers import StaticCache

from eepass.checkpoints.artifact import Artifact
from eepass.runtime.statistics import Statistics
from eepass.torch_compile.backend import specee

LENGTH = 32
DEPTH = 6
IDS = torch.tensor([[5, 9, 11, 30, 7, 8]])
OTHER = torch.tensor([[17, 3, 60, 61, 62, 63]])
COUNT = 14


def compiled(model: Any, artifact: Any, **options: Any) -> Any:
    """``model`` compiled by the backend; segments run eagerly by default."""
    given = {"artifact": str(artifact), "inner_backend": "eager", **options}
    return torch.compile(model, backend=specee, options=given)


def artifact_of(model: Any) -> Artifact:
    """One whose exits are taken now and then, by what was remembered of the tokens before."""
    # many drafts: states of random layers have little in common
    found = random_artifact(model, k=80)
    # late exits always active, early ones only near the last: what was remembered matters
    part = found.presets["default"]
    (calibration,) = part.calibrations
    backwards = replace(calibration, ranking=calibration.ranking[::-1])
    presets = {**found.presets, "default": replace(part, calibrations=(backwards,))}
    return replace(found, presets=presets)


class Seen:
    """For the option ``stats``: how many layers each step took."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.full_heads = 0
        self._before: dict[int, list[int]] = {}

    def __call__(self, statistics: Statistics) -> None:
        now = list(statistics.exit_layers)
        # each cache counts for itself
        before = self._before.get(id(statistics), [0] * len(now))
        if sum(before) >= sum(now):
            before = [0] * len(now)
        grown = [layer for layer, (a, b) in enumerate(zip(now, before, strict=True)) if a > b]
        self._before[id(statistics)] = now
        self.layers += grown
        self.full_heads = statistics.full_heads


def cache_for(model: Any, length: int = LENGTH) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=length)


def prefill(model: Any, cache: StaticCache, ids: Tensor) -> Tensor:
    """Run ids [B, T] through the eager model; the last token's logits [B, V]."""
    return model(ids, past_key_values=cache).logits[:, -1]


def decode(step: Any, cache: StaticCache, token: Tensor, position: int) -> Tensor:
    """Logits [B, V] after ``token`` [B, 1], all slots before it visible."""
    batch = token.shape[0]
    seen = torch.arange(cache.layers[0].max_cache_len) <= position
    return step(
        input_ids=token,
        position_ids=torch.full((batch, 1), position),
        attention_mask=seen.expand(batch, 1, 1, -1),
        past_key_values=cache,
    ).logits[:, -1]


def answer(
    model: Any, step: Any, cache: StaticCache, ids: Tensor, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Greedy tokens [B, 1] after ids [B, T], each with the logits [B, V] it came from."""
    logits = prefill(model, cache, ids)
    for place in range(count):
        token = logits.argmax(-1, keepdim=True)
        yield token, logits
        if place + 1 < count:
            logits = decode(step, cache, token, ids.shape[1] + place)


def generate(model: Any, step: Any, ids: Tensor, count: int, cache: Any = None) -> list[list[int]]:
    """The tokens of ``answer``, a list per sequence."""
    cache = cache_for(model) if cache is None else cache
    tokens = [token for token, _ in answer(model, step, cache, ids, count)]
    return torch.cat(tokens, 1).tolist()
