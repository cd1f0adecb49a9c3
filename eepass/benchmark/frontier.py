"""Agreement against speed, both measured along the dense answer (teacher forcing)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from eepass.benchmark.quality import by_position
from eepass.benchmark.turns import Answer, EngineStream, decode_in_turns, speed_up
from eepass.config import ExitConfig
from eepass.model import EarlyExitModel
from eepass.runtime.engine.engine import Engine
from eepass.runtime.engine.sequence import DecodedToken
from eepass.runtime.statistics import Statistics

TARGETS = (0.90, 0.94, 0.975, 0.99)
# tokens each engine decodes before anything counts
WARM_UP = 32
SHOWN = (
    "agreement", "ms_per_token", "ratio_to_dense", "ratio_to_dense_spread", "mean_exit_layer",
    "predictor_share", "draft_share", "verify_share", "full_head_rate", "active_predictors",
    "false_verify_rate",
)  # fmt: skip
Notify = Callable[[str, int, int], None]
Pairs = Sequence[tuple[list[int], list[int]]]


def frontier(
    model: EarlyExitModel, presets: Sequence[ExitConfig], pairs: Pairs, notify: Notify
) -> list[dict[str, Any]]:
    """One point for each preset and each of ``TARGETS``, as plain early exit, all in turns."""
    settings = [(preset, target) for preset in presets for target in TARGETS]
    engines = {
        f"{preset.name} {target}": model.host_engine(
            replace(preset.approximate(target), threshold=None)
        )
        for preset, target in settings
    }
    found = follow_pairs(model, engines, pairs, notify)
    return [
        {"preset": preset.name, "target": target, **{name: measured[name] for name in SHOWN}}
        for (preset, target), measured in zip(settings, found.values(), strict=True)
    ]


def follow_pairs(
    model: EarlyExitModel, engines: Mapping[str, Engine], pairs: Pairs, notify: Notify
) -> dict[str, dict[str, Any]]:
    """Teacher-force dense and ``engines`` along the dense answers, all in turns."""
    everything = {"dense": model.host_engine(), **engines}
    ids, answer = pairs[0]
    for engine in everything.values():
        engine.follow(ids, answer[:WARM_UP])  # compiles what is missing
        engine.statistics = Statistics(model.decoder.num_layers)
    answers: dict[str, list[Answer]] = {name: [] for name in everything}
    followed: dict[str, list[tuple[list[DecodedToken], list[int]]]] = {name: [] for name in engines}
    for done, (ids, answer) in enumerate(pairs):
        notify("teacher forcing", done, len(pairs))
        streams = {n: EngineStream.follow(e, ids, answer) for n, e in everything.items()}
        for name, found in decode_in_turns(streams, done).items():
            answers[name].append(found)
        for name in engines:
            followed[name].append((streams[name].followed, answers["dense"][-1].tokens))
    return {
        name: engine.statistics.summary()
        | _agreement(followed[name])
        | speed_up(answers["dense"], answers[name]).to_json("ratio_to_dense")
        for name, engine in engines.items()
    }


def _agreement(
    followed: Sequence[tuple[Sequence[DecodedToken], Sequence[int]]],
) -> dict[str, Any]:
    stretches = by_position(followed)
    total = sum(stretch["tokens"] for stretch in stretches)
    agreeing = sum(stretch["tokens"] * stretch["agreement"] for stretch in stretches)
    return {"agreement": agreeing / total, "by_position": stretches}
