"""Measurements: seconds of a pass by row count, and how far logits differ between row counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter

from torch import Tensor

from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Row

ROUNDS = 7
# how many tokens the noise is measured on, and how far above the largest difference it is set
SAMPLE, MARGIN = 8, 2.0


def pass_seconds(decoder: Decoder, row_counts: list[int], at: int) -> dict[int, float]:
    """Median seconds of a whole pass, LM head included, by row count, after ``at`` tokens."""
    costs = {}
    for rows in row_counts:
        at = min(at, decoder.capacity - rows)
        line = [Row(0, slot, slot) for slot in range(at, at + rows)]
        once = partial(_logits, decoder, line, [5] * rows)
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
    where the kernels sum a row in the same order whatever its slot and the row count.
    """
    tokens = [(7 + 13 * index) % 97 for index in range(2 * SAMPLE)]
    alone = [_logits(decoder, [Row(0, at, at)], [token])[0] for at, token in enumerate(tokens)]
    slots = [SAMPLE + 2 * index for index in range(SAMPLE)]
    rows = [
        Row(0, SAMPLE + index, slots[index], tuple(slots[: index + 1])) for index in range(SAMPLE)
    ]
    together = _logits(decoder, rows, tokens[SAMPLE:])
    worst = 0.0
    for one, other in zip(alone[SAMPLE:], together, strict=True):
        best = one.topk(2).indices
        gap, other_gap = one[best].diff(), other[best].diff()
        worst = max(worst, float((gap - other_gap).abs()))
    return MARGIN * worst


def _logits(decoder: Decoder, rows: list[Row], tokens: list[int]) -> Tensor:
    """Logits [n, V] of ``tokens`` run at ``rows``."""
    hidden = decoder.forward(tokens, rows, decoder.cache_length)
    return decoder.logits(hidden)[0].clone()
