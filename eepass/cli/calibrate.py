"""``eepass calibrate``: new thresholds of an artefact, for quantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from eepass.cli.command import command
from eepass.cli.console import console
from eepass.cli.models import calibrate_artifact, load_model
from eepass.cli.options import (
    ArtifactDir,
    Debug,
    Dtype,
    Json,
    Model,
    Prompts,
    Quantize,
    Raw,
    Threads,
)


@command
def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the artefact with new thresholds.")],
    artifact: ArtifactDir = None,
    quantize: Quantize = "keep",
    prompts: Prompts = None,
    tokens: Annotated[int, typer.Option(help="Answer tokens to look at.", min=200)] = 4000,
    raw: Raw = False,
    json_file: Json = None,
    dtype: Dtype = None,
    threads: Threads = 0,
    debug: Debug = False,
) -> dict[str, Any]:
    """Find an artefact's thresholds anew for quantised weights; trains nothing, takes minutes."""
    loaded = load_model(model, dtype, threads, quantize=quantize)
    made = calibrate_artifact(loaded, artifact, out, prompts, tokens, raw)
    console.print(f"artefact: {out}", highlight=False)
    return dict(made.report)
