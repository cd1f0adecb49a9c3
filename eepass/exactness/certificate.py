"""``eepass.verify``: every way of decoding against dense decoding, token by token, bit by bit."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import torch

import eepass
from eepass.checkpoints.artifact import fingerprint
from eepass.checkpoints.models import LoadedModel
from eepass.codegen.cpu import native
from eepass.errors import InputError
from eepass.exactness.decoding import Answer, answers_of
from eepass.exactness.ways import ALONE, TOGETHER, Way, ways_of
from eepass.model import EarlyExitModel
from eepass.runtime.engine.batch import Request
from eepass.runtime.engine.engine import Engine
from eepass.runtime.sampling import GREEDY, Sampling
from eepass.runtime.statistics import Statistics

Notify = Callable[[str, int, int], None]
TEMPERATURE = 0.8


def slots_needed(prompts: Sequence[Sequence[int]], new_tokens: int) -> int:
    """Slots of a cache in which as many answers as are ever decoded together have room."""
    return max(TOGETHER) * (max(map(len, prompts), default=0) + new_tokens)


def verify(
    loaded: LoadedModel,
    model: EarlyExitModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int = 64,
    seed: int = 0,
    notify: Notify = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Answer ``prompts`` (token ids) densely, then in every way that ``model`` can decode.

    Each way has to give the dense tokens; where the kernels sum in one order for any number of rows
    (``bits``), the logits that decided them and the keys and values of every layer have to have the
    dense bits as well. ``ways`` lists what was compared: answers, tokens, ``different`` answers,
    ``bits_different`` ones of the same tokens, the first difference, and what shows that the
    mechanism was at work. ``exact``: whether nothing differed. Sampled answers have a seed each,
    from ``seed``, as has all that is random here. Raises ``InputError`` where no prompt fits.
    """
    # configured by itself, over the same cache
    model = model.share()
    longest = model.decoder.max_sequence_length
    fitting = [list(ids) for ids in prompts if 0 < len(ids) <= longest - new_tokens]
    if not fitting:
        raise InputError("no prompt fits the cache together with its answer: raise max_length")
    samplings = [Sampling(TEMPERATURE, seed=seed + place) for place in range(len(fitting))]
    greedy = [Request(ids, new_tokens, model.stop, GREEDY) for ids in fitting]
    sampled = [
        Request(ids, new_tokens, model.stop, sampling)
        for ids, sampling in zip(fitting, samplings, strict=True)
    ]
    dense, chance = model.host_engine(), Random(seed)
    notify("dense answers", 0, 2)
    expected = answers_of(dense, greedy, ALONE, chance)
    notify("dense answers", 1, 2)
    drawn = answers_of(dense, sampled, ALONE, chance)
    ways, reports, noise = ways_of(model), [], 0.0
    for place, way in enumerate(ways):
        notify("in every way", place, len(ways))
        engine = model.host_engine(way.config)
        engine.statistics = Statistics(model.decoder.num_layers)
        questions, wanted = (sampled, drawn) if way.sampled else (greedy, expected)
        with _threads(way.threads):
            found = answers_of(engine, questions, way.company, chance)
        reports.append(_compared(way, wanted, found) | _at_work(engine))
        noise = max(noise, engine.verifier.noise)
    notify("in every way", len(ways), len(ways))
    bits = noise == 0
    differ = sum(way["different"] + (way["bits_different"] if bits else 0) for way in reports)
    return {
        "model": loaded.name,
        "weights": fingerprint(loaded.model)["weights"] if not loaded.transformed else None,
        "quantized": loaded.quantization,
        "dtype": str(model.decoder.dtype).removeprefix("torch."),
        "versions": {
            "eepass": eepass.__version__, "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "isa": native.kernel_isa() or "none", "threads": torch.get_num_threads(),
        "prompts": len(fitting), "new_tokens": new_tokens, "seed": seed,
        "bits": bits, "noise": noise, "ways": reports, "exact": not differ,
    }  # fmt: skip


def _compared(way: Way, expected: Sequence[Answer], found: Sequence[Answer]) -> dict[str, Any]:
    """What differs, and where it does so first."""
    different = bits_different = 0
    first: dict[str, Any] | None = None
    for prompt, (wanted, had) in enumerate(zip(expected, found, strict=True)):
        place: dict[str, Any] | None = None
        if wanted.tokens != had.tokens:
            different += 1
            at = _first_difference(wanted.tokens, had.tokens)
            place = {"token": at, "dense": wanted.tokens[at:][:1], "found": had.tokens[at:][:1]}
        elif wanted != had:
            bits_different += 1
            if wanted.logits != had.logits:
                place = {"token": _first_difference(wanted.logits, had.logits)}
            else:
                place = {"layer": _first_difference(wanted.cache, had.cache)}
        first = first or (place and {"prompt": prompt, **place})
    return {
        "way": way.name,
        "answers": len(found),
        "tokens": sum(len(answer.tokens) for answer in found),
        "different": different,
        "bits_different": bits_different,
        "first_difference": first,
    }


def _first_difference(some: Sequence[Any], others: Sequence[Any]) -> int:
    same = [one == other for one, other in zip(some, others, strict=False)]
    return same.index(False) if False in same else len(same)


def _at_work(engine: Engine) -> dict[str, Any]:
    """What shows that what was compared is what was meant."""
    summary = engine.statistics.summary()
    names = ("accepted_per_pass", "mean_exit_layer", "rollbacks", "near_ties")
    return {name: summary[name] for name in names}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)
