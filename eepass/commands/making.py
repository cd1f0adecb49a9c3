"""Commands that write something to run: artefacts, folders, ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
from eepass.commands.running import calibrated, load, run, write_json
from eepass.errors import InputError
from eepass.requests import numbers


def train(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the artefact; resumed if it has begun.")],
    prompts: Prompts = None,
    tokens: Annotated[int, typer.Option(help="Answer tokens to generate.", min=1000)] = 200_000,
    answers: Annotated[
        Path | None, typer.Option(help="The model's own answers as JSONL, instead of generating.")
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Further answers to each prompt, sampled.", min=0)
    ] = 0,
    temperature: Annotated[float, typer.Option(help="What they are sampled at.", min=0.1)] = 0.7,
    own_prompts: Annotated[
        int, typer.Option(help="Prompts the model writes itself, beside those given.", min=0)
    ] = 0,
    draft: Annotated[str, typer.Option(help="Draft head: eagle, or none.")] = "eagle",
    steps: Annotated[int, typer.Option(help="Drafts in a row the head is trained for.", min=1)] = 4,
    raw: Raw = False,
    max_length: Annotated[
        int, typer.Option(help="What is longer is cut here, in tokens.", min=64)
    ] = 512,
    json_file: Json = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = 0,
    debug: Debug = False,
) -> None:
    """Train translators, draft head, predictors and thresholds for MODEL, on its own answers."""

    def work() -> None:
        from eepass.console import console, progress_bars, table
        from eepass.training import door

        loaded = load(model, dtype, device, threads)
        with progress_bars() as bars:
            artifact = door.train(
                loaded, out, prompts, tokens, answers, raw, max_length, samples, temperature,
                _draft(draft), steps, own_prompts, progress=bars,
            )  # fmt: skip
        for name, part in artifact.presets.items():
            table(
                f"{name}: expected on held-out answers",
                ("target", "agreement", "exit layer", "speed-up (bytes)"),
                [
                    (f"{c.target}", f"{c.agreement:.4f}", f"{c.mean_exit_layer:.1f}",
                     f"{c.speedup:.2f}x")
                    for c in part.calibrations
                ],
            )  # fmt: skip
        console.print(f"artefact: {out}")
        write_json(json_file, dict(artifact.report))

    run(work, debug)


def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the artefact with new thresholds.")],
    artifact: ArtifactDir = None,
    quantize: Quantize = "keep",
    prompts: Prompts = None,
    tokens: Annotated[int, typer.Option(help="Answer tokens to look at.", min=200)] = 4000,
    raw: Raw = False,
    json_file: Json = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = 0,
    debug: Debug = False,
) -> None:
    """Find an artefact's thresholds anew for MODEL quantised; trains nothing, takes minutes."""

    def work() -> None:
        from eepass.console import console

        loaded = load(model, dtype, device, threads, quantize=quantize)
        made = calibrated(loaded, artifact, out, prompts, tokens, raw)
        console.print(f"artefact: {out}", highlight=False)
        write_json(json_file, dict(made.report))

    run(work, debug)


def transform(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write; a transformed one is replaced.")],
    artifact: ArtifactDir = None,
    quantize: Quantize = "keep",
    rows: Annotated[
        str, typer.Option(help="Row counts to compile for: 1, and how many tokens go in a pass.")
    ] = "1,4,8,16",
    max_length: MaxLength = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Leave the artefact out: no token leaves early.")
    ] = False,
    gpu: Annotated[
        list[str] | None, typer.Option(help="Also hold kernels for this GPU: sm_80 to sm_90.")
    ] = None,
    json_file: Json = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = 0,
    debug: Debug = False,
) -> None:
    """Write MODEL as a folder that runs at once: compiled, signed, without transformers."""

    def work() -> None:
        from eepass.console import console
        from eepass.offline import write_folder

        sizes = numbers(rows, "--rows")
        loaded = load(model, dtype, device, threads, quantize=quantize)
        folder = None if dense else artifact or loaded.artifact
        if not dense and loaded.before is not None and artifact is None:
            folder = calibrated(loaded, None)
        with console.status("transforming") as status:
            report = write_folder(loaded, out, folder, sizes, max_length, status.update, gpu or ())
        size = sum(report["compiled"].values()) / 1e6
        console.print(
            f"{len(report['compiled'])} libraries, {size:.1f} MB of code, in {report['seconds']} s"
        )
        console.print(f"transformed: {out}; eepass generate {out} --prompt ...", highlight=False)
        write_json(json_file, report)

    run(work, debug)


def export_onnx(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write; an exported one is replaced.")],
    artifact: ArtifactDir = None,
    preset: Preset = "default",
    target_agreement: Target = 0.98,
    kv: Annotated[
        str, typer.Option(help="Skipped layers' keys and values: propagate or drop.")
    ] = "propagate",
    max_length: MaxLength = None,
    json_file: Json = None,
    threads: Threads = 0,
    trust_native: Trust = False,
    debug: Debug = False,
) -> None:
    """Write MODEL and its exits as ONNX in fp32: decode.onnx, prefill.onnx, their weights once."""

    def work() -> None:
        from eepass import onnx_commands
        from eepass.console import console

        transformed = (Path(model) / "transformed.json").exists()
        loaded = load(model, None if transformed else "fp32", "cpu", threads, trust_native)
        with console.status("exporting") as status:
            report = onnx_commands.export(
                loaded, out, artifact, preset, target_agreement, kv, max_length, status.update
            )
        console.print(
            f"exported in {report['seconds']} s: eepass generate {out / 'decode.onnx'} "
            "--prompt ...",
            highlight=False,
        )
        write_json(json_file, report)

    run(work, debug)


def _draft(name: str) -> Any:
    if name not in ("eagle", "none"):
        raise InputError(f"--draft {name}: expected eagle or none")
    return name
