"""Commands that measure and show: probe, bench, inspect, codegen, families, doctor."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from eepass.commands.options import (
    ArtifactDir,
    Debug,
    Device,
    Dtype,
    Json,
    MaxLength,
    Model,
    Preset,
    Prompts,
    Quantize,
    Raw,
    Target,
    Threads,
    Trust,
)
from eepass.commands.running import load, run, transformed, write_json
from eepass.errors import InputError
from eepass.onnx_files import is_onnx
from eepass.requests import config_of, other_systems


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
        from eepass import pictures, probing
        from eepass.console import console, table
        from eepass.training.corpus import read_prompts
        from eepass.training.door import DEFAULT_PROMPTS

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


def bench(
    model: Model,
    artifact: ArtifactDir = None,
    prompts: Prompts = None,
    limit: Annotated[int, typer.Option(help="At most so many prompts.", min=1)] = 16,
    new_tokens: Annotated[int, typer.Option(min=4)] = 128,
    preset: Preset = "default",
    target_agreement: Target = 0.98,
    frontier: Annotated[bool, typer.Option(help="Measure agreement against speed.")] = True,
    baselines: Annotated[bool, typer.Option(help="Measure Hugging Face as well.")] = True,
    beside: Annotated[
        list[str] | None, typer.Option("--with", help="Another system: llama.cpp.")
    ] = None,
    max_length: MaxLength = None,
    raw: Raw = False,
    json_file: Json = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = 0,
    trust_native: Trust = False,
    debug: Debug = False,
) -> None:
    """Measure speculation and early exit beside dense, compiled and eager, with their quality."""

    def work() -> None:
        from eepass import benchmarking
        from eepass.console import progress_bars, show_bench
        from eepass.lengths import usual_length
        from eepass.training.corpus import read_prompts
        from eepass.training.door import DEFAULT_PROMPTS

        texts = read_prompts(prompts or DEFAULT_PROMPTS, limit)
        config = config_of(preset, target_agreement=target_agreement)
        loaded = load(model, dtype, device, threads, trust_native)
        length = max_length
        if length is None and not loaded.transformed:
            length = usual_length(loaded.model, benchmarking.MAX_LENGTH)
        ready = transformed(loaded, artifact, False, config, length)
        others = other_systems(beside or [], model, threads, ready.decoder.longest)
        with progress_bars() as bars:
            result = benchmarking.bench(
                loaded, ready, texts, new_tokens, config, raw, frontier, baselines, others,
                bars.notify,
            )  # fmt: skip
        show_bench(result)
        write_json(json_file, result)

    run(work, debug)


def inspect(
    context: typer.Context,
    model: Model,
    artifact: ArtifactDir = None,
    quantize: Quantize = "keep",
    picture: Annotated[Path | None, typer.Option(help="SVG or PNG of the exit graph.")] = None,
    code: Annotated[bool, typer.Option("--code", help="Print the exit graph as code.")] = False,
    preset: Preset = "default",
    target_agreement: Target = 0.98,
    dump: Annotated[Path | None, typer.Option(help="Write the graphs of each pass here.")] = None,
    json_file: Json = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = 0,
    trust_native: Trust = False,
    debug: Debug = False,
) -> None:
    """Show layers, segments, exits and the exit graph of MODEL, or of an ONNX file."""

    def work() -> None:
        if is_onnx(model):
            from eepass import onnx_commands

            return write_json(json_file, onnx_commands.inspect(context, model))
        from eepass import inspecting, pictures
        from eepass.console import console
        from eepass.lengths import usual_length

        config = config_of(preset).approximate(target_agreement)
        loaded = load(model, dtype, device, threads, trust_native, quantize)
        length = None if loaded.transformed else usual_length(loaded.model, 192)
        ready = transformed(loaded, artifact, False, config, length, dump, exits_optional=True)
        found = inspecting.describe(ready)
        for name, value in found.items():
            if name == "exits":
                console.print(f"exits: {[e['layer'] for e in value]}")
            else:
                console.print(f"{name}: {value}", highlight=False)
        if picture is not None:
            pictures.exit_graph(ready.splits[1], ready.plan, picture, model)
            console.print(f"picture: {picture}")
        if code:
            sys.stdout.write(inspecting.code_of(ready) + "\n")
        write_json(json_file, found)

    run(work, debug)


def codegen(
    model: Model,
    target: Annotated[str, typer.Option(help="sm_80, sm_86, sm_89 or sm_90.")] = "sm_90",
    artifact: ArtifactDir = None,
    rows: Annotated[int, typer.Option(help="Rows in a pass, 1 to 32.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for the compiled kernels.")] = None,
    json_file: Json = None,
    dtype: Dtype = "bf16",
    debug: Debug = False,
) -> None:
    """Generate MODEL's GPU kernels and compile them; needs no GPU."""

    def work() -> None:
        from eepass import ahead_of_time
        from eepass.console import console, table

        ahead_of_time.capability_of(target)
        loaded = load(model, dtype, "cpu", 0)
        with console.status(f"compiling for {target}"):
            found = ahead_of_time.compile_kernels(
                loaded.model, artifact or loaded.artifact, target, rows, out
            )
        table(
            f"{model} on {target}, {rows} rows: predicted, not measured",
            ("kernel", "registers", "spills", "shared", "bytes", "µs"),
            [(name, *(str(value) for value in k.values())) for name, k in found["kernels"].items()],
        )
        write_json(json_file, found)

    run(work, debug)


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

    def work() -> None:
        from eepass.families_report import report

        failed = report(only or [], compiler, docs, json_file, threads, write_json)
        if failed:
            raise InputError(f"not as expected: {', '.join(failed)}")

    run(work, debug)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Say it as JSON.")] = False,
) -> None:
    """Say what is installed here, what eepass will use of it and why, and what is missing."""
    from eepass import doctoring

    found = doctoring.doctor()
    text = json.dumps(found, indent=1) if as_json else doctoring.as_text(found)
    sys.stdout.write(text + "\n")
    if not found["ready"]:
        raise typer.Exit(1)
