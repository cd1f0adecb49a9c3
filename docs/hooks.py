"""What mkdocs calls while it builds: the command line's page is written from the commands."""

from __future__ import annotations

from typing import Any

import typer.main
from mkdocs.structure.files import File
from typer.cli import get_docs_for_click

from eepass.cli.main import app


def on_files(files: Any, config: Any) -> Any:
    """Add ``cli.md``."""
    files.append(File.generated(config, "cli.md", content=command_line()))
    return files


def command_line() -> str:
    """Every command with its arguments and options, as Markdown."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="eepass")
    return get_docs_for_click(obj=command, ctx=context, name="eepass", title="Command line")
