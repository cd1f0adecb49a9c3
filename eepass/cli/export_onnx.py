"""``eepass export-onnx``: write a model and its exits as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from eepass.cli import options
from eepass.cli.command import command
from eepass.cli.console import console
from eepass.cli.models import load_model


@command
def export_onnx(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Folder to write; an exported one is replaced.")],
    artifact: options.ArtifactDir = None,
    preset: options.Preset = "default",
    target_agreement: options.Target = 0.98,
    kv: Annotated[
        str, typer.Option(help="Keys and values of skipped layers: propagate or drop.")
    ] = "propagate",
    max_length: options.MaxLength = None,
    json_file: options.Json = None,
    threads: options.Threads = 0,
    trust_native: options.Trust = False,
    debug: options.Debug = False,
) -> dict[str, Any]:
    """Write MODEL and its exits as ONNX in fp32: decode.onnx, prefill.onnx, their weights once."""
    from eepass.cli import onnx_model

    transformed = (Path(model) / "transformed.json").exists()
    loaded = load_model(model, None if transformed else "fp32", threads, trust_native)
    with console.status("exporting") as status:
        report = onnx_model.export(
            loaded, out, artifact, preset, target_agreement, kv, max_length, status.update
        )
    console.print(
        f"exported in {report['seconds']} s: eepass generate {out / 'decode.onnx'} --prompt ...",
        highlight=False,
    )
    return report
