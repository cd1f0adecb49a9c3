"""``eepass generate``: answer one prompt; in ONNX Runtime without PyTorch."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from eepass.cli import options
from eepass.cli.command import command, load_model, refuse_fixed_options, transform_model
from eepass.cli.console import LiveAnswer, console, show_outcome, table
from eepass.onnx.files import decode_file, is_onnx


@command
def generate(
    context: typer.Context,
    model: options.Model,
    prompt: Annotated[str, typer.Option(help="What to answer.")],
    artifact: options.ArtifactDir = None,
    drafts_alone: options.DraftsAlone = False,
    quantize: options.Quantize = "keep",
    activations: options.Activations = "int8",
    max_new_tokens: options.NewTokens = 128,
    dense: options.Dense = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Show where tokens exited, what was chosen and why.")
    ] = False,
    preset: options.Preset = "default",
    guarantee: options.Guarantee = "exact",
    speculate: options.Speculate = "cascade",
    exits: options.Exits = True,
    adaptive: options.Adaptive = True,
    target_agreement: options.Target = 0.98,
    kv: options.Kv = "defer",
    attends: options.Attends = "full",
    context_tokens: options.ContextTokens = 1024,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
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
        refuse_fixed_options(
            context, "prompt", "max_new_tokens", "dense", "stats", "raw", "threads"
        )
        return _generate_onnx(model, prompt, max_new_tokens, dense, stats, raw, threads)
    from eepass.lengths import refuse_longer, shared_length
    from eepass.runtime.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    config = options.exit_config(
        preset, guarantee=guarantee, speculate=speculate, exits=exits, adaptive=adaptive,
        target_agreement=target_agreement, kv=kv, context=attends, context_tokens=context_tokens,
    )  # fmt: skip
    loaded = load_model(model, dtype, threads, trust_native, quantize, activations)
    ids = loaded.encode(prompt, raw)
    length = len(ids) + max_new_tokens
    if not loaded.transformed:
        refuse_longer(loaded.model, length, "prompt and answer together")
        length = shared_length(loaded.model, length)
    ready = transform_model(
        loaded, artifact, config, length, dense, dump, drafts_alone=drafts_alone
    )
    engine = ready.dense if dense else ready.engine
    steps = engine.generate(ids, max_new_tokens, loaded.stop, sampling)
    tokens, _, text = _show(steps, loaded.tokenizer, ready.decoder.num_layers, loaded.stop, model)
    summary, decision = engine.statistics.summary(), engine.planner.decision()
    if stats:
        show_outcome(summary, decision)
    return {**summary, "text": text, "ids": tokens, "decision": decision}


def _show(
    steps: Iterator[Any], tokenizer: Any, depth: int, stop: Collection[int], title: str
) -> tuple[list[int], list[int], str]:
    """Print an answer: live in a terminal, else when it is whole.

    Returns its tokens, their exit layers and its text.
    """
    decode: Callable[..., str] = partial(tokenizer.decode, skip_special_tokens=True)
    tokens, layers = [], []
    live = LiveAnswer(decode, depth, title) if console.is_terminal else None
    with live or nullcontext():
        for token, layer in steps:
            tokens.append(token)
            layers.append(layer)
            if live and token not in stop:
                live.add(token, layer)
    text = decode(tokens)
    if not live:
        sys.stdout.write(text + "\n")
    return tokens, layers, text


def _generate_onnx(
    model: str, prompt: str, max_new_tokens: int, dense: bool, stats: bool, raw: bool, threads: int
) -> dict[str, Any]:
    from eepass.checkpoints.tokenizer import FolderTokenizer, encode
    from eepass.onnx.runtime import OnnxDecoder

    file = decode_file(model)
    tokenizer = FolderTokenizer(file.parent)
    ids = encode(tokenizer, prompt, raw)
    with console.status(f"loading {file}"):
        decoder = OnnxDecoder(file, threads)
    found = decoder.metadata
    steps = decoder.stream(ids, max_new_tokens, decoder.dense() if dense else None)
    tokens, layers, text = _show(steps, tokenizer, found.layers, found.stop, model)
    mean = sum(layers) / len(layers)
    if stats:
        rows = [(str(n), str(count)) for n, count in sorted(Counter(layers).items())]
        table("exit layers", ("layers run", "tokens"), rows)
        console.print(
            f"mean {mean:.1f} of {found.layers} layers; KV of skipped layers: {found.kv_policy}"
        )
    return {
        "text": text,
        "ids": tokens,
        "steps": [list(step) for step in zip(tokens, layers, strict=True)],
        "mean_exit_layer": mean,
        "kv_policy": found.kv_policy,
        "guarantee": "dense" if dense else "approximate",
    }
