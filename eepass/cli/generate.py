"""``eepass generate``."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from eepass.cli.options import (
    ArtifactDir,
    Debug,
    Device,
    Dtype,
    Exits,
    Guarantee,
    Json,
    Model,
    Preset,
    Quantize,
    Raw,
    Speculate,
    Target,
    Threads,
    Trust,
)
from eepass.cli.requests import config_of
from eepass.cli.running import decoder_of, load, run, transformed, write_json
from eepass.onnx.files import is_onnx


def generate(
    context: typer.Context,
    model: Model,
    prompt: Annotated[str, typer.Option(help="What to answer.")],
    artifact: ArtifactDir = None,
    quantize: Quantize = "keep",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    dense: Annotated[
        bool, typer.Option("--dense", help="Run every layer for every token.")
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Show where tokens left, what was chosen and why.")
    ] = False,
    preset: Preset = "default",
    guarantee: Guarantee = "exact",
    speculate: Speculate = "cascade",
    exits: Exits = True,
    adaptive: Annotated[
        bool, typer.Option(help="Use each mechanism only where it is measured to pay.")
    ] = True,
    target_agreement: Target = 0.98,
    kv: Annotated[str, typer.Option(help="defer, propagate or drop.")] = "defer",
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens.", min=0)] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    min_p: Annotated[float, typer.Option(min=0, max=1)] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is none.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same.")] = None,
    dump: Annotated[Path | None, typer.Option(help="Write the graphs of each pass here.")] = None,
    raw: Raw = False,
    json_file: Json = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = 0,
    trust_native: Trust = False,
    debug: Debug = False,
) -> None:
    """Answer one prompt, each token tinted by the layer it left at; MODEL may be an ONNX file."""

    def work() -> None:
        if is_onnx(model):
            from eepass.cli import onnx_model

            answer = onnx_model.generate(
                context, model, prompt, max_new_tokens, dense, stats, raw, device, threads
            )
            return write_json(json_file, answer)
        from eepass.cli.console import LiveAnswer, console, table
        from eepass.lengths import refuse_longer
        from eepass.runtime.sampling import Sampling

        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        config = config_of(
            preset, guarantee=guarantee, speculate=speculate, exits=exits, adaptive=adaptive,
            target_agreement=target_agreement, kv=kv,
        )  # fmt: skip
        loaded = load(model, dtype, device, threads, trust_native, quantize)
        ids = loaded.encode(prompt, raw)
        length = len(ids) + max_new_tokens
        if not loaded.transformed:
            refuse_longer(loaded.model, length, "prompt and answer together")
        ready = transformed(loaded, None if dense else artifact, dense, config, length, dump)
        engine = ready.dense if dense else ready.engine
        steps = []
        show = LiveAnswer(decoder_of(loaded), ready.decoder.num_layers, model)
        with show if console.is_terminal else nullcontext():
            for step in engine.generate(ids, max_new_tokens, loaded.stop, sampling):
                steps.append(step)
                if console.is_terminal and step.token not in loaded.stop:
                    show.add(*step)
        text = loaded.tokenizer.decode([s.token for s in steps], skip_special_tokens=True)
        if not console.is_terminal:
            sys.stdout.write(text + "\n")
        summary = engine.statistics.summary()
        if stats:
            table(
                "where tokens left",
                ("layers run", "tokens"),
                [(str(n), str(c)) for n, c in enumerate(summary["exit_layers"]) if c],
            )
            console.print({k: v for k, v in summary.items() if k != "exit_layers"})
            console.print("chosen by measured cost and acceptance:", engine.planner.decision())
        found = {**summary, "text": text, "ids": [s.token for s in steps]}
        write_json(json_file, {**found, "decision": engine.planner.decision()})

    run(work, debug)
