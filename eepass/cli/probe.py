"""``eepass probe``: where a model's answers are known, and whether early exit will pay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eepass.cli.options import (
    Debug,
    Device,
    Dtype,
    Json,
    Model,
    Prompts,
    Raw,
    Threads,
    Trust,
)
from eepass.cli.running import load, run, write_json


def probe(
    model: Model,
    prompts: Prompts = None,
    limit: Annotated[int, typer.Option(help="At most so many prompts.", min=1)] = 16,
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    translate: Annotated[
        bool, typer.Option("--translate", help="Also fit translators, quickly.")
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="PNG or SVG of agreement by layer.")] = None,
    raw: Raw = False,
    json_file: Json = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = 0,
    trust_native: Trust = False,
    debug: Debug = False,
) -> None:
    """Say whether early exit will pay for MODEL: where answers are known, what that allows."""

    def work() -> None:
        from eepass import pictures
        from eepass.benchmark import probe as probing
        from eepass.cli.console import console, table
        from eepass.training.corpus import read_prompts
        from eepass.training.train import DEFAULT_PROMPTS

        texts = read_prompts(prompts or DEFAULT_PROMPTS, limit)
        loaded = load(model, dtype, device, threads, trust_native)
        with console.status("measuring agreement by layer"):
            report = probing.probe(loaded, texts, new_tokens, translate, raw)
        table(
            f"{model}: {report['tokens']} tokens of {report['prompts']} answers",
            ("layers run", "agreement"),
            [
                (str(n), f"{a:.3f}")
                for n, a in enumerate(report["agreement_by_layer"], 1)
                if n % 3 == 0 or n > report["layers"] - 6
            ],
        )
        console.print(
            f"LM head {report['lm_head_layers']:.2f} layers, draft {report['draft_layers']:.2f}; "
            f"bound {report['bound']:.2f}x, with hot verification {report['bound_hot']:.2f}x"
        )
        if "translated" in report:
            console.print("translated:", report["translated"]["agreement_by_layer"])
        console.print(report["verdict"], style="bold")
        pictures.agreement(report, picture or Path("eepass-probe.png"), model)
        console.print(f"picture: {picture or 'eepass-probe.png'}")
        write_json(json_file, report)

    run(work, debug)
