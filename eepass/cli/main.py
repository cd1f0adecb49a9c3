"""The command line: ``eepass probe | train | transform | generate | bench | inspect | …``."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from typing import Annotated, Any

import typer

from eepass.cli import options
from eepass.cli.bench import bench, probe
from eepass.cli.chat import chat
from eepass.cli.command import command, load_model, transform_model
from eepass.cli.console import errors
from eepass.cli.drafts import export_draft, import_draft
from eepass.cli.generate import generate
from eepass.cli.inspect import inspect
from eepass.cli.serve import serve
from eepass.cli.signals import stopping_cleanly
from eepass.cli.train import calibrate, train
from eepass.cli.transform import codegen, export_onnx, transform
from eepass.cli.verify import verify
from eepass.errors import RunsSlower


def doctor(
    model: Annotated[
        str | None, typer.Argument(help="A model: what texts of --length tokens come to with it.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Prompt and answer together, in tokens.", min=1)
    ] = None,
    quantize: options.Quantize = "keep",
    dtype: options.Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    clear_cache: Annotated[
        bool, typer.Option("--clear-cache", help="Remove all that eepass keeps between starts.")
    ] = False,
) -> None:
    """Report what is installed here, what eepass will use and why, and what is missing; or, with
    MODEL and --length, what texts of that length take, and what will be chosen for them."""
    from eepass import doctoring

    if (model is None) != (length is None):
        errors.print("error: MODEL and --length go together: give both, or neither")
        raise typer.Exit(2)
    if model is not None:
        _lengths(model=model, length=length, quantize=quantize, dtype=dtype, as_json=as_json)
        return
    if clear_cache:
        cleared = doctoring.clear_cache()
        text = "{path}: {freed_mb} MB freed".format(**cleared)
        sys.stdout.write((json.dumps(cleared, indent=1) if as_json else text) + "\n")
        return
    found = doctoring.doctor()
    text = json.dumps(found, indent=1) if as_json else doctoring.as_text(found)
    sys.stdout.write(text + "\n")
    if not found["ready"]:
        raise typer.Exit(1)


@command
def _lengths(model: str, length: int, quantize: str, dtype: str | None, as_json: bool) -> None:
    from eepass.lengths import usual_length
    from eepass.long.report import as_text, length_report

    loaded = load_model(model, dtype, 0, quantize=quantize)
    ready, config = loaded.model, options.exit_config("default")
    if not loaded.transformed:
        # bytes of a token do not depend on how many there are
        ready = transform_model(loaded, None, config, usual_length(loaded.model, 192), dense=True)
    found = length_report(ready.splits[1], length)
    sys.stdout.write((json.dumps(found, indent=1) if as_json else as_text(found)) + "\n")


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Speculative early exit for any decoder PyTorch can trace.",
)
for one in (
    probe, train, calibrate, transform, generate, chat, serve, bench, verify, inspect, codegen,
    export_onnx, export_draft, import_draft, doctor,
):  # fmt: skip
    app.command()(one)


def main() -> None:
    """Entry point of the ``eepass`` command."""
    # transformers imports torchao wherever it is installed; its warnings help nobody here
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.showwarning = _show_warning
    with stopping_cleanly():
        app()


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: Any = None, line: str | None = None,
) -> None:  # fmt: skip
    """Ours in a line, without the place in the code; others as Python shows them."""
    if issubclass(category, RunsSlower):
        errors.print(f"warning: {message}", highlight=False, markup=False, soft_wrap=True)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))
