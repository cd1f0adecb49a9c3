"""What a token costs in ONNX Runtime by its exit layer: whether exits skip work there.

    python benchmarks/onnx_depth.py [--model smollm2] [--threads T] [--rounds N] [--json FILE]

The model is exported with an exit after every layer whose draft is the whole hot vocabulary, so
that a threshold alone decides where a token exits; predictors and verification run as in real use.
Depths are measured in turns, in one process; medians. Then the model's own artefact: along one
dense answer, without and with its exits, in turns again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

import eepass
from eepass.checkpoints.artifact import Artifact, Calibration, PresetPart, fingerprint
from eepass.onnx.runtime import OnnxDecoder
from eepass.training.exits import WIDTH

HOT = 32
PROMPT = "Why is the sea salty?"
LENGTH = 512


def every_layer(model: Any) -> Artifact:
    """An artefact with an exit after each layer; its predictors are not trained."""
    config = model.config.get_text_config(decoder=True)
    depth = config.num_hidden_layers
    tensors = {"hot.ids": torch.arange(5, 5 + HOT, dtype=torch.int32)}
    for layer in range(1, depth + 1):
        name = f"predictor.default.{layer}."
        tensors |= {name + "w1": torch.zeros(WIDTH, 3 * HOT), name + "b1": torch.zeros(WIDTH)}
        tensors |= {name + "w2": torch.zeros(WIDTH), name + "b2": torch.zeros(1)}
    layers = tuple(range(1, depth + 1))
    calibration = Calibration(0.98, dict.fromkeys(layers, 0.5), layers[:2], 1.0, depth, 1.0)
    return Artifact(fingerprint(model), {"default": PresetPart(1, HOT, (calibration,))}, tensors)


def by_depth(decoder: OnnxDecoder, ids: list[int], rounds: int) -> list[dict[str, float]]:
    """Milliseconds a token, forced to exit at each depth; None is dense: no predictor runs."""
    depth = decoder.metadata.layers
    depths = [n for n in (1, 5, 10, 15, 20, 25, depth) if n <= depth]
    decoder.prefill(ids)
    seconds: dict[int | None, list[float]] = {n: [] for n in (*depths, None)}
    for turn in range(rounds + 2):
        for layer, found in seconds.items():
            thresholds = decoder.dense()
            if layer is not None:
                thresholds[layer] = -1.0
            recent = np.full(decoder.metadata.window, layer or depth)
            began = perf_counter()
            step, _ = decoder.step(ids[-1], len(ids), recent, thresholds)
            took = perf_counter() - began
            if step.exit_layer != (layer or depth):
                raise SystemExit(f"exited at {step.exit_layer}, not at {layer}")
            # the first two warm up
            if turn > 1:
                found.append(took)
    dense = statistics.median(seconds[None])
    return [
        {
            "exit_layer": layer or 0,
            "ms": round(1e3 * statistics.median(found), 2),
            "of_dense": round(statistics.median(found) / dense, 3),
        }
        for layer, found in seconds.items()
    ]


def along_an_answer(decoder: OnnxDecoder, ids: list[int], tokens: int) -> dict[str, float]:
    """The dense answer's tokens one after the other, dense and with the artefact's exits."""
    answer = [s.token for s in decoder.stream(ids, tokens, decoder.dense(), stop=frozenset())]
    ways = {"dense": decoder.dense(), "exits": decoder.thresholds}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    layers, agree = [], 0
    recent = np.zeros(decoder.metadata.window, np.int64)
    recent[-1] = decoder.metadata.layers
    decoder.prefill(ids)
    for at, token in enumerate(answer[:-1]):
        for name, thresholds in ways.items():
            began = perf_counter()
            step, after = decoder.step(token, len(ids) + at, recent, thresholds)
            seconds[name].append(perf_counter() - began)
        # the run with exits comes last, so its keys and values stay
        recent = after
        layers.append(step.exit_layer)
        agree += step.token == answer[at + 1]
    middle = {name: statistics.fmean(found) for name, found in seconds.items()}
    return {
        "tokens": len(layers),
        "mean_exit_layer": round(statistics.fmean(layers), 2),
        "agreement": round(agree / len(layers), 4),
        "dense_ms": round(1e3 * middle["dense"], 2),
        "exits_ms": round(1e3 * middle["exits"], 2),
        "speed": round(middle["dense"] / middle["exits"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    loaded = eepass.load(options.model, "fp32")
    ids = loaded.encode(PROMPT)
    found: dict[str, Any] = {"model": options.model, "threads": options.threads, "dtype": "fp32"}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        eepass.export_onnx(loaded, folder / "every", every_layer(loaded.model), None, LENGTH)
        decoder = OnnxDecoder(folder / "every" / "decode.onnx", options.threads)
        found["forced"] = by_depth(decoder, ids, options.rounds)
        del decoder
        if loaded.artifact is not None:
            eepass.export_onnx(loaded, folder / "own", None, None, LENGTH)
            decoder = OnnxDecoder(folder / "own" / "decode.onnx", options.threads)
            found["own_artifact"] = along_an_answer(decoder, ids, options.tokens)
    print("exit layer   ms/token   of dense")
    for row in found["forced"]:
        print(f"{row['exit_layer'] or 'dense':>10} {row['ms']:>10} {row['of_dense']:>10}")
    print(found.get("own_artifact", ""))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
