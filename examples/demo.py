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
from eepass.benchmark.turns import Answer, EngineStream, decode_in_turns, speed_up
from eepass.checkpoints.models import LoadedModel
from eepass.cli import console as terminal
from eepass.cli.console import LiveAnswer, console, errors, outcome
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
            "lossless": model.configure(ExitConfig(remember=False)),
            "early exit": model.configure(ExitConfig().approximate(options.target)),
        }
        for engine in systems.values():
            list(engine.generate(loaded.encode("Hello"), 24))
    # early exit by itself, for the picture
    alone = Statistics(model.decoder.num_layers)
    totals = {name: Statistics(model.decoder.num_layers) for name in systems}
    answers: dict[str, list[Answer]] = {name: [] for name in systems}
    agreeing = 0
    for prompt in PROMPTS:
        ids = loaded.encode(prompt)
        answer = answer_live(systems["lossless"], loaded, ids, prompt, options.tokens)
        with errors.status("the same in turns: dense, lossless, and early exit along the answer"):
            found, agreed = measure(systems, ids, answer, options.tokens, loaded.stop)
        agreeing += agreed
        for name, engine in systems.items():
            answers[name].append(found[name])
            totals[name].add(engine.statistics)
        engine = systems["early exit"]
        engine.statistics = Statistics(model.decoder.num_layers)
        list(engine.generate(ids, options.tokens, loaded.stop))
        alone.add(engine.statistics)
        console.print()
    show(totals, answers)
    share = agreeing / max(totals["early exit"].tokens, 1)
    decision = systems["lossless"].planner.decision()
    console.print(
        f"\nLossless gave the same text as dense; early exit agrees with {share:.1%} of it.\n"
        f"Of the lossless ways, {outcome(totals['lossless'].summary(), decision)}",
        highlight=False,
    )
    file = Path("out") / "exit-layers.png"
    pictures.exit_layers(alone.exit_layers, file, "smollm2: where tokens exited, early exit alone")
    console.print(f"Picture: {file}")


def answer_live(
    engine: Engine, loaded: LoadedModel, ids: list[int], prompt: str, tokens: int
) -> list[int]:
    """Show an answer as it comes; returns its tokens."""

    def decode(generated: list[int]) -> str:
        return str(loaded.tokenizer.decode(generated, skip_special_tokens=True))

    answer = []
    with LiveAnswer(decode, engine.decoder.num_layers, prompt) as live:
        for step in engine.generate(ids, tokens, loaded.stop):
            answer.append(step.token)
            if step.token not in loaded.stop:
                live.add(*step)
    return answer


def measure(
    systems: dict[str, Engine], ids: list[int], answer: list[int], tokens: int, stop: frozenset[int]
) -> tuple[dict[str, Answer], int]:
    """All systems on one prompt, in turns; how many tokens of early exit agree with ``answer``,
    which it follows.

    Raises ``InputError`` if the lossless answer differs from the dense one.
    """
    for engine in systems.values():
        engine.statistics = Statistics(engine.decoder.num_layers)
    streams = {
        name: EngineStream.follow(engine, ids, answer)
        if name == "early exit"
        else EngineStream.generate(engine, ids, tokens, stop)
        for name, engine in systems.items()
    }
    found = decode_in_turns(streams)
    different = found["lossless"].tokens != found["dense"].tokens
    if different and not systems["lossless"].statistics.near_ties:
        raise eepass.InputError("the lossless answer differs from the dense one")
    early = streams["early exit"].followed
    return found, sum(a == b.token for a, b in zip(answer[1:], early, strict=True))


def show(totals: dict[str, Statistics], answers: dict[str, list[Answer]]) -> None:
    rows = []
    for name, statistics in totals.items():
        ratio, figures = speed_up(answers["dense"], answers[name]), statistics.summary()
        rows.append(
            (
                name,
                f"{figures['ms_per_token']:.2f}",
                terminal.speed_up(ratio.value, ratio.spread()),
                f"{figures['accepted_per_pass']:.2f}",
                f"{figures['mean_exit_layer']:.1f} of {statistics.num_layers}",
            )
        )
    terminal.table(
        "the same prompts, measured in turns",
        ("system", "ms/token", "speed", "tokens/pass", "exit layer"),
        rows,
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    try:
        main()
    except eepass.InputError as error:
        errors.print(f"error: {error}", markup=False)
        sys.exit(2)
