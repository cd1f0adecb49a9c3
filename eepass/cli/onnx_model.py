"""What the command line does with ONNX; PyTorch is imported only to export."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import typer

from eepass.errors import InputError
from eepass.onnx.files import decode_file, describe

# options that apply to a graph that is exported already
ALWAYS = {"model", "debug", "json_file"}
GENERATE = {"prompt", "max_new_tokens", "dense", "stats", "raw", "threads"} | ALWAYS


def refuse_others(context: typer.Context, allowed: set[str]) -> None:
    """Raise ``InputError`` naming the first given option that an exported graph has fixed."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in allowed and source is not None and source.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-")
            raise InputError(
                f"{option}: decided when the graph was exported, or not in ONNX; leave it out, or "
                "give the original model"
            )


def generate(
    context: typer.Context, model: str, prompt: str, max_new_tokens: int, dense: bool, stats: bool,
    raw: bool, threads: int,
) -> dict[str, Any]:  # fmt: skip
    """Answer one prompt in ONNX Runtime; returns the answer and its exit layers."""
    from eepass.checkpoints.tokenizer import FolderTokenizer, encode
    from eepass.cli.console import LiveAnswer, console, table
    from eepass.onnx.runtime import OnnxDecoder

    refuse_others(context, GENERATE)
    file = decode_file(model)
    tokenizer = FolderTokenizer(file.parent)
    ids = encode(tokenizer, prompt, raw)
    with console.status(f"loading {file}"):
        decoder = OnnxDecoder(file, threads)
    found, ends = decoder.metadata, decoder.metadata.stop

    def text_of(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True)

    steps = []
    show = LiveAnswer(text_of, found.layers, model)
    thresholds = decoder.dense() if dense else None
    with show if console.is_terminal else nullcontext():
        for step in decoder.stream(ids, max_new_tokens, thresholds):
            steps.append(step)
            if console.is_terminal and step.token not in ends:
                show.add(*step)
    text = text_of([step.token for step in steps])
    if not console.is_terminal:
        sys.stdout.write(text + "\n")
    counts = Counter(step.exit_layer for step in steps)
    mean = sum(step.exit_layer for step in steps) / len(steps)
    if stats:
        rows = [(str(n), str(count)) for n, count in sorted(counts.items())]
        table("exit layers", ("layers run", "tokens"), rows)
        console.print(
            f"mean {mean:.1f} of {found.layers} layers; KV of skipped layers: {found.kv_policy}"
        )
    return {
        "text": text,
        "ids": [step.token for step in steps],
        "steps": [list(step) for step in steps],
        "mean_exit_layer": mean,
        "kv_policy": found.kv_policy,
        "guarantee": "dense" if dense else "approximate",
    }


def export(
    loaded: Any, out: Path, artifact: Path | None, preset: str, target: float, kv: str,
    max_length: int | None, notify: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Export to ONNX; returns the report."""
    from dataclasses import replace

    from eepass.cli.options import exit_config
    from eepass.onnx.export import export_onnx

    config = replace(exit_config(preset).approximate(target), kv=kv)
    return export_onnx(loaded, out, artifact, config, max_length, notify)


def inspect(context: typer.Context, model: str) -> dict[str, Any]:
    """Print what an exported graph holds; returns it."""
    from eepass.cli.console import console

    refuse_others(context, ALWAYS)
    path = Path(model)
    # the graph of the prompt can be inspected too
    file = path if path.suffix == ".onnx" and path.is_file() else decode_file(model)
    found = describe(file)
    for name, value in found.items():
        console.print(f"{name}: {value}", highlight=False)
    return found
