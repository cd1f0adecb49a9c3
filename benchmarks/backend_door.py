"""The overhead of ``torch.compile(backend="specee")`` over eepass' own loop, a step, on smollm2.

    python benchmarks/backend_door.py [--tokens N] [--json out.json]

Both decode the same dense answer under teacher forcing with the same exits and weights, in turns.
``inside`` is the backend's part of a call; the rest is Dynamo's, which evaluates guards and passes
tensors, as for any backend. In the last rows ``torch.compiler.set_stance`` skips the guards that do
not tell graphs apart: torch's switch for a server that has warmed up.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import StaticCache

import eepass
from eepass.cli.console import table
from eepass.config import ExitConfig
from eepass.runtime.engine.engine import Engine
from eepass.torch_compile.backend import specee

SLOTS, ROUNDS = 256, 4
PROMPT = "Give a step-by-step plan for a beginner in gardening."


class Timed:
    """The backend, with the seconds of the last call of what it compiled."""

    def __init__(self, **options: Any) -> None:
        self.options, self.seconds = options, 0.0

    def __call__(self, graph: Any, examples: Any, **_: Any) -> Any:
        compiled = specee(graph, examples, options=self.options)

        def run(*arguments: Any) -> Any:
            began = perf_counter()
            try:
                return compiled(*arguments)
            finally:
                self.seconds = perf_counter() - began

        return run


def through_door(model: Any, step: Any, timed: Timed, ids: list[int], answer: list[int]) -> Any:
    """Seconds of each call, and of each call's inside, along ``answer``."""
    cache, places = StaticCache(config=model.config, max_cache_len=SLOTS), torch.arange(SLOTS)
    model(torch.tensor([ids]), past_key_values=cache)
    whole, inside = [], []
    for position, token in enumerate(answer[:-1], len(ids)):
        given = {
            "input_ids": torch.tensor([[token]]),
            "position_ids": torch.full((1, 1), position),
            "attention_mask": (places <= position).expand(1, 1, 1, -1),
            "past_key_values": cache,
        }
        began = perf_counter()
        step(**given)
        whole.append(perf_counter() - began)
        inside.append(timed.seconds)
    return whole, inside


def through_engine(engine: Engine, ids: list[int], answer: list[int]) -> list[float]:
    """Seconds of each step of the engine along ``answer``."""
    sequence, seconds = engine.start(ids), []
    for token in answer[:-1]:
        sequence.replace_last(token)
        began = perf_counter()
        engine.step([sequence])
        seconds.append(perf_counter() - began)
    engine.catch_up([sequence])
    engine.end(sequence)
    return seconds


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    loaded = eepass.load("smollm2")
    config = ExitConfig().approximate()
    room = SLOTS - 64
    own = eepass.transform(loaded.model, loaded.artifact, max_length=room, config=config)
    ids = loaded.encode(PROMPT)
    answer = [step.token for step in own.dense.generate(ids, options.tokens)]
    timed = Timed(logits="hot")
    door = torch.compile(loaded.model, backend=timed)
    found: dict[str, float] = {}
    for name, unsafe in (("as it is", False), ("guards skipped", True)):
        through_door(loaded.model, door, timed, ids, answer)
        through_engine(own.engine, ids, answer)
        torch.compiler.set_stance("default", skip_guard_eval_unsafe=unsafe)
        calls, insides, steps = [], [], []
        for _ in range(ROUNDS):
            whole, inside = through_door(loaded.model, door, timed, ids, answer)
            calls += whole
            insides += inside
            steps += through_engine(own.engine, ids, answer)
        base = median(steps)
        found[f"engine, ms ({name})"] = 1e3 * base
        found[f"call over engine ({name})"] = median(calls) / base
        found[f"inside over engine ({name})"] = median(insides) / base
    torch.compiler.set_stance("default")
    table("the backend's door", ["", ""], [(name, f"{x:.3f}") for name, x in found.items()])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
