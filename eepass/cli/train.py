"""``eepass train`` and ``eepass calibrate``: an artefact for a model, or new thresholds of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from eepass.cli import options
from eepass.cli.command import (
    calibrate_artifact,
    command,
    load_model,
    resumed_command,
)
from eepass.cli.console import console, progress_bars, table
from eepass.errors import InputError


@resumed_command
def train(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Folder for the artefact; resumed if it has begun.")],
    quantize: options.Quantize = "none",
    activations: options.Activations = "int8",
    prompts: options.Prompts = None,
    tokens: Annotated[int, typer.Option(help="Answer tokens to generate.", min=1000)] = 200_000,
    answers: Annotated[
        Path | None, typer.Option(help="The model's own answers as JSONL, instead of generating.")
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Further answers to each prompt, sampled.", min=0)
    ] = 1,
    temperature: Annotated[float, typer.Option(help="Of those samples.", min=0.1)] = 0.7,
    own_prompts: Annotated[
        int | None,
        typer.Option(
            help="Prompts of many kinds the model writes itself, beside those given; without "
            "--prompts and --answers as many as --tokens needs.",
            min=0,
        ),
    ] = None,
    draft: Annotated[str, typer.Option(help="Draft head: eagle, or none.")] = "eagle",
    steps: Annotated[int, typer.Option(help="Drafts in a row the head is trained for.", min=1)] = 4,
    start: Annotated[
        Path | None,
        typer.Option(
            help="An artefact for a model of this form, whose draft head is trained further."
        ),
    ] = None,
    keep_exits: Annotated[
        bool, typer.Option("--keep-exits", help="Keep the exits of --start as they are.")
    ] = False,
    raw: options.Raw = False,
    max_length: Annotated[
        int, typer.Option(help="Longer texts are cut here, in tokens.", min=64)
    ] = 512,
    json_file: options.Json = None,
    dtype: options.Dtype = None,
    threads: options.Threads = 0,
    debug: options.Debug = False,
) -> dict[str, Any]:
    """Train translators, draft head, predictors and thresholds for MODEL, on its own answers.

    Without further options it writes prompts and answers of many kinds itself; it says at the start
    how long that will take here, and a run that was stopped goes on when it is started again.
    With --quantize keep a quantised checkpoint answers as it is served, several times as fast; the
    artefact is for the weights it stands for, quantised or not.
    """
    from eepass.training import train as training

    if draft not in ("eagle", "none"):
        raise InputError(f"--draft {draft}: expected eagle or none")
    loaded = load_model(model, dtype, threads, quantize=quantize, activations=activations)
    with progress_bars() as bars:
        artifact = training.train(
            loaded, out, prompts, tokens, answers, raw, max_length, samples, temperature,
            "eagle" if draft == "eagle" else "none", steps, own_prompts, progress=bars, start=start,
            keep_exits=keep_exits,
        )  # fmt: skip
    show(artifact)
    show_kinds(artifact.report.get("by_kind"))
    console.print(f"artefact: {out}")
    return dict(artifact.report)


def show_kinds(report: dict[str, Any] | None) -> None:
    """How far drafts are accepted, by kind of text."""
    if not report or not report["kinds"]:
        return
    title = "kinds of text left out of training" if report["held_out"] else "held-out answers"
    steps = max(len(kind["accepted"]) for kind in report["kinds"].values())
    table(
        f"drafts accepted, {title}",
        ("kind", *(f"draft {n}" for n in range(1, steps + 1)), "tokens a pass"),
        [
            (name, *(f"{share:.2f}" for share in kind["accepted"]), f"{kind['a_pass']:.2f}")
            for name, kind in report["kinds"].items()
        ],
    )


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


@command
def calibrate(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Folder for the artefact with new thresholds.")],
    artifact: options.ArtifactDir = None,
    quantize: options.Quantize = "keep",
    activations: options.Activations = "int8",
    prompts: options.Prompts = None,
    tokens: Annotated[int, typer.Option(help="Answer tokens to look at.", min=200)] = 4000,
    raw: options.Raw = False,
    json_file: options.Json = None,
    dtype: options.Dtype = None,
    threads: options.Threads = 0,
    debug: options.Debug = False,
) -> dict[str, Any]:
    """Find an artefact's thresholds anew for quantised weights; trains nothing, takes minutes."""
    loaded = load_model(model, dtype, threads, quantize=quantize, activations=activations)
    made = calibrate_artifact(loaded, artifact, out=out, prompts=prompts, tokens=tokens, raw=raw)
    console.print(f"artefact: {out}", highlight=False)
    return dict(made.report)
