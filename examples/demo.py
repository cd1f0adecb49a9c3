"""Three prompts answered by a real model that stops early, beside the same model dense.

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
from eepass.config import ExitConfig
from eepass.console import LiveAnswer, console, errors, table
from eepass.models import LoadedModel
from eepass.runtime.statistics import Statistics
from eepass.transformation import EarlyExitModel

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in simple words why the sky is blue.",
    "Write a short story about a lighthouse keeper and a whale.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--target", type=float, default=0.94, help="agreement to keep")
    options = parser.parse_args()

    with errors.status("converting smollm2 (once)"):
        loaded = eepass.load("smollm2")
    with errors.status("tracing the decoder, finding its layers, compiling one of thirty"):
        config = ExitConfig(target_agreement=options.target)
        model = eepass.transform(
            loaded.model, loaded.artifact, config, max_length=320, stop=loaded.stop
        )
        warm_up(model, loaded.encode("Hello"))
    depth = model.decoder.num_layers
    free, dense, early = Statistics(depth), Statistics(depth), Statistics(depth)
    equal = 0
    for prompt in PROMPTS:
        ids = loaded.encode(prompt)
        answer_live(model, loaded, ids, prompt, options.tokens)
        free.add(model.engine.statistics)
        with errors.status("the same dense, then both along the dense answer"):
            equal += side_by_side(model, ids, options.tokens)
        dense.add(model.dense.statistics)
        early.add(model.engine.statistics)
        console.print()
    show(equal / max(dense.tokens, 1), free, dense, early)


def warm_up(model: EarlyExitModel, ids: list[int]) -> None:
    """Compile every row count there is before anything is timed."""
    answer = [step.token for step in model.dense.generate(ids, 32)]
    model.engine.follow(ids, answer)
    for rows in model.decoder.buckets:
        model.decoder.prepare(rows)


def answer_live(
    model: EarlyExitModel, loaded: LoadedModel, ids: list[int], prompt: str, tokens: int
) -> None:
    def decode(said: list[int]) -> str:
        return str(loaded.tokenizer.decode(said, skip_special_tokens=True))

    model.engine.statistics = Statistics(model.decoder.num_layers)
    with LiveAnswer(decode, model.decoder.num_layers, prompt) as live:
        for step in model.stream(ids, tokens):
            if step.token not in loaded.stop:
                live.add(*step)


def side_by_side(model: EarlyExitModel, ids: list[int], tokens: int) -> int:
    """Dense and early exit along the dense answer; how many tokens are the same."""
    answer = [step.token for step in model.dense.generate(ids, tokens, model.stop)]
    for engine in (model.dense, model.engine):
        engine.statistics = Statistics(model.decoder.num_layers)
    dense = [step.token for step in model.dense.follow(ids, answer)]
    early = [step.token for step in model.engine.follow(ids, answer)]
    model.engine.catch_up()
    return sum(a == b for a, b in zip(dense, early, strict=True))


def show(agreement: float, free: Statistics, dense: Statistics, early: Statistics) -> None:
    a, b, depth = dense.summary(), early.summary(), dense.num_layers
    table(
        "the same tokens, dense and leaving early (measured in turns)",
        ("", "ms/token", "speed", f"exit layer of {depth}", "predictors", "draft", "agreement"),
        [
            ("dense", f"{a['ms_per_token']:.2f}", "1.00x", f"{depth}", "", "", ""),
            (
                "early exit",
                f"{b['ms_per_token']:.2f}",
                f"{a['ms_per_token'] / b['ms_per_token']:.2f}x",
                f"{b['mean_exit_layer']:.1f}",
                f"{b['predictor_share']:.1%}",
                f"{b['draft_share']:.1%}",
                f"{agreement:.3f}",
            ),
        ],
    )
    file = Path("out") / "exit-layers.png"
    pictures.exit_layers(free.exit_layers, file, "smollm2: where tokens left, free running")
    console.print(
        f"free running: {free.mean_exit_layer:.1f} layers, "
        f"{free.summary()['ms_per_token']:.2f} ms/token, catching up included; picture: {file}"
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    try:
        main()
    except eepass.InputError as error:
        errors.print(f"error: {error}", markup=False)
        sys.exit(2)
