"""Times of passes and prompts, systems in turns with readings of memory; what follows from them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from time import sleep
from typing import Any, Protocol

ROUNDS, PROMPT_ROUNDS = 9, 3
# seconds of a block, and how many passes it may have
BLOCK, FEWEST, MOST = 0.15, 3, 20
# threads of a system whose turn is over spin for some milliseconds before they sleep
PAUSE = 0.02
EEPASS, LLAMA = "eepass", "llama.cpp"
# by system, then by number of rows or tokens: a figure for each round
Series = Mapping[int, list[float]]


class System(Protocol):
    """Something that runs a model; it answers in seconds."""

    def passes(self, rows: int, count: int) -> list[float]:
        """Of each of ``count`` passes of ``rows`` tokens after the same few others."""

    def prefill(self, tokens: int) -> float:
        """Of a prompt of ``tokens`` tokens, to the logits of the last."""


def measure_passes(
    systems: Mapping[str, System],
    stream: Callable[[], float],
    rows: Sequence[int],
    rounds: int = ROUNDS,
) -> tuple[dict[str, Series], Series]:
    """Seconds of a pass by system and row count, and ``stream``'s GB/s by row count, by round."""
    times: dict[str, Series] = {name: {n: [] for n in rows} for name in systems}
    streams: Series = {n: [] for n in rows}
    counts = {}
    for name, system in systems.items():
        for n in rows:
            # the first compiles
            seconds = system.passes(n, 3)[-1]
            counts[name, n] = min(max(round(BLOCK / seconds), FEWEST), MOST)
    for _ in range(rounds):
        for n in rows:
            for name, system in systems.items():
                sleep(PAUSE)
                # the first pass of a block finds its threads asleep
                found = system.passes(n, 1 + counts[name, n])[1:]
                times[name][n].append(statistics.median(found))
                if name == EEPASS:
                    streams[n].append(stream())
    return times, streams


def measure_prompts(
    systems: Mapping[str, System], lengths: Sequence[int], rounds: int = PROMPT_ROUNDS
) -> dict[str, Series]:
    """Seconds of a prompt by system and length, by round; one round before them is not counted."""
    times: dict[str, Series] = {name: {n: [] for n in lengths} for name in systems}
    for turn in range(rounds + 1):
        for n in lengths[: None if turn else 1]:
            for name, system in systems.items():
                sleep(PAUSE)
                seconds = system.prefill(n)
                if turn:
                    times[name][n].append(seconds)
    return times


def figures_of(
    times: Mapping[str, Series],
    streams: Series,
    prompts: Mapping[str, Series],
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    """The report's figures and their quartiles, under ``spread``.

    ``sizes``: bytes that a pass has to read, by the name of the fraction they give.
    """
    series: dict[str, Any] = {
        "stream_gb_s": [value for taken in streams.values() for value in taken],
        "pass_ms": {name: _each(own, lambda t: 1e3 * t) for name, own in times.items()},
        "rows_over_one": {
            name: {n: _ratios(taken, own[min(own)]) for n, taken in own.items() if n > min(own)}
            for name, own in times.items()
        },
        "prefill_tokens_per_s": {
            name: {n: [n / t for t in taken] for n, taken in own.items()}
            for name, own in prompts.items()
        },
    }
    for name, size in sizes.items():
        series[name] = {
            n: [size / 1e9 / t / s for t, s in zip(taken, streams[n], strict=True)]
            for n, taken in times[EEPASS].items()
        }
    if LLAMA in times:
        series["of_llama_cpp"] = _over(times[EEPASS], times[LLAMA])
        series["prefill_over_llama_cpp"] = _over(prompts[LLAMA], prompts[EEPASS])
    return {
        **_reduced(series, median_of),
        "spread": _reduced(series, quartiles_of),
    }


def _each(own: Series, change: Callable[[float], float]) -> dict[int, list[float]]:
    return {n: [change(value) for value in taken] for n, taken in own.items()}


def _ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Of the blocks of one round each."""
    return [a / b for a, b in zip(above, below, strict=True)]


def _over(above: Series, below: Series) -> dict[int, list[float]]:
    return {n: _ratios(taken, below[n]) for n, taken in above.items()}


def _reduced(series: Any, reduce: Callable[[list[float]], Any]) -> Any:
    """Every list of a nest of dictionaries as one value; keys as JSON has them."""
    if isinstance(series, list):
        return reduce(series)
    return {str(key): _reduced(value, reduce) for key, value in series.items()}


def median_of(values: list[float]) -> float:
    """To four digits."""
    return float(f"{statistics.median(values):.4g}")


def quartiles_of(values: list[float]) -> list[float]:
    """The ends of the middle half."""
    ordered, outside = sorted(values), len(values) // 4
    return [float(f"{value:.4g}") for value in (ordered[outside], ordered[-1 - outside])]
