"""``eepass transform``, ``export-onnx`` and ``codegen``: what a model is written as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from eepass.cli import options
from eepass.cli.command import calibrate_artifact, command, load_model
from eepass.cli.console import console, table
from eepass.errors import InputError


@command
def transform(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Folder to write; a transformed one is replaced.")],
    artifact: options.ArtifactDir = None,
    quantize: options.Quantize = "keep",
    activations: options.Activations = "int8",
    rows: Annotated[
        str, typer.Option(help="Row counts to compile for: 1, and how many tokens go in a pass.")
    ] = "1,4,8,16",
    max_length: options.MaxLength = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Leave the artefact out: no token exits early.")
    ] = False,
    json_file: options.Json = None,
    dtype: options.Dtype = None,
    threads: options.Threads = 0,
    debug: options.Debug = False,
) -> dict[str, Any]:
    """Write MODEL as a folder that runs at once: compiled, signed, without transformers."""
    from eepass.bundle.write import write_folder

    try:
        sizes = [int(size) for size in rows.split(",")]
    except ValueError:
        raise InputError(f"--rows {rows}: expected numbers, as in 1,4,8") from None
    loaded = load_model(model, dtype, threads, quantize=quantize, activations=activations)
    folder = None if dense else artifact or loaded.artifact
    if not dense and loaded.unquantized_artifact is not None and artifact is None:
        folder = calibrate_artifact(loaded)
    with console.status("transforming") as status:
        report = write_folder(loaded, out, folder, sizes, max_length, status.update)
    size = sum(report["compiled"].values()) / 1e6
    console.print(
        f"{len(report['compiled'])} libraries, {size:.1f} MB of code, in {report['seconds']} s"
    )
    console.print(f"transformed: {out}; eepass generate {out} --prompt ...", highlight=False)
    return report


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
    from eepass.onnx import export

    config = replace(options.exit_config(preset).approximate(target_agreement), kv=kv)
    transformed = (Path(model) / "transformed.json").exists()
    loaded = load_model(model, None if transformed else "fp32", threads, trust_native)
    with console.status("exporting") as status:
        report = export.export_onnx(loaded, out, artifact, config, max_length, status.update)
    console.print(
        f"exported in {report['seconds']} s: eepass generate {out / 'decode.onnx'} --prompt ...",
        highlight=False,
    )
    return report


@command
def codegen(
    model: options.Model,
    target: Annotated[str, typer.Option(help="sm_80, sm_86, sm_89 or sm_90.")] = "sm_90",
    artifact: options.ArtifactDir = None,
    rows: Annotated[int, typer.Option(help="Rows in a pass, 1 to 32.")] = 1,
    json_file: options.Json = None,
    dtype: options.Dtype = "bf16",
    debug: options.Debug = False,
) -> dict[str, Any]:
    """Generate MODEL's GPU kernels and compile them; needs no GPU."""
    from eepass.bundle import gpu_kernels

    gpu_kernels.capability_of(target)
    loaded = load_model(model, dtype, 0)
    with console.status(f"compiling for {target}"):
        found = gpu_kernels.compile_kernels(loaded.model, artifact or loaded.artifact, target, rows)
    show_kernels(found, f"{model} on {target}, {rows} rows: predicted, not measured")
    return found


def show_kernels(found: Mapping[str, Any], title: str) -> None:
    table(
        title,
        ("kernel", "registers", "spills", "shared", "bytes", "µs"),
        [(name, *(str(value) for value in k.values())) for name, k in found["kernels"].items()],
    )
