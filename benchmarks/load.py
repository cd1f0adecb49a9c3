"""Sequences decoded together: exact with everything allowed, beside dense.

    python benchmarks/load.py [--tokens N]

Under load a pass is full of rows, so drafts and exits gain little: what counts is that the engine
chooses accordingly and is not slower than dense. Answers must be the same.
"""

from __future__ import annotations

import argparse
from time import perf_counter

import torch

import eepass
from eepass.cli.console import table
from eepass.config import ExitConfig
from eepass.runtime.engine.engine import Engine
from eepass.training.corpus import read_prompts
from eepass.training.train import DEFAULT_PROMPTS

ROOM = 320


def run(engine: Engine, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], float]:
    """All prompts together; their answers, and seconds of decoding."""
    sequences = [engine.start(ids, tokens, capacity=ROOM) for ids in prompts]
    began = perf_counter()
    while going := [s for s in sequences if not s.finished]:
        if steps := [s for s in going if not s.at_its_end]:
            engine.step(steps)
        if ends := [s for s in going if s.at_its_end]:
            engine.catch_up(ends)
    seconds = perf_counter() - began
    engine.reset()
    return [s.tokens[s.prompt_length : s.num_confirmed] for s in sequences], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    loaded = eepass.load("smollm2")
    model = eepass.transform(loaded.model, loaded.artifact, max_length=16 * ROOM)
    engines = {"dense": model.dense, "exact": model.configure(ExitConfig(remember=False))}
    texts = read_prompts(DEFAULT_PROMPTS, 16)
    rows = []
    for size in (1, 4, 8, 16):
        prompts = [loaded.encode(text) for text in texts[:size]]
        rates = {}
        answers = {}
        for engine in engines.values():
            run(engine, prompts, 8)
        for _ in range(3):
            for name, engine in engines.items():
                answers[name], seconds = run(engine, prompts, options.tokens)
                rate = size * (options.tokens - 1) / seconds
                rates.setdefault(name, []).append(rate)
        best = {name: sorted(found)[1] for name, found in rates.items()}
        same = sum(a == b for a, b in zip(answers["dense"], answers["exact"], strict=True))
        mode = engines["exact"].planner.decision(size)["mode"]
        rows.append(
            (
                f"{size}", f"{best['dense']:.0f}", f"{best['exact']:.0f}",
                f"{best['exact'] / best['dense']:.2f}x", str(mode), f"{same} of {size}",
            )
        )  # fmt: skip
    table(
        "sequences together, tokens a second (medians of three, in turns)",
        ("sequences", "dense", "exact", "of dense", "chosen", "same text"),
        rows,
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
