"""Times in turns, copy bandwidth, and how the two meet."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch

from benchmarks.suite.bench import Bench

# share of a part's time after which no further round is begun
ENOUGH = 0.8


def in_turns(
    bench: Bench,
    systems: Mapping[str, Callable[[], float]],
    rounds: int,
    notify: Callable[[dict[str, list[float]]], None] = lambda times: None,
) -> dict[str, list[float]]:
    """Figures by system, one a round; the order turns with each round, as a device warms up.

    A warm-up of all comes first and is not counted. At least one round is run, further ones only
    while there is time for them; ``notify`` sees the figures after each.
    """
    for run in systems.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in systems}
    longest = 0.0
    for turn in range(rounds):
        if turn and longest > ENOUGH * bench.seconds_left():
            break
        began = perf_counter()
        order = list(systems)
        order = order[turn % len(order) :] + order[: turn % len(order)]
        for name in order:
            times[name].append(systems[name]())
        longest = max(longest, perf_counter() - began)
        notify(times)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(taken) for name, taken in times.items() if taken}


def paired_ratio(times: Mapping[str, list[float]], above: str, below: str) -> float:
    """Median of ``above`` by ``below``, round by round."""
    pairs = zip(times[above], times[below], strict=True)
    return statistics.median(a / b for a, b in pairs)


def copy_bandwidth(bench: Bench, rounds: int = 9) -> float:
    """Bytes a second that a copy within the device's memory reads and writes."""
    size = 2**31 if bench.on_cuda else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    repeats = 10 if bench.on_cuda else 1

    def copy() -> float:
        def several() -> None:
            for _ in range(repeats):
                target.copy_(source)

        return bench.timed(several)[1]

    times = in_turns(bench, {"copy": copy}, rounds)
    return 2 * size * repeats / statistics.median(times["copy"])


def weight_bytes(model: Any) -> int:
    """Bytes a dense step must read: layers, final norm and head (an embedding is looked up)."""
    read = [*model.base_model.layers.parameters(), *model.base_model.norm.parameters()]
    read += list(model.get_output_embeddings().parameters())
    return sum(tensor.nbytes for tensor in read)
