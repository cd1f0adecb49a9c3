"""``eepass generate``: answer one prompt."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from eepass.cli import options
from eepass.cli.command import command
from eepass.cli.console import LiveAnswer, console
from eepass.cli.models import load_model, transform_model
from eepass.cli.outcome import show_outcome
from eepass.onnx.files import is_onnx


@command
def generate(
    context: typer.Context,
    model: options.Model,
    prompt: Annotated[str, typer.Option(help="What to answer.")],
    artifact: options.ArtifactDir = None,
    quantize: options.Quantize = "keep",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    dense: Annotated[
        bool, typer.Option("--dense", help="Run every layer for every token.")
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Show where tokens exited, what was chosen and why.")
    ] = False,
    preset: options.Preset = "default",
    guarantee: options.Guarantee = "exact",
    speculate: options.Speculate = "cascade",
    exits: options.Exits = True,
    adaptive: Annotated[
        bool, typer.Option(help="Use each mechanism only where it is measured to pay.")
    ] = True,
    target_agreement: options.Target = 0.98,
    kv: Annotated[str, typer.Option(help="defer, propagate or drop.")] = "defer",
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens.", min=0)] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    min_p: Annotated[float, typer.Option(min=0, max=1)] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is none.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed samples the same.")] = None,
    dump: Annotated[Path | None, typer.Option(help="Write the graphs of each pass here.")] = None,
    raw: options.Raw = False,
    json_file: options.Json = None,
    dtype: options.Dtype = None,
    threads: options.Threads = 0,
    trust_native: options.Trust = False,
    debug: options.Debug = False,
) -> dict[str, Any]:
    """Answer one prompt, tokens coloured by exit layer; MODEL may be an ONNX file."""
    if is_onnx(model):
        from eepass.cli import onnx_model

        return onnx_model.generate(
            context, model, prompt, max_new_tokens, dense, stats, raw, threads
        )
    from eepass.lengths import refuse_longer
    from eepass.runtime.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    config = options.exit_config(
        preset, guarantee=guarantee, speculate=speculate, exits=exits, adaptive=adaptive,
        target_agreement=target_agreement, kv=kv,
    )  # fmt: skip
    loaded = load_model(model, dtype, threads, trust_native, quantize)
    ids = loaded.encode(prompt, raw)
    length = len(ids) + max_new_tokens
    if not loaded.transformed:
        refuse_longer(loaded.model, length, "prompt and answer together")
    ready = transform_model(loaded, artifact, config, length, dense, dump)
    engine = ready.dense if dense else ready.engine

    def decode(tokens: list[int]) -> str:
        return str(loaded.tokenizer.decode(tokens, skip_special_tokens=True))

    steps = []
    show = LiveAnswer(decode, ready.decoder.num_layers, model)
    with show if console.is_terminal else nullcontext():
        for step in engine.generate(ids, max_new_tokens, loaded.stop, sampling):
            steps.append(step)
            if console.is_terminal and step.token not in loaded.stop:
                show.add(*step)
    tokens = [step.token for step in steps]
    text = decode(tokens)
    if not console.is_terminal:
        sys.stdout.write(text + "\n")
    summary, decision = engine.statistics.summary(), engine.planner.decision()
    if stats:
        show_outcome(summary, decision)
    return {**summary, "text": text, "ids": tokens, "decision": decision}
