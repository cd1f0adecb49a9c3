"""``eepass inspect``: layers, segments, exits and the exit graph of a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from eepass.cli import options
from eepass.cli.command import command, load_model, refuse_fixed_options, transform_model
from eepass.cli.console import console
from eepass.onnx import files as onnx_files


@command
def inspect(
    context: typer.Context,
    model: options.Model,
    artifact: options.ArtifactDir = None,
    quantize: options.Quantize = "keep",
    activations: options.Activations = "int8",
    picture: Annotated[Path | None, typer.Option(help="SVG or PNG of the exit graph.")] = None,
    code: Annotated[bool, typer.Option("--code", help="Print the exit graph as code.")] = False,
    preset: options.Preset = "default",
    target_agreement: options.Target = 0.98,
    dump: Annotated[Path | None, typer.Option(help="Write the graphs of each pass here.")] = None,
    json_file: options.Json = None,
    dtype: options.Dtype = None,
    threads: options.Threads = 0,
    trust_native: options.Trust = False,
    debug: options.Debug = False,
) -> dict[str, Any]:
    """Show layers, segments, exits and the exit graph of MODEL, or of an ONNX file."""
    if onnx_files.is_onnx(model):
        refuse_fixed_options(context)
        # the graph of the prompt can be inspected too
        path = Path(model)
        file = path if path.suffix == ".onnx" and path.is_file() else onnx_files.decode_file(model)
        found = onnx_files.describe(file)
        for name, value in found.items():
            console.print(f"{name}: {value}", highlight=False)
        return found
    from eepass import inspecting, pictures
    from eepass.lengths import usual_length

    config = options.exit_config(preset).approximate(target_agreement)
    loaded = load_model(model, dtype, threads, trust_native, quantize, activations)
    length = None if loaded.transformed else usual_length(loaded.model, 192)
    ready = transform_model(loaded, artifact, config, length, dump=dump, exits_optional=True)
    found = inspecting.describe(ready)
    for name, value in found.items():
        shown = [point["layer"] for point in value] if name == "exits" else value
        console.print(f"{name}: {shown}", highlight=False)
    if picture is not None:
        pictures.exit_graph(ready.splits[1], ready.plan, picture, model)
        console.print(f"picture: {picture}")
    if code:
        sys.stdout.write(inspecting.code_of(ready) + "\n")
    return found
