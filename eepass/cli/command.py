"""A function as a command: figures to ``--json``, mistakes in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import typer

from eepass.cli.console import errors
from eepass.errors import InputError


def command(function: Callable[..., Any]) -> Callable[..., None]:
    """Wrap ``function``, whose options may be ``json_file`` and ``debug``.

    What it returns is written to ``json_file``. What the person can correct is reported in one line
    with exit code 2, unless ``debug`` asks for the traceback.
    """

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            found = function(*arguments, **options)
            if found is not None:
                write_json(options.get("json_file"), found)
        except KeyboardInterrupt:
            errors.print("stopped: run the same command again to go on (training resumes)")
            raise typer.Exit(2) from None
        except (ValueError, OSError) as error:
            # InputError, EngineError and PassError are ValueErrors, as are refused options
            if options.get("debug"):
                raise
            errors.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
            raise typer.Exit(2) from None

    return run


def write_json(file: Path | None, value: Any) -> None:
    if file is None:
        return
    from eepass.files import write_text_atomically

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, json.dumps(value, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror})") from error
