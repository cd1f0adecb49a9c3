"""``eepass transform``: write a model as a folder that runs at once."""

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
    MaxLength,
    Model,
    Quantize,
    Threads,
)
from eepass.cli.requests import numbers
from eepass.cli.running import calibrated, load, run, write_json


def transform(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write; a transformed one is replaced.")],
    artifact: ArtifactDir = None,
    quantize: Quantize = "keep",
    rows: Annotated[
        str, typer.Option(help="Row counts to compile for: 1, and how many tokens go in a pass.")
    ] = "1,4,8,16",
    max_length: MaxLength = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Leave the artefact out: no token leaves early.")
    ] = False,
    gpu: Annotated[
        list[str] | None, typer.Option(help="Also hold kernels for this GPU: sm_80 to sm_90.")
    ] = None,
    json_file: Json = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = 0,
    debug: Debug = False,
) -> None:
    """Write MODEL as a folder that runs at once: compiled, signed, without transformers."""

    def work() -> None:
        from eepass.bundle.write import write_folder
        from eepass.cli.console import console

        sizes = numbers(rows, "--rows")
        loaded = load(model, dtype, device, threads, quantize=quantize)
        folder = None if dense else artifact or loaded.artifact
        if not dense and loaded.unquantized_artifact is not None and artifact is None:
            folder = calibrated(loaded, None)
        with console.status("transforming") as status:
            report = write_folder(loaded, out, folder, sizes, max_length, status.update, gpu or ())
        size = sum(report["compiled"].values()) / 1e6
        console.print(
            f"{len(report['compiled'])} libraries, {size:.1f} MB of code, in {report['seconds']} s"
        )
        console.print(f"transformed: {out}; eepass generate {out} --prompt ...", highlight=False)
        write_json(json_file, report)

    run(work, debug)
