"""Quality of answers, and agreement against speed along the dense answer (teacher forcing)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from eepass.benchmark.turns import Answer, EngineStream, decode_in_turns, speed_up
from eepass.config import ExitConfig
from eepass.model import EarlyExitModel
from eepass.runtime.engine.engine import Engine
from eepass.runtime.engine.sequence import DecodedToken
from eepass.runtime.statistics import Statistics

TARGETS = (0.90, 0.94, 0.975, 0.99)
# tokens each engine decodes before anything counts
WARM_UP = 32
# the first stretch of ``by_position`` ends before this token
SHORTEST = 16
SHOWN = (
    "agreement", "ms_per_token", "ratio_to_dense", "ratio_to_dense_spread", "mean_exit_layer",
    "predictor_share", "draft_share", "verify_share", "full_head_rate", "active_predictors",
    "false_verify_rate",
)  # fmt: skip
Notify = Callable[[str, int, int], None]
# prompts and their dense answers
Pairs = Sequence[tuple[list[int], list[int]]]
# the tokens teacher forcing found, and the dense argmax at the same positions
Followed = tuple[Sequence[DecodedToken], Sequence[int]]


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
    followed: dict[str, list[Followed]] = {name: [] for name in engines}
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


def _agreement(followed: Iterable[Followed]) -> dict[str, Any]:
    stretches = by_position(followed)
    total = sum(stretch["tokens"] for stretch in stretches)
    agreeing = sum(stretch["tokens"] * stretch["agreement"] for stretch in stretches)
    return {"agreement": agreeing / total, "by_position": stretches}


def by_position(answers: Iterable[Followed]) -> list[dict[str, Any]]:
    """Agreement and mean exit layer by the position of a token in its answer.

    Each stretch is as long as all before it; ``first`` and ``last`` count tokens from
    1, and the first token, which comes from the prompt's pass, is in none.
    """
    stretches: dict[int, list[tuple[int, bool]]] = {}
    for steps, dense in answers:
        for place, (step, expected) in enumerate(zip(steps, dense, strict=True), 2):
            stretch = max(place.bit_length(), SHORTEST.bit_length() - 1)
            stretches.setdefault(stretch, []).append((step.exit_layer, step.token == expected))
    return [
        {
            "first": 2 if 1 << stretch <= SHORTEST else 1 << (stretch - 1),
            "last": (1 << stretch) - 1,
            "tokens": len(found),
            "agreement": sum(same for _, same in found) / len(found),
            "mean_exit_layer": sum(layer for layer, _ in found) / len(found),
        }
        for stretch, found in sorted(stretches.items())
    ]


def score(model: EarlyExitModel, pairs: Pairs, answers: Sequence[list[int]]) -> dict[str, float]:
    """``answers`` to the prompts of ``pairs`` under the dense model, each token given those before:
    the share that are its argmax, negative log-likelihood (nats a token), repetition."""
    nll, agreeing = 0.0, 0
    for (prompt, _), answer in zip(pairs, answers, strict=True):
        hidden = hidden_states(model.host_engine(), prompt, answer)[-1]
        for row, token in zip(hidden, answer, strict=True):
            logits = model.decoder.logits(row[None, None])[0, 0]
            nll -= float(logits.log_softmax(-1)[token])
            agreeing += int(logits.argmax()) == token
    tokens = sum(map(len, answers))
    return {
        "agreement": agreeing / tokens,
        "dense_nll": nll / tokens,
        "repetition_4gram": _repetition_4gram(answers),
    }


def hidden_states(engine: Engine, ids: list[int], answer: list[int]) -> list[torch.Tensor]:
    """Hidden states after 0..L layers at the positions that predict the answer, [n, H] each."""
    kept: list[list[torch.Tensor]] = [[] for _ in range(engine.decoder.num_layers + 1)]
    engine.prefill(
        [*ids, *answer[:-1]], lambda layer, hidden: kept[layer].append(hidden[0].clone())
    )
    return [torch.cat(parts)[len(ids) - 1 :] for parts in kept]


def _repetition_4gram(answers: Sequence[Sequence[int]]) -> float:
    """Share of 4-grams that repeat an earlier one of the same answer."""
    repeated = total = 0
    for answer in answers:
        grams = Counter(tuple(answer[i : i + 4]) for i in range(len(answer) - 3))
        repeated += sum(count - 1 for count in grams.values())
        total += sum(grams.values())
    return repeated / max(total, 1)
