"""Three prompts answered by a real model, losslessly faster; early exit and dense beside it.

    python examples/demo.py [--tokens N]

The first run converts the model and compiles; both are kept for the next.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import eepass
from eepass import pictures
from eepass.checkpoints.models import LoadedModel
from eepass.cli.console import LiveAnswer, console, errors, table
from eepass.config import ExitConfig
from eepass.runtime.engine.engine import Engine
from eepass.runtime.statistics import Statistics

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in simple words why the sky is blue.",
    "Write a short story about a lighthouse keeper and a whale.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--target", type=float, default=0.94, help="agreement of early exit")
    options = parser.parse_args()

    with errors.status("converting smollm2 (once)"):
        loaded = eepass.load("smollm2")
    with errors.status("tracing the decoder, finding its layers"):
        model = eepass.transform(loaded.model, loaded.artifact, max_length=320, stop=loaded.stop)
    with errors.status("compiling for one row to sixteen, measuring what they cost (once)"):
        systems = {
            "dense": model.dense,
            "lossless": model.configure(ExitConfig()),
            "early exit": model.configure(ExitConfig().approximate(options.target)),
        }
        for engine in systems.values():
            list(engine.generate(loaded.encode("Hello"), 24))
    free = Statistics(model.decoder.num_layers)
    totals = {name: Statistics(model.decoder.num_layers) for name in systems}
    same = 0
    for prompt in PROMPTS:
        ids = loaded.encode(prompt)
        answer_live(systems["lossless"], loaded, ids, prompt, options.tokens)
        with errors.status("the same in turns: dense, lossless, and early exit along the answer"):
            same += side_by_side(systems, ids, options.tokens, loaded.stop)
        for name, engine in systems.items():
            totals[name].add(engine.statistics)
        # early exit by itself, for the picture
        engine = systems["early exit"]
        engine.statistics = Statistics(model.decoder.num_layers)
        list(engine.generate(ids, options.tokens, loaded.stop))
        free.add(engine.statistics)
        console.print()
    show(totals, same / max(totals["early exit"].tokens, 1))
    console.print(systems["lossless"].planner.decision())
    file = Path("out") / "exit-layers.png"
    pictures.exit_layers(free.exit_layers, file, "smollm2: where tokens left, early exit alone")
    console.print(f"picture: {file}")


def answer_live(
    engine: Engine, loaded: LoadedModel, ids: list[int], prompt: str, tokens: int
) -> None:
    def decode(tokens: list[int]) -> str:
        return str(loaded.tokenizer.decode(tokens, skip_special_tokens=True))

    with LiveAnswer(decode, engine.decoder.num_layers, prompt) as live:
        for step in engine.generate(ids, tokens, loaded.stop):
            if step.token not in loaded.stop:
                live.add(*step)


def side_by_side(
    systems: dict[str, Engine], ids: list[int], tokens: int, stop: frozenset[int]
) -> int:
    """All systems on one prompt; early exit along the dense answer. How many of its tokens agree.

    Raises ``InputError`` if the lossless answer is another than the dense one.
    """
    for engine in systems.values():
        engine.statistics = Statistics(engine.decoder.num_layers)
    answer = [step.token for step in systems["dense"].generate(ids, tokens, stop)]
    lossless = [step.token for step in systems["lossless"].generate(ids, tokens, stop)]
    if answer != lossless and not systems["lossless"].statistics.near_ties:
        raise eepass.InputError("the lossless answer differs from the dense one")
    early = [step.token for step in systems["early exit"].follow(ids, answer)]
    return sum(a == b for a, b in zip(answer[1:], early, strict=True))


def show(totals: dict[str, Statistics], agreement: float) -> None:
    dense = totals["dense"].summary()["ms_per_token"]
    rows = []
    for name, statistics in totals.items():
        found = statistics.summary()
        rows.append(
            (
                name,
                f"{found['ms_per_token']:.2f}",
                f"{dense / found['ms_per_token']:.2f}x",
                f"{found['accepted_per_pass']:.2f}",
                f"{found['mean_exit_layer']:.1f}",
                f"{found['predictor_share']:.1%}",
                f"{found['draft_share']:.1%}",
                f"{agreement:.3f}" if name == "early exit" else "same text",
            )
        )
    depth = totals["dense"].num_layers
    table(
        "the same prompts, measured in turns",
        ("", "ms/token", "speed", "tokens a pass", f"exit layer of {depth}", "predictors",
         "draft", "agreement"),
        rows,
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    try:
        main()
    except eepass.InputError as error:
        errors.print(f"error: {error}", markup=False)
        sys.exit(2)
