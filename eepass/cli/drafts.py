"""``eepass export-draft`` and ``import-draft``: draft heads of other servers and for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from eepass.cli import options
from eepass.cli.command import command, load_model
from eepass.cli.console import console, progress_bars
from eepass.cli.train import show_kinds
from eepass.errors import InputError


@command
def export_draft(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Folder to write; an exported one is replaced.")],
    artifact: options.ArtifactDir = None,
    format: Annotated[
        str, typer.Option(help="eagle3, as vLLM reads it; speculators, of vLLM's library; or gguf.")
    ] = "eagle3",
    verifier: Annotated[
        str | None,
        typer.Option(help="What the server calls MODEL, where it is another folder or id."),
    ] = None,
    json_file: options.Json = None,
    dtype: options.Dtype = None,
    threads: options.Threads = 0,
    debug: options.Debug = False,
) -> dict[str, Any]:
    """Write an artefact's trained draft head as an EAGLE-3 checkpoint for other servers."""
    from eepass.drafts import write_head

    loaded = load_model(model, dtype, threads)
    source = artifact or loaded.artifact
    if source is None:
        raise InputError(f"{model} has no artefact: give --artifact DIR")
    with console.status("exporting"):
        found = write_head.export_draft(loaded, source, out, format, verifier)
    console.print(
        f"exported: {out}, {found['bytes'] / 1e6:.1f} MB; its README.md has the server's command",
        highlight=False,
    )
    return found


@command
def import_draft(
    model: options.Model,
    head: Annotated[Path, typer.Argument(help="Folder with an EAGLE-3 head: JSON, safetensors.")],
    out: Annotated[Path, typer.Option(help="Folder for the artefact.")],
    artifact: Annotated[
        Path | None, typer.Option("--artifact", help="Artefact whose exits are kept.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="After which layers its features are taken, as in 2,15,27."),
    ] = None,
    prompts: options.Prompts = None,
    tokens: Annotated[int, typer.Option(help="Answer tokens to measure on.", min=200)] = 2000,
    raw: options.Raw = False,
    json_file: options.Json = None,
    dtype: options.Dtype = None,
    threads: options.Threads = 0,
    debug: options.Debug = False,
) -> dict[str, Any]:
    """Make an artefact for MODEL of a draft head trained elsewhere, and measure its acceptance."""
    from eepass.drafts import import_head

    try:
        given = None if layers is None else tuple(int(layer) for layer in layers.split(","))
    except ValueError:
        raise InputError(f"--layers {layers}: expected numbers, as in 2,15,27") from None
    loaded = load_model(model, dtype, threads)
    with progress_bars() as bars:
        made = import_head.import_draft(
            loaded, head, out, artifact, given, prompts, tokens, raw, progress=bars
        )
    show_kinds(made.report["by_kind"])
    found = made.report["draft_head"]
    console.print(f"features after layers {found['config']['layers']}", highlight=False)
    if given is None and found["config"]["layers"][:1] == (1,):
        console.print(
            "some heads count layers from 0: if few drafts are accepted, try --layers with one more"
        )
    console.print(f"artefact: {out}", highlight=False)
    return dict(made.report)
