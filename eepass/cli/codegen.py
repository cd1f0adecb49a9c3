"""``eepass codegen``: a model's GPU kernels, compiled without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from eepass.cli import options
from eepass.cli.command import command
from eepass.cli.console import console, table
from eepass.cli.models import load_model


@command
def codegen(
    model: options.Model,
    target: Annotated[str, typer.Option(help="sm_80, sm_86, sm_89 or sm_90.")] = "sm_90",
    artifact: options.ArtifactDir = None,
    rows: Annotated[int, typer.Option(help="Rows in a pass, 1 to 32.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for the compiled kernels.")] = None,
    json_file: options.Json = None,
    dtype: options.Dtype = "bf16",
    debug: options.Debug = False,
) -> dict[str, Any]:
    """Generate MODEL's GPU kernels and compile them; needs no GPU."""
    from eepass.bundle import gpu_kernels

    gpu_kernels.capability_of(target)
    loaded = load_model(model, dtype, 0)
    with console.status(f"compiling for {target}"):
        found = gpu_kernels.compile_kernels(
            loaded.model, artifact or loaded.artifact, target, rows, out
        )
    show(found, f"{model} on {target}, {rows} rows: predicted, not measured")
    return found


def show(found: Mapping[str, Any], title: str) -> None:
    table(
        title,
        ("kernel", "registers", "spills", "shared", "bytes", "µs"),
        [(name, *(str(value) for value in k.values())) for name, k in found["kernels"].items()],
    )
