"""``eepass train``: translators, draft head, predictors and thresholds for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from eepass.cli import options
from eepass.cli.command import command
from eepass.cli.console import console, progress_bars, table
from eepass.cli.models import load_model
from eepass.errors import InputError


@command
def train(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Folder for the artefact; resumed if it has begun.")],
    prompts: options.Prompts = None,
    tokens: Annotated[int, typer.Option(help="Answer tokens to generate.", min=1000)] = 200_000,
    answers: Annotated[
        Path | None, typer.Option(help="The model's own answers as JSONL, instead of generating.")
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Further answers to each prompt, sampled.", min=0)
    ] = 0,
    temperature: Annotated[float, typer.Option(help="Of those samples.", min=0.1)] = 0.7,
    own_prompts: Annotated[
        int, typer.Option(help="Prompts the model writes itself, beside those given.", min=0)
    ] = 0,
    draft: Annotated[str, typer.Option(help="Draft head: eagle, or none.")] = "eagle",
    steps: Annotated[int, typer.Option(help="Drafts in a row the head is trained for.", min=1)] = 4,
    raw: options.Raw = False,
    max_length: Annotated[
        int, typer.Option(help="Longer texts are cut here, in tokens.", min=64)
    ] = 512,
    json_file: options.Json = None,
    dtype: options.Dtype = None,
    threads: options.Threads = 0,
    debug: options.Debug = False,
) -> dict[str, Any]:
    """Train translators, draft head, predictors and thresholds for MODEL, on its own answers."""
    from eepass.training import train as training

    loaded = load_model(model, dtype, threads)
    with progress_bars() as bars:
        artifact = training.train(
            loaded, out, prompts, tokens, answers, raw, max_length, samples, temperature,
            _draft(draft), steps, own_prompts, progress=bars,
        )  # fmt: skip
    show(artifact)
    console.print(f"artefact: {out}")
    return dict(artifact.report)


def show(artifact: Any) -> None:
    for name, part in artifact.presets.items():
        table(
            f"{name}: expected on held-out answers",
            ("target", "agreement", "exit layer", "speed-up (bytes)"),
            [
                (f"{c.target}", f"{c.agreement:.4f}", f"{c.mean_exit_layer:.1f}",
                 f"{c.speedup:.2f}x")
                for c in part.calibrations
            ],
        )  # fmt: skip


def _draft(name: str) -> Any:
    if name not in ("eagle", "none"):
        raise InputError(f"--draft {name}: expected eagle or none")
    return name
