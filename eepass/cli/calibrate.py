"""``eepass calibrate``: an artefact's thresholds anew, for quantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eepass.cli.options import (
    ArtifactDir,
    Debug,
    Device,
    Dtype,
    Json,
    Model,
    Prompts,
    Quantize,
    Raw,
    Threads,
)
from eepass.cli.running import calibrated, load, run, write_json


def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the artefact with new thresholds.")],
    artifact: ArtifactDir = None,
    quantize: Quantize = "keep",
    prompts: Prompts = None,
    tokens: Annotated[int, typer.Option(help="Answer tokens to look at.", min=200)] = 4000,
    raw: Raw = False,
    json_file: Json = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = 0,
    debug: Debug = False,
) -> None:
    """Find an artefact's thresholds anew for MODEL quantised; trains nothing, takes minutes."""

    def work() -> None:
        from eepass.cli.console import console

        loaded = load(model, dtype, device, threads, quantize=quantize)
        made = calibrated(loaded, artifact, out, prompts, tokens, raw)
        console.print(f"artefact: {out}", highlight=False)
        write_json(json_file, dict(made.report))

    run(work, debug)
