"""Figures of a load test: rates, percentiles, and ratios of blocks of one round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.under_load.work import Answer

PERCENTILES = (50, 95, 99)
# seconds; pieces of text that are closer come from one pass
AT_ONCE = 1e-3


@dataclass(frozen=True, slots=True)
class Block:
    """What one system answered in one round of one load.

    ``window``: seconds from the beginning, in a closed loop until a client had nothing more to
    send, so that all were busy, else until all was answered. ``peak_mb``: most memory that the
    server's processes held. ``client_cpu``: share of one core that the client took.
    """

    answers: Sequence[Answer]
    window: float
    peak_mb: float
    client_cpu: float

    @property
    def whole(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.failure]

    @property
    def tokens_per_s(self) -> float:
        return sum(tokens_until(answer, self.window) for answer in self.whole) / self.window

    @property
    def requests_per_s(self) -> float:
        return sum(answer.ended <= self.window for answer in self.whole) / self.window

    @property
    def first_token_95(self) -> float | None:
        """Seconds."""
        return percentile(first_tokens(self.whole), 95)


def tokens_until(answer: Answer, moment: float) -> float:
    """Tokens of ``answer`` that had come at ``moment``; its tokens are spread over its characters,
    since a server says how many there are only at the end."""
    characters = len(answer.text)
    come = sum(len(piece) for at, piece in answer.chunks if at <= moment)
    return answer.tokens * come / characters if characters else 0.0


def first_tokens(answers: Sequence[Answer]) -> list[float]:
    """Seconds from each request to the first text of its answer."""
    return [answer.chunks[0][0] - answer.sent for answer in answers if answer.chunks]


def token_times(answers: Sequence[Answer]) -> list[float]:
    """Seconds a token of each answer, after its first text."""
    return [
        (answer.chunks[-1][0] - answer.chunks[0][0]) / (answer.tokens - 1)
        for answer in answers
        if len(answer.chunks) > 1 and answer.tokens > 1
    ]


def gaps(answers: Sequence[Answer]) -> list[float]:
    """Seconds between one piece of text and the next, where they did not come at once."""
    between = [
        after - before for answer in answers for (before, _), (after, _) in pairwise(answer.chunks)
    ]
    return [gap for gap in between if gap > AT_ONCE]


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Between the two nearest of the sorted values, linearly; None if there are none."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float | None]:
    return {
        str(percent): _rounded(percentile([1e3 * value for value in seconds], percent))
        for percent in PERCENTILES
    }


def figures_of(blocks: Sequence[Block]) -> dict[str, Any]:
    """One system at one load: medians of rates by round, percentiles of all rounds' answers."""
    answers = [answer for block in blocks for answer in block.answers]
    whole = [answer for block in blocks for answer in block.whole]
    failures = [answer.failure for answer in answers if answer.failure]
    rates = {
        "tokens_per_s": [block.tokens_per_s for block in blocks],
        "requests_per_s": [block.requests_per_s for block in blocks],
    }
    return {
        **{name: _rounded(statistics.median(values)) for name, values in rates.items()},
        "first_token_ms": percentiles_ms(first_tokens(whole)),
        "ms_per_token": percentiles_ms(token_times(whole)),
        "gap_ms": percentiles_ms(gaps(whole)),
        "peak_mb": round(max(block.peak_mb for block in blocks)),
        "requests": len(answers),
        "failed": len(failures),
        "failure": next(iter(failures), ""),
        "tokens": sum(answer.tokens for answer in whole),
        "prompt_tokens": sum(answer.prompt_tokens for answer in whole),
        "ended_early": sum(answer.tokens < answer.asked for answer in whole),
        "counted_by_server": all(answer.by_usage for answer in whole),
        "client_cpu": _rounded(max(block.client_cpu for block in blocks)),
        "spread": {name: _quartiles(values) for name, values in rates.items()},
    }


def ratios_of(blocks: Sequence[Block], reference: Sequence[Block]) -> dict[str, Any]:
    """A system's blocks by those of a reference in the same rounds: medians, and their spread."""
    found: dict[str, Any] = {}
    measures: dict[str, Callable[[Block], float | None]] = {
        "tokens_per_s": lambda block: block.tokens_per_s,
        "first_token_95": lambda block: block.first_token_95,
    }
    for name, measure in measures.items():
        pairs = [(measure(a), measure(b)) for a, b in zip(blocks, reference, strict=True)]
        ratios = [own / other for own, other in pairs if own is not None and other]
        found[name] = _rounded(statistics.median(ratios)) if ratios else None
        found[f"{name}_spread"] = _quartiles(ratios)
    return found


def same_answers(blocks: Sequence[Block], reference: Sequence[Block]) -> dict[str, int]:
    """Of the requests that both answered whole, how many got the same text."""
    same = both = 0
    for own, other in zip(blocks, reference, strict=True):
        texts = {answer.index: answer.text for answer in other.whole}
        shared = [answer for answer in own.whole if answer.index in texts]
        both += len(shared)
        same += sum(answer.text == texts[answer.index] for answer in shared)
    return {"same": same, "of": both}


def compare(
    systems: Mapping[str, Sequence[Block]], references: Sequence[str], exact: Sequence[str]
) -> dict[str, Any]:
    """Figures of each system at one load, and its ratios to those of ``references`` that are there.

    The answers of ``exact`` systems are compared with those of the last of them.
    """
    found = {}
    there = [name for name in references if name in systems]
    exact = [name for name in exact if name in systems]
    for name, blocks in systems.items():
        over = {other: ratios_of(blocks, systems[other]) for other in there if other != name}
        found[name] = {**figures_of(blocks), "over": over}
        if name in exact[:-1]:
            found[name]["same_answers"] = same_answers(blocks, systems[exact[-1]])
    return found


def _quartiles(values: Sequence[float]) -> list[float | None]:
    return [_rounded(percentile(values, percent)) for percent in (25, 75)]


def _rounded(value: float | None) -> float | None:
    """To four digits."""
    return None if value is None else float(f"{value:.4g}")
