"""The table of families: on the screen, as JSON and for the docs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast, get_args

import torch

from eepass.cli.console import progress_bars, table
from eepass.errors import InputError
from families.check import TOLERANCE, Compiler, Outcome, check_families

COLUMNS = ("family", "status", "layers", "max error", "reason")


def report(
    only: Sequence[str],
    compiler: str,
    docs: Path | None,
    json_file: Path | None,
    threads: int,
    write_json: Callable[[Path | None, Any], None],
) -> list[str]:
    """Check families, show the table, write the files; returns the names of those that failed.

    Raises ``InputError`` for an unknown family or compiler.
    """
    if compiler not in get_args(Compiler):
        raise InputError(f"--compiler {compiler}: expected one of {', '.join(get_args(Compiler))}")
    if threads:
        torch.set_num_threads(threads)
    from transformers.utils import logging

    # warnings about random configurations mean nothing to the reader
    logging.set_verbosity_error()
    chosen = cast(Compiler, compiler)
    with progress_bars() as bars:
        outcomes = check_families(only, chosen, bars.notify)
    table(f"decoder families, {compiler}", COLUMNS, table_rows(outcomes))
    write_json(json_file, to_json(outcomes, chosen))
    if docs is not None:
        write_markdown(docs, outcomes, chosen)
    return [name for name, outcome in outcomes.items() if outcome.status == "failed"]


def to_json(outcomes: Mapping[str, Outcome], compiler: Compiler) -> dict[str, Any]:
    return {
        "compiler": compiler,
        "torch": torch.__version__.split("+")[0],
        "transformers": version("transformers"),
        "tolerance": TOLERANCE,
        "families": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }


def table_rows(outcomes: Mapping[str, Outcome]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            outcome.status,
            str(outcome.layers or ""),
            "" if outcome.max_error is None else f"{outcome.max_error:.1e}",
            outcome.reason,
        )
        for name, outcome in outcomes.items()
    ]


def write_markdown(file: Path, outcomes: Mapping[str, Outcome], compiler: Compiler) -> None:
    """The table for the docs."""
    counts = {s: sum(o.status == s for o in outcomes.values()) for s in ("ok", "refused", "failed")}
    lines = [
        "# Decoder families",
        "",
        f"Written by `python tests/families/run.py --compiler {compiler} --docs FILE` (torch "
        f"{torch.__version__.split('+')[0]}, transformers {version('transformers')}): "
        + ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        + ".",
        "",
        "Each family is a small random model of transformers' own class, in fp32. *ok*: the layers "
        "found are those of the configuration; dense logits, keys, values and recurrent states "
        "equal the eager model's; a token forced to exit after each layer has the logits of the "
        "eager model whose list of layers is cut there, and the cache is whole once later tokens "
        "have caught it up (KV policy `defer`); greedy decoding equals the eager model's. *max "
        f"error*: the largest difference seen, at most {TOLERANCE:.0e} to be ok. `graph` runs the "
        "segments as they were traced, one row at a time; `make families` compiles them for "
        "several row counts (`inductor`).",
        "",
        "Recurrent states cannot be rolled back: with them rows go one by one, nothing is drafted, "
        "`exact` decodes dense, and one sequence is served at a time. Where a model makes biases "
        "or masks of slot numbers (bloom, mpt, gpt_neo) nothing is drafted either.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in table_rows(outcomes)]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror})") from error
