"""Seconds of a cold start by depth: isomorphic layers are compiled once.

    python benchmarks/cold_compile.py [--layers 4 16 64] [--hidden 256] [--json out.json]

``capture`` traces the model and finds its layers, ``compile`` is everything from there to the first
token, with compile caches that are empty each time. Only the first may grow with the layers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter

import torch
from torch._inductor.utils import fresh_cache
from transformers import LlamaConfig, LlamaForCausalLM

import eepass
from eepass.cli.console import table
from eepass.config import ExitConfig


def seconds(layers: int, hidden: int) -> dict[str, float]:
    """Capture and compile a random llama of ``layers`` layers."""
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=4 * hidden,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=1024,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    began = perf_counter()
    transformed = eepass.transform(model, max_length=64, config=ExitConfig(speculate="off"))
    captured = perf_counter()
    transformed.generate([[1, 2, 3]], max_new_tokens=2)
    return {"capture": captured - began, "compile": perf_counter() - captured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with fresh_cache():
        # the first compilation of a process also starts the compiler
        seconds(2, options.hidden)
    found = {}
    for layers in options.layers:
        with fresh_cache():
            found[layers] = seconds(layers, options.hidden)
    least = min(times["compile"] for times in found.values())
    rows = [
        (str(n), f"{t['capture']:.1f}", f"{t['compile']:.1f}", f"{t['compile'] / least:.2f}")
        for n, t in found.items()
    ]
    table("cold start", ["layers", "capture s", "compile s", "vs least"], rows)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
