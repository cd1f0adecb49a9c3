"""The command line: ``eepass probe | train | transform | generate | bench | inspect | …``."""

from __future__ import annotations

import logging

import typer

from eepass.commands import answering, looking, making

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Speculative early exit for any decoder PyTorch can trace.",
)
for command in (
    looking.probe, making.train, making.calibrate, making.transform, answering.generate,
    looking.bench, looking.inspect, looking.codegen, looking.families, making.export_onnx,
    looking.doctor,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Entry point of the ``eepass`` command."""
    # transformers imports torchao wherever it is installed, and that is said to nobody's use here
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    app()
