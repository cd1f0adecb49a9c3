"""The command line: ``eepass probe | train | transform | generate | bench | inspect | …``."""

from __future__ import annotations

import logging

import typer

from eepass.cli.bench import bench
from eepass.cli.calibrate import calibrate
from eepass.cli.codegen import codegen
from eepass.cli.doctor import doctor
from eepass.cli.export_onnx import export_onnx
from eepass.cli.generate import generate
from eepass.cli.inspect import inspect
from eepass.cli.probe import probe
from eepass.cli.train import train
from eepass.cli.transform import transform

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Speculative early exit for any decoder PyTorch can trace.",
)
for command in (
    probe, train, calibrate, transform, generate, bench, inspect, codegen, export_onnx, doctor,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Entry point of the ``eepass`` command."""
    # transformers imports torchao wherever it is installed; its warnings help nobody here
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    app()
