"""``eepass codegen``: a model's GPU kernels, compiled without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eepass.cli.options import (
    ArtifactDir,
    Debug,
    Dtype,
    Json,
    Model,
)
from eepass.cli.running import load, run, write_json


def codegen(
    model: Model,
    target: Annotated[str, typer.Option(help="sm_80, sm_86, sm_89 or sm_90.")] = "sm_90",
    artifact: ArtifactDir = None,
    rows: Annotated[int, typer.Option(help="Rows in a pass, 1 to 32.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for the compiled kernels.")] = None,
    json_file: Json = None,
    dtype: Dtype = "bf16",
    debug: Debug = False,
) -> None:
    """Generate MODEL's GPU kernels and compile them; needs no GPU."""

    def work() -> None:
        from eepass.bundle import gpu_kernels
        from eepass.cli.console import console, table

        gpu_kernels.capability_of(target)
        loaded = load(model, dtype, "cpu", 0)
        with console.status(f"compiling for {target}"):
            found = gpu_kernels.compile_kernels(
                loaded.model, artifact or loaded.artifact, target, rows, out
            )
        table(
            f"{model} on {target}, {rows} rows: predicted, not measured",
            ("kernel", "registers", "spills", "shared", "bytes", "µs"),
            [(name, *(str(value) for value in k.values())) for name, k in found["kernels"].items()],
        )
        write_json(json_file, found)

    run(work, debug)
