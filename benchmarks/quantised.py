"""Early exit and speculation over quantised weights: speed and agreement by format, as JSON.

    python benchmarks/quantised.py [--json quantised.json] [--with-llama] [--threads T]

For each format the model is quantised, its thresholds are calibrated, and dense decoding is
measured beside exact speculation and early exit over the same quantised model, question by
question (benchmarks/questions.jsonl), all systems of a format in turns. "gain" is the speed-up over
dense, null where blocks disagree too much (its spread stands beside it); "kept" the share of the
gain at bf16 that remains; "agreement" the share of tokens equal to that same dense model's, along
its answers. A quiet machine, two threads: about five minutes.
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
from eepass.benchmark.turns import Answer, EngineStream, Stream, decode_in_turns, speed_up
from eepass.checkpoints.models import gguf_of
from eepass.config import ExitConfig
from eepass.inspecting import describe
from eepass.training.corpus import read_prompts

FORMATS = {
    "bf16": None,
    "gguf (Q4_1, head Q8_0)": "keep",
    "int8": "int8",
    "int8-dynamic": "int8-dynamic",
    "int4": "int4",
}
# used neither in training nor in calibration
QUESTIONS = Path(__file__).parent / "questions.jsonl"
MAX_LENGTH = 384


def measured(name: str, options: argparse.Namespace, llama: LlamaCpp | None) -> dict[str, Any]:
    loaded = eepass.load("smollm2", quantize=FORMATS[name])
    artifact, seconds = loaded.artifact, 0.0
    if (trained := loaded.unquantized_artifact) is not None:
        began = perf_counter()
        artifact = eepass.calibrate(loaded, trained, tokens=options.calibration_tokens)
        seconds = perf_counter() - began
    exact = ExitConfig(remember=False)
    early = exact.approximate(options.target)
    model = eepass.transform(loaded.model, artifact, exact, MAX_LENGTH)
    engines = {
        "dense": model.dense,
        "exact, speculating": model.configure(replace(exact, exits=False)),
        "approximate, leaving early": model.configure(early),
    }
    prompts = [loaded.encode(text) for text in read_prompts(QUESTIONS, options.prompts)]
    for engine in engines.values():
        list(engine.generate(prompts[0], 32))
    answers: dict[str, list[Answer]] = {}
    for done, ids in enumerate(prompts):
        streams: dict[str, Stream] = {
            system: EngineStream.generate(engine, ids, options.tokens, frozenset())
            for system, engine in engines.items()
        }
        if llama is not None:
            tokens = llama.tokens(ids, options.tokens, frozenset())
            streams["llama.cpp"] = Stream([token] for token in tokens)
        for system, answer in decode_in_turns(streams, done).items():
            answers.setdefault(system, []).append(answer)
    dense = [answer.tokens for answer in answers["dense"]]
    same = sum(a.tokens == b for a, b in zip(answers["exact, speculating"], dense, strict=True))
    pairs = list(zip(prompts, dense, strict=True))
    engine = model.configure(early)
    followed = follow_pairs(model, {"early": engine}, pairs, lambda *_: None)["early"]
    found: dict[str, Any] = {
        "weights": loaded.quantization or "bf16",
        "calibration_seconds": round(seconds, 1),
        "megabytes_a_pass": round(sum(describe(model)["weights"].values()) / 1e6, 1),
        "dense_ms": milliseconds(answers["dense"]),
        "exact_same_answers": f"{same} of {len(pairs)}",
        "agreement": round(followed["agreement"], 4),
        "exit_layer": round(followed["mean_exit_layer"], 2),
        "following_gain": followed["ratio_to_dense"],
        "following_gain_spread": followed["ratio_to_dense_spread"],
    }
    for system in list(engines)[1:]:
        gain = speed_up(answers["dense"], answers[system])
        found[system] = {"ms": milliseconds(answers[system]), **gain.to_json("gain")}
    if llama is not None:
        found["llama_cpp_ms"] = milliseconds(answers["llama.cpp"])
        ratio = speed_up(answers["exact, speculating"], answers["llama.cpp"])
        found |= ratio.to_json("exact_of_llama_cpp")
    return found


def milliseconds(answers: list[Answer]) -> float:
    """Median by prompt of the milliseconds a token."""
    return round(1e3 * statistics.median(answer.seconds_per_token for answer in answers), 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--target", type=float, default=0.98, help="agreement to keep")
    parser.add_argument("--calibration-tokens", type=int, default=2500)
    parser.add_argument("--with-llama", action="store_true", help="llama.cpp's Q4_1 in turns")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    llama = None
    if options.with_llama:
        llama = LlamaCpp(gguf_of("smollm2"), torch.get_num_threads(), MAX_LENGTH)
    table: dict[str, Any] = {}
    for name in options.formats:
        table[name] = found = measured(name, options, llama)
        for system in ("exact, speculating", "approximate, leaving early"):
            if "bf16" in table:
                before, gain = table["bf16"][system]["gain"], found[system]["gain"]
                # a system that gains nothing at bf16, or nothing measurable, has no gain to keep
                known = before is not None and before > 1 and gain is not None
                found[system]["kept"] = round((gain - 1) / (before - 1), 3) if known else None
        print(json.dumps({name: found}, indent=1), flush=True)
        gc.collect()
    if options.json is not None:
        options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
