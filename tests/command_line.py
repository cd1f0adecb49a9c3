"""The command line called from a test."""

import torch
from typer.testing import CliRunner

from eepass.cli.main import app


def run(*arguments, typed=None):
    """Exit code, output and errors of one command, which reads what is ``typed``."""
    torch.use_deterministic_algorithms(False)
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=typed)
    return result.exit_code, result.stdout, result.stderr


def refused(*arguments):
    """The one line a refused command says."""
    code, _, said = run(*arguments)
    assert code == 2, said
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.strip()]
    # progress bars may stand before it
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


def run_alone(arguments):
    """One command in a process that was made for it."""
    torch.set_num_threads(1)
    app([str(a) for a in arguments])
