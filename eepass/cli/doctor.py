"""``eepass doctor``: what is installed here and what eepass uses of it."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Report what is installed here, what eepass will use and why, and what is missing."""
    from eepass import doctoring

    found = doctoring.doctor()
    text = json.dumps(found, indent=1) if as_json else doctoring.as_text(found)
    sys.stdout.write(text + "\n")
    if not found["ready"]:
        raise typer.Exit(1)
