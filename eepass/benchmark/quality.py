"""Quality of answers: repetition, likelihood under the dense model, agreement with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from eepass.model import EarlyExitModel
from eepass.runtime.engine.sequence import DecodedToken

# the first stretch of ``by_position`` ends before this token
SHORTEST = 16


class Score(NamedTuple):
    """Over an answer's tokens: negative log-likelihood (nats, summed), how many of them are the
    dense argmax given the tokens before, how many there are."""

    nll: float
    agreeing: int
    tokens: int


def repetition_4gram(answers: Sequence[Sequence[int]]) -> float:
    """Share of 4-grams that repeat an earlier one of the same answer."""
    repeated = total = 0
    for answer in answers:
        grams = Counter(tuple(answer[i : i + 4]) for i in range(len(answer) - 3))
        repeated += sum(count - 1 for count in grams.values())
        total += sum(grams.values())
    return repeated / max(total, 1)


def by_position(
    answers: Sequence[tuple[Sequence[DecodedToken], Sequence[int]]],
) -> list[dict[str, Any]]:
    """Agreement and mean exit layer by the position of a token in its answer.

    ``answers``: for each, the tokens found by teacher forcing and the dense argmax at the same
    positions. Each stretch is as long as all before it; ``first`` and ``last`` count tokens from
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


def score_answer(model: EarlyExitModel, prompt: list[int], answer: list[int]) -> Score:
    """Score ``answer`` by the dense model's logits after ``prompt``."""
    kept: list[torch.Tensor] = []
    last = model.decoder.num_layers

    def keep(layer: int, hidden: torch.Tensor) -> None:
        if layer == last:
            kept.append(hidden.clone())

    model.host_engine().prefill([*prompt, *answer[:-1]], keep)
    hidden = torch.cat(kept, 1)[:, len(prompt) - 1 :]
    nll, agreeing = 0.0, 0
    for place, token in enumerate(answer):
        logits = model.decoder.logits(hidden[:, place : place + 1])[0, 0]
        nll -= float(logits.log_softmax(-1)[token])
        agreeing += int(logits.argmax()) == token
    return Score(nll, agreeing, len(answer))
