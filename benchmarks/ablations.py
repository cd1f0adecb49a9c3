"""SpecEE's three techniques, each off, as published, and as it is here.

    python benchmarks/ablations.py MODEL [--quantize keep] [--artifact DIR] --prompts FILE \\
        [--limit 8] [--target 0.94] [--json FILE]

T1 is the predictor that reads a few draft tokens' rows of the LM head, T2 the choice of the exits
at which it runs, T3 exits in passes that verify draft tokens. Exits of one token a pass are
measured along the dense answers (teacher forcing), passes with draft tokens on their own answers,
all in turns with dense decoding; a speed-up is the median over blocks, and its middle half.

``paper`` is the preset of that name: drafts of a one-layer head, the threshold 0.5 everywhere, the
whole LM head to verify. ``here`` chooses its thresholds for ``--target``, by a bound on the
agreement on other kinds of text; ``all exits`` runs the predictors of all exits, at 0.5. ``tree``
verifies draft tokens where the planner expects that to pay, ``always`` a tree of the draft head in
every pass.

Columns: speed-up, agreement with the dense argmax, layers run and predictors run for a token,
tokens a pass.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # a checkout need not be installed
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

import eepass  # noqa: E402
from eepass.benchmark.frontier import Pairs, follow_pairs, score  # noqa: E402
from eepass.benchmark.turns import Answer, EngineStream, decode_in_turns, speed_up  # noqa: E402
from eepass.cli.console import speed_up as shown  # noqa: E402
from eepass.cli.console import table  # noqa: E402
from eepass.config import ExitConfig  # noqa: E402
from eepass.errors import InputError  # noqa: E402
from eepass.lengths import usual_length  # noqa: E402
from eepass.model import EarlyExitModel  # noqa: E402
from eepass.runtime.engine.engine import Engine  # noqa: E402
from eepass.runtime.statistics import Statistics  # noqa: E402
from eepass.training.corpus import read_prompts  # noqa: E402

NEW_TOKENS, MAX_PROMPT = 128, 320
SHOWN = (
    "ratio_to_dense", "ratio_to_dense_spread", "agreement", "mean_exit_layer", "active_predictors",
    "accepted_per_pass",
)  # fmt: skip


def one_token_a_pass(target: float) -> dict[str, ExitConfig]:
    """T1 and T2: early exit as ``Engine.follow`` measures it, by name."""
    published = ExitConfig.preset("paper")
    here = ExitConfig().approximate(target)
    return {
        "paper": published,
        "paper, T2 off": replace(published, schedule=False),
        "here": here,
        "here, T2 off": replace(here, schedule=False),
        "here, all exits": replace(here, schedule=False, threshold=0.5),
    }


def draft_tokens_in_a_pass(target: float) -> dict[str, ExitConfig]:
    """T3: exits in passes over a tree of draft tokens, by name."""
    always = ExitConfig(
        guarantee="approximate", speculate="eagle", adaptive=False, remember=False, threshold=0.5
    )
    here = ExitConfig(guarantee="approximate", remember=False, target_agreement=target)
    return {
        "tree, T3 off": replace(here, exits=False),
        "tree, T3 here": here,
        "always, T3 off": replace(always, exits=False),
        "always, T3 paper": always,
    }


def dense_answers(model: EarlyExitModel, prompts: Sequence[list[int]]) -> Pairs:
    """Each prompt that fits, and its dense answer."""
    fitting = [p for p in prompts if len(p) + NEW_TOKENS <= model.decoder.max_sequence_length]
    engine = model.host_engine()
    pairs = [
        (ids, [step.token for step in engine.generate(ids, NEW_TOKENS, model.stop)])
        for ids in fitting
    ]
    if not (pairs := [(ids, answer) for ids, answer in pairs if len(answer) > 2]):
        raise InputError("no prompt fits, or every answer is one token: nothing to measure")
    return pairs


def free_running(
    model: EarlyExitModel, engines: Mapping[str, Engine], pairs: Pairs
) -> dict[str, dict[str, Any]]:
    """Dense and ``engines`` answer the prompts, all in turns."""
    everything = {"dense": model.host_engine(), **engines}
    answers: dict[str, list[Answer]] = {name: [] for name in everything}

    def stream_of(engine: Engine, ids: list[int]) -> EngineStream:
        return EngineStream.generate(engine, ids, NEW_TOKENS, model.stop)

    for engine in everything.values():
        list(stream_of(engine, pairs[0][0]).passes)  # compiles what is missing
        engine.statistics = Statistics(model.decoder.num_layers)
    for done, (ids, _) in enumerate(pairs):
        streams = {name: stream_of(engine, ids) for name, engine in everything.items()}
        for name, answer in decode_in_turns(streams, done).items():
            answers[name].append(answer)
    return {
        name: engine.statistics.summary()
        | score(model, pairs, [answer.tokens for answer in answers[name]])
        | speed_up(answers["dense"], answers[name]).to_json("ratio_to_dense")
        for name, engine in engines.items()
    }


def measure(model: EarlyExitModel, pairs: Pairs, target: float) -> dict[str, dict[str, Any]]:
    """The figures ``SHOWN`` of every way, by name."""
    one, many = one_token_a_pass(target), draft_tokens_in_a_pass(target)

    def engines(ways: Mapping[str, ExitConfig]) -> dict[str, Engine]:
        return {name: model.host_engine(config) for name, config in ways.items()}

    found = follow_pairs(model, engines(one), pairs, lambda stage, done, total: None)
    found |= free_running(model, engines(many), pairs)
    return {name: {field: own[field] for field in SHOWN} for name, own in found.items()}


def show(title: str, ways: Mapping[str, Mapping[str, Any]]) -> None:
    """A row for each way."""
    rows = [
        (
            name,
            shown(own["ratio_to_dense"], own["ratio_to_dense_spread"]),
            f"{own['agreement']:.3f}",
            f"{own['mean_exit_layer']:.1f}",
            f"{own['active_predictors']:.1f}",
            f"{own['accepted_per_pass']:.2f}",
        )
        for name, own in ways.items()
    ]
    columns = ("way", "vs dense", "agreement", "layers", "predictors", "a pass")
    table(title, columns, rows)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--quantize", choices=("keep", "none"), default="none")
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--target", type=float, default=0.94)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        texts = read_prompts(options.prompts, options.limit)
        quantize = None if options.quantize == "none" else options.quantize
        loaded = eepass.load(options.model, quantize=quantize)
        length = usual_length(loaded.model, MAX_PROMPT + NEW_TOKENS)
        artifact = options.artifact or loaded.artifact
        model = eepass.transform(loaded.model, artifact, max_length=length, stop=loaded.stop)
        if not model.has_exits:
            raise InputError("early exits need an artefact with them: eepass train, or --artifact")
        pairs = dense_answers(model, [loaded.encode(text) for text in texts])
        ways = measure(model, pairs, options.target)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    title = f"{loaded.name}: {len(pairs)} prompts x {NEW_TOKENS} tokens, target {options.target}"
    show(title, ways)
    if options.json:
        report = {
            "model": loaded.name, "quantize": options.quantize, "prompts": len(pairs),
            "new_tokens": NEW_TOKENS, "target": options.target,
            "layers": model.decoder.num_layers, "ways": ways,
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
