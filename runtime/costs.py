"""Measured at start: what a pass costs by rows, and how far logits differ between row counts."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from eepass.runtime.decoder import Decoder
from eepass.runtime.side_inputs import Row

ROUNDS = 7
# how many tokens the noise is taken from, and how far above the worst seen it is set
SAMPLE, MARGIN = 8, 2.0


def pass_seconds(decoder: Decoder, row_counts: list[int], at: int) -> dict[int, float]:
    """Median seconds of a whole pass, head included, by row count; ``at``: tokens in the cache."""
    costs = {}
    for rows in row_counts:
        at = min(at, decoder.capacity - rows)
        place = decoder.side_inputs.span(at, rows)
        ids, positions = torch.full((1, rows), 5), torch.arange(at, at + rows)[None]

        def once(ids: Tensor = ids, positions: Tensor = positions) -> None:
            hidden = decoder.embed(ids, positions, place.slots)  # noqa: B023
            for layer in range(decoder.num_layers):
                hidden = decoder.run_layer(layer, hidden, place)  # noqa: B023
            decoder.logits(hidden).argmax(-1)

        once()
        costs[rows] = seconds_of(once)
    return costs


def seconds_of(work: Callable[[], object]) -> float:
    """Median seconds of ``work``."""
    times = []
    for _ in range(ROUNDS):
        began = perf_counter()
        work()
        times.append(perf_counter() - began)
    return median(times)


def logit_noise(decoder: Decoder) -> float:
    """How far the gap between the two best logits may differ between row counts.

    Runs a few tokens one by one and again as one path of a tree, with gaps between its slots. Zero
    where the kernels sum a row the same way wherever it stands.
    """
    tokens = [(7 + 13 * index) % 97 for index in range(2 * SAMPLE)]
    size = decoder.bucket(SAMPLE)
    alone = [_logits(decoder, [Row(0, at, at)], [token], 1)[0] for at, token in enumerate(tokens)]
    slots = [SAMPLE + 2 * index for index in range(SAMPLE)]
    rows = [
        Row(0, SAMPLE + index, slots[index], tuple(slots[: index + 1])) for index in range(SAMPLE)
    ]
    together = _logits(decoder, rows, tokens[SAMPLE:], size)
    worst = 0.0
    for one, other in zip(alone[SAMPLE:], together, strict=True):
        best = one.topk(2).indices
        gap, again = one[best].diff(), other[best].diff()
        worst = max(worst, float((gap - again).abs()))
    return MARGIN * worst


def _logits(decoder: Decoder, rows: list[Row], tokens: list[int], size: int) -> list[Tensor]:
    place = decoder.side_inputs.gather(rows, size)
    padding = size - len(rows)
    ids = torch.tensor([tokens + tokens[-1:] * padding])
    positions = torch.tensor([[row.position for row in rows] + [0] * padding])
    hidden = decoder.embed(ids, positions, place.slots)
    for layer in range(decoder.num_layers):
        hidden = decoder.run_layer(layer, hidden, place)
    return list(decoder.logits(hidden)[0, : len(rows)].clone())
