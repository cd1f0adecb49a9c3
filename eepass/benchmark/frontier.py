"""Agreement against speed, both taken along the dense answer (teacher forcing)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from eepass.benchmark.quality import by_position
from eepass.config import ExitConfig
from eepass.model import EarlyExitModel
from eepass.runtime.engine.engine import Engine
from eepass.runtime.engine.sequence import DecodedToken

TARGETS = (0.90, 0.94, 0.975, 0.99)
Notify = Callable[[str, int, int], None]
Pairs = Sequence[tuple[list[int], list[int]]]


def frontier(
    model: EarlyExitModel,
    preset: ExitConfig,
    pairs: Pairs,
    notify: Notify,
) -> list[dict[str, Any]]:
    """One point for each of ``TARGETS``, every preset as plain early exit."""
    points = []
    for target in TARGETS:
        config = replace(preset.approximate(target), threshold=None)
        engine = model.configure(config)
        assert isinstance(engine, Engine)
        measured = follow_pairs(model, {"exits": engine}, pairs, notify)["exits"]
        kept = (
            "agreement", "ms_per_token", "ratio_to_dense", "mean_exit_layer", "predictor_share",
            "draft_share", "verify_share", "full_head_rate", "active_predictors",
            "false_verify_rate",
        )  # fmt: skip
        points.append(
            {"preset": preset.name, "target": target, **{name: measured[name] for name in kept}}
        )
    return points


def follow_pairs(
    model: EarlyExitModel,
    engines: dict[str, Engine],
    pairs: Pairs,
    notify: Notify,
) -> dict[str, dict[str, Any]]:
    """Teacher-force dense and ``engines`` along the dense answers, alternating prompt by prompt."""
    everything = {"dense": model.dense, **engines}
    for engine in everything.values():
        engine.follow(*pairs[0])  # warm-up, compiles what is missing
        engine.statistics = type(engine.statistics)(model.decoder.num_layers)
    ratios: dict[str, list[float]] = {name: [] for name in engines}
    followed: dict[str, list[tuple[list[DecodedToken], list[int]]]] = {name: [] for name in engines}
    for done, (ids, answer) in enumerate(pairs):
        notify("teacher forcing", done, len(pairs))
        seconds: dict[str, float] = {}
        dense: list[int] = []
        for name, engine in everything.items():
            before = engine.statistics.seconds
            steps = engine.follow(ids, answer)
            seconds[name] = engine.statistics.seconds - before
            if name == "dense":
                dense = [step.token for step in steps]
            else:
                followed[name].append((steps, dense))
                ratios[name].append(seconds["dense"] / seconds[name])
    found = {}
    for name, engine in engines.items():
        found[name] = engine.statistics.summary()
        stretches = by_position(followed[name])
        total = sum(stretch["tokens"] for stretch in stretches)
        agreeing = sum(stretch["tokens"] * stretch["agreement"] for stretch in stretches)
        found[name]["agreement"] = agreeing / total
        found[name]["by_position"] = stretches
        found[name]["ratio_to_dense"] = model.dense.statistics.seconds / engine.statistics.seconds
        found[name]["median_ratio_to_dense"] = statistics.median(ratios[name])
    return found
