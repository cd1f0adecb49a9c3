"""``eepass calibrate``: new thresholds of an artefact, for quantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from eepass.cli import options
from eepass.cli.command import command
from eepass.cli.console import console
from eepass.cli.models import calibrate_artifact, load_model


@command
def calibrate(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Folder for the artefact with new thresholds.")],
    artifact: options.ArtifactDir = None,
    quantize: options.Quantize = "keep",
    prompts: options.Prompts = None,
    tokens: Annotated[int, typer.Option(help="Answer tokens to look at.", min=200)] = 4000,
    raw: options.Raw = False,
    json_file: options.Json = None,
    dtype: options.Dtype = None,
    threads: options.Threads = 0,
    debug: options.Debug = False,
) -> dict[str, Any]:
    """Find an artefact's thresholds anew for quantised weights; trains nothing, takes minutes."""
    loaded = load_model(model, dtype, threads, quantize=quantize)
    made = calibrate_artifact(loaded, artifact, out, prompts, tokens, raw)
    console.print(f"artefact: {out}", highlight=False)
    return dict(made.report)
