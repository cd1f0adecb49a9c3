"""Early exit and speculation over quantised weights: speed and agreement by format, as JSON.

    python benchmarks/quantised.py [--json quantised.json] [--with-llama] [--threads T]

For each format the model is quantised, its thresholds are found anew, and dense decoding is
measured beside exact speculation and early exit over the same quantised model, question by
question (benchmarks/questions.jsonl), all systems of a format in turns. "gain" is dense time over
the system's; "kept" what of the gain at bf16 remains; "agreement" the share of tokens equal to that
same dense model's, along its answers. A quiet machine, two threads: about five minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import eepass
from eepass.benchmark.baselines import LlamaCpp
from eepass.benchmark.frontier import follow_pairs
from eepass.checkpoints.models import gguf_of
from eepass.config import ExitConfig
from eepass.training.corpus import read_prompts

FORMATS = {
    "bf16": None,
    "gguf (Q4_1, head Q8_0)": "keep",
    "int8": "int8",
    "int8-dynamic": "int8-dynamic",
    "int4": "int4",
}
# neither trained nor calibrated on
QUESTIONS = Path(__file__).parent / "questions.jsonl"
MAX_LENGTH = 384


def timed(engine: Any, ids: list[int], count: int) -> tuple[list[int], float]:
    """An answer and its milliseconds a token, the prompt apart."""
    answer: list[int] = []
    began = perf_counter()
    for step in engine.generate(ids, count, frozenset()):
        if not answer:
            began = perf_counter()
        answer.append(step.token)
    return answer, (perf_counter() - began) * 1e3 / (len(answer) - 1)


def measured(name: str, options: argparse.Namespace, llama: Any) -> dict[str, Any]:
    loaded = eepass.load("smollm2", quantize=FORMATS[name])
    artifact, seconds = loaded.artifact, 0.0
    if (trained := loaded.unquantized_artifact) is not None:
        began = perf_counter()
        artifact = eepass.calibrate(loaded, trained, tokens=options.calibration_tokens)
        seconds = perf_counter() - began
    exact = ExitConfig()
    left = exact.approximate(options.target)
    model = eepass.transform(loaded.model, artifact, exact, MAX_LENGTH)
    engines = {
        "dense": model.dense,
        "exact, speculating": model.configure(replace(exact, exits=False)),
        "approximate, leaving early": model.configure(left),
    }
    prompts = [loaded.encode(text) for text in read_prompts(QUESTIONS, options.prompts)]
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    beside: list[float] = []
    pairs = []
    same = 0
    for engine in engines.values():
        timed(engine, prompts[0], 32)
    for ids in prompts:
        said = {}
        for system, engine in engines.items():
            said[system], ms = timed(engine, ids, options.tokens)
            times[system].append(ms)
        if llama is not None:
            answer, spent = llama(ids)
            beside.append(spent * 1e3 / (len(answer) - 1))
        same += said["exact, speculating"] == said["dense"]
        pairs.append((ids, said["dense"]))
    engine = model.configure(left)
    followed = follow_pairs(model, {"left": engine}, pairs, lambda *_: None)["left"]
    dense = statistics.median(times["dense"])
    found: dict[str, Any] = {
        "weights": loaded.quantization or "bf16",
        "calibration_seconds": round(seconds, 1),
        "megabytes_a_pass": round(sum(eepass_bytes(model).values()) / 1e6, 1),
        "dense_ms": round(dense, 2),
        "exact_same_answers": f"{same} of {len(pairs)}",
        "agreement": round(followed["agreement"], 4),
        "exit_layer": round(followed["mean_exit_layer"], 2),
        "following_gain": round(followed["ratio_to_dense"], 3),
    }
    for system in list(engines)[1:]:
        pairs_of = zip(times["dense"], times[system], strict=True)
        found[system] = {
            "ms": round(statistics.median(times[system]), 2),
            "gain": round(statistics.median(a / b for a, b in pairs_of), 3),
        }
    if beside:
        pairs_of = zip(times["exact, speculating"], beside, strict=True)
        found["llama_cpp_ms"] = round(statistics.median(beside), 2)
        found["exact_of_llama_cpp"] = round(statistics.median(a / b for a, b in pairs_of), 3)
    return found


def eepass_bytes(model: Any) -> dict[str, int]:
    from eepass.inspecting import describe

    return dict(describe(model)["weights"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--target", type=float, default=0.98, help="agreement asked for")
    parser.add_argument("--calibration-tokens", type=int, default=2500)
    parser.add_argument("--with-llama", action="store_true", help="llama.cpp's Q4_1 in turns")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    llama = None
    if options.with_llama:
        other = LlamaCpp(gguf_of("smollm2"), torch.get_num_threads(), MAX_LENGTH)
        llama = other.timed(options.tokens, frozenset())
    table: dict[str, Any] = {}
    for name in options.formats:
        table[name] = found = measured(name, options, llama)
        for system in ("exact, speculating", "approximate, leaving early"):
            if "bf16" in table:
                gain = table["bf16"][system]["gain"] - 1
                # a system that gains nothing at bf16 has no gain to keep
                kept = (found[system]["gain"] - 1) / gain if gain > 0 else None
                found[system]["kept"] = None if kept is None else round(kept, 3)
        print(json.dumps({name: found}, indent=1), flush=True)
        gc.collect()
    if options.json is not None:
        options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
