"""The table of decoder families: which can be transformed, each shown on a small random model.

python tests/families/run.py [FAMILY ...] --json FILE --docs FILE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

# run as a script, this folder is on the path and the one above it is not
sys.path.insert(0, str(Path(__file__).parents[1]))

from eepass.cli.command import command, write_json
from eepass.cli.options import Debug, Json, Threads
from eepass.errors import InputError
from families.report import report

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@command
def families(
    only: Annotated[
        list[str] | None, typer.Argument(help="Families to check; all if none.")
    ] = None,
    compiler: Annotated[
        str, typer.Option(help="graph: run what was traced as it is; inductor: compile it.")
    ] = "graph",
    docs: Annotated[
        Path | None, typer.Option(help="Also write the table here, as Markdown.")
    ] = None,
    json_file: Json = None,
    threads: Threads = 0,
    debug: Debug = False,
) -> None:
    """Show which decoder families can be transformed, each on a small random model."""
    failed = report(only or [], compiler, docs, json_file, threads, write_json)
    if failed:
        raise InputError(f"not as expected: {', '.join(failed)}")


if __name__ == "__main__":
    app()
