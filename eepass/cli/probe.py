"""``eepass probe``: from which layer on answers are known, and whether early exit will pay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from eepass.cli import options
from eepass.cli.command import command, load_model
from eepass.cli.console import console, table


@command
def probe(
    model: options.Model,
    prompts: options.Prompts = None,
    limit: Annotated[int, typer.Option(help="At most so many prompts.", min=1)] = 16,
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    translate: Annotated[
        bool, typer.Option("--translate", help="Also fit translators, quickly.")
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="PNG or SVG of agreement by layer.")] = None,
    raw: options.Raw = False,
    json_file: options.Json = None,
    dtype: options.Dtype = None,
    threads: options.Threads = 0,
    trust_native: options.Trust = False,
    debug: options.Debug = False,
) -> dict[str, Any]:
    """Report whether early exit will pay for MODEL: how early answers are known, what it allows."""
    from eepass import pictures
    from eepass.benchmark import probe as probing
    from eepass.training.corpus import read_prompts
    from eepass.training.train import DEFAULT_PROMPTS

    texts = read_prompts(prompts or DEFAULT_PROMPTS, limit)
    loaded = load_model(model, dtype, threads, trust_native)
    with console.status("measuring agreement by layer"):
        report = probing.probe(loaded, texts, new_tokens, translate, raw)
    show(report, model)
    picture = picture or Path("eepass-probe.png")
    pictures.agreement(report, picture, model)
    console.print(f"picture: {picture}")
    return report


def show(report: Mapping[str, Any], model: str) -> None:
    translated = report.get("translated", {}).get("agreement_by_layer", {})
    rows = []
    for layers, agreement in enumerate(report["agreement_by_layer"], 1):
        fitted = translated.get(str(layers))
        if fitted is not None or layers % 3 == 0 or layers > report["layers"] - 6:
            cells = [str(layers), f"{agreement:.3f}"]
            if translated:
                cells.append("" if fitted is None else f"{fitted:.3f}")
            rows.append(cells)
    table(
        f"{model}: {report['tokens']} tokens of {report['prompts']} answers",
        ("layers run", "agreement", *(["translated"] if translated else [])),
        rows,
    )
    console.print(
        f"LM head {report['lm_head_layers']:.2f} layers, draft {report['draft_layers']:.2f}; "
        f"bound {report['bound']:.2f}x, with hot verification {report['bound_hot']:.2f}x"
    )
    console.print(report["verdict"], style="bold")
