"""``eepass transform``: write a model as a folder that runs at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from eepass.cli import options
from eepass.cli.command import command
from eepass.cli.console import console
from eepass.cli.models import calibrate_artifact, load_model
from eepass.errors import InputError


@command
def transform(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Folder to write; a transformed one is replaced.")],
    artifact: options.ArtifactDir = None,
    quantize: options.Quantize = "keep",
    rows: Annotated[
        str, typer.Option(help="Row counts to compile for: 1, and how many tokens go in a pass.")
    ] = "1,4,8,16",
    max_length: options.MaxLength = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Leave the artefact out: no token exits early.")
    ] = False,
    gpu: Annotated[
        list[str] | None, typer.Option(help="Also store kernels for this GPU: sm_80 to sm_90.")
    ] = None,
    json_file: options.Json = None,
    dtype: options.Dtype = None,
    threads: options.Threads = 0,
    debug: options.Debug = False,
) -> dict[str, Any]:
    """Write MODEL as a folder that runs at once: compiled, signed, without transformers."""
    from eepass.bundle.write import write_folder

    sizes = _numbers(rows, "--rows")
    loaded = load_model(model, dtype, threads, quantize=quantize)
    folder = None if dense else artifact or loaded.artifact
    if not dense and loaded.unquantized_artifact is not None and artifact is None:
        folder = calibrate_artifact(loaded, None)
    with console.status("transforming") as status:
        report = write_folder(loaded, out, folder, sizes, max_length, status.update, gpu or ())
    size = sum(report["compiled"].values()) / 1e6
    console.print(
        f"{len(report['compiled'])} libraries, {size:.1f} MB of code, in {report['seconds']} s"
    )
    console.print(f"transformed: {out}; eepass generate {out} --prompt ...", highlight=False)
    return report


def _numbers(text: str, option: str) -> list[int]:
    """The whole numbers of ``text``, between commas; ``InputError`` naming ``option``."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text}: expected numbers, as in 1,4,8") from None
