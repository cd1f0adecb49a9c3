"""``eepass bench``: speculation and early exit beside dense, compiled and eager."""

from __future__ import annotations

from typing import Annotated

import typer

from eepass.cli.options import (
    ArtifactDir,
    Debug,
    Device,
    Dtype,
    Json,
    MaxLength,
    Model,
    Preset,
    Prompts,
    Raw,
    Target,
    Threads,
    Trust,
)
from eepass.cli.requests import config_of, other_systems
from eepass.cli.running import load, run, transformed, write_json


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
        from eepass.benchmark import bench as benchmarking
        from eepass.cli.console import progress_bars, show_bench
        from eepass.lengths import usual_length
        from eepass.training.corpus import read_prompts
        from eepass.training.train import DEFAULT_PROMPTS

        texts = read_prompts(prompts or DEFAULT_PROMPTS, limit)
        config = config_of(preset, target_agreement=target_agreement)
        loaded = load(model, dtype, device, threads, trust_native)
        length = max_length
        if length is None and not loaded.transformed:
            length = usual_length(loaded.model, benchmarking.MAX_LENGTH)
        ready = transformed(loaded, artifact, False, config, length)
        others = other_systems(beside or [], model, threads, ready.decoder.max_sequence_length)
        with progress_bars() as bars:
            result = benchmarking.bench(
                loaded, ready, texts, new_tokens, config, raw, frontier, baselines, others,
                bars.notify,
            )  # fmt: skip
        show_bench(result)
        write_json(json_file, result)

    run(work, debug)
