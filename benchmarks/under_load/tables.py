"""A load test's report in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.under_load.figures import PERCENTILES
from benchmarks.under_load.systems import DENSE, EXACT, LLAMA, ONE
from eepass.cli.console import console, table

# by kind of load: what its column is called
KINDS = {"clients": "clients", "rates": "arriving"}


def show(report: Mapping[str, Any]) -> None:
    """Rates and latencies by load and system; the JSON report has the spread and more."""
    for kind, column in KINDS.items():
        if report[kind]:
            title = f"{report['model']}, {report['threads']} threads"
            show_rates(title, column, report[kind])
            show_latencies(column, report[kind])
    for line in remarks(report):
        console.print(line, highlight=False, markup=False)


def show_rates(title: str, column: str, loads: Mapping[str, Any]) -> None:
    table(
        f"{title}: rates, and tokens/s over those of others",
        (column, "system", "tokens/s", "req/s", "/one", "/dense", "/llama", "MB"),
        [
            (
                load, short(name), number(found["tokens_per_s"]), number(found["requests_per_s"]),
                *(over(found, reference) for reference in (ONE, DENSE, LLAMA)),
                str(found["peak_mb"]),
            )
            for load, name, found in rows(loads)
        ],
    )  # fmt: skip


def show_latencies(column: str, loads: Mapping[str, Any]) -> None:
    percents = [f"{percent} %" for percent in PERCENTILES]
    table(
        "milliseconds to the first text, and for each token after it, by percentile",
        (column, "system", *percents, *percents),
        [
            (
                load, short(name),
                *map(number, found["first_token_ms"].values()),
                *map(number, found["ms_per_token"].values()),
            )
            for load, name, found in rows(loads)
        ],
    )  # fmt: skip


def rows(loads: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Load, system and figures; the load is named in its first row."""
    for load, systems in loads.items():
        shown = load
        for name, found in systems.items():
            yield shown, name, found
            shown = ""


def remarks(report: Mapping[str, Any]) -> Iterator[str]:
    """What a reader of the tables must know besides."""
    for kind in KINDS:
        for load, systems in report[kind].items():
            for name, found in systems.items():
                if found["failed"]:
                    yield (
                        f"{load}, {name}: {found['failed']} of {found['requests']} requests failed "
                        f"({found['failure']})"
                    )
                same = found.get("same_answers")
                if same and same["same"] < same["of"]:
                    yield (
                        f"{load}, {name}: {same['of'] - same['same']} of {same['of']} answers are "
                        f"not those of {EXACT[-1]}"
                    )


def short(name: str) -> str:
    return name.removeprefix("eepass ")


def over(found: Mapping[str, Any], reference: str) -> str:
    return number(found["over"].get(reference, {}).get("tokens_per_s"), 2)


def number(value: float | None, digits: int | None = None) -> str:
    """To the digits that a reader can use; a dash where there is none."""
    if value is None:
        return "–"
    if digits is None:
        digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}"
