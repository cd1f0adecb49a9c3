"""Hugging Face's ``generate`` through ``backend="specee"``, beside inductor and the engine.

    python benchmarks/hf_generate.py MODEL [--tokens N] [--quantize keep|none] [--json out.json]

All decode the same prompt greedily over the same weights, without exits: what is compared is the
way a step is compiled. Milliseconds a token after the first, medians over turns in which each
system answers once; ``of_engine`` and ``of_inductor`` are ratios within a turn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from transformers import CompileConfig

import eepass
from eepass.cli.console import table

PROMPT = "Write a Python function that merges two sorted lists."
ROUNDS = 5


def per_token(model: Any, ids: torch.Tensor, tokens: int, backend: str) -> Callable[[], float]:
    """Seconds a token of ``model.generate`` compiled by ``backend``, prefill taken off."""
    options: Any = {"threshold": 1.0} if backend == "specee" else None
    compiled = CompileConfig(backend=backend, mode=None, options=options)
    # transformers compiles on GPUs alone unless told otherwise
    compiled._compile_all_devices = True

    def seconds(count: int) -> float:
        began = perf_counter()
        model.generate(
            ids, max_new_tokens=count, min_new_tokens=count, do_sample=False,
            cache_implementation="static", compile_config=compiled, pad_token_id=0,
        )  # fmt: skip
        return perf_counter() - began

    def run() -> float:
        return (seconds(tokens + 1) - seconds(1)) / tokens

    return run


def of_engine(model: Any, ids: torch.Tensor, tokens: int) -> Callable[[], float]:
    """Seconds a token of the dense engine."""
    engine = eepass.transform(model, max_length=256).dense

    def run() -> float:
        stream = engine.generate(ids[0].tolist(), tokens + 1, frozenset())
        next(stream)
        began = perf_counter()
        for _ in stream:
            pass
        return (perf_counter() - began) / tokens

    return run


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quantize = None if options.quantize == "none" else options.quantize
    loaded = eepass.load(options.model, quantize=quantize)
    ids = torch.tensor([loaded.encode(PROMPT)])
    systems = {
        "engine": of_engine(loaded.model, ids, options.tokens),
        "specee": per_token(loaded.model, ids, options.tokens, "specee"),
        "inductor": per_token(loaded.model, ids, options.tokens, "inductor"),
    }
    for run in systems.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(ROUNDS):
        for name, run in systems.items():
            times[name].append(1e3 * run())
    found = {
        "ms_per_token": {name: median(values) for name, values in times.items()},
        "of_engine": _ratio(times["specee"], times["engine"]),
        "of_inductor": _ratio(times["specee"], times["inductor"]),
    }
    rows = [(name, f"{value:.2f}") for name, value in found["ms_per_token"].items()]
    rows += [(name, f"{found[name]['median']:.3f}") for name in ("of_engine", "of_inductor")]
    table("generate, without exits", ["", ""], rows)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _ratio(ours: list[float], others: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(ours, others, strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    return {"median": middle, "low": low, "high": high}


if __name__ == "__main__":
    main()
