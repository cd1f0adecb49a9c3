"""What checking an exit costs on the CPU: its segments through inductor, beside one eager operator.

    python benchmarks/exit_share.py [--rounds N] [--threads T]

Both are evaluated in turns on the same hidden state, with layers run between them as in a step, so
that weights have left the caches. The share is that of the exits checked for an average token of
smollm2.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

import eepass
from eepass.config import ExitConfig
from eepass.passes.exits.fuse_exit_predictor import fuse_exit_predictor
from eepass.passes.exits.insert_predictors import insert_predictors
from eepass.passes.report import PassReport
from eepass.plan import ExitSegments
from eepass.planning import exit_tensors
from eepass.runtime.exits.exits import Exits
from eepass.runtime.statistics import Statistics

# exits checked per token at target agreement 0.98 (active_predictors in the statistics)
CHECKED = 2.35


def microseconds(call: Callable[[], object]) -> float:
    began = perf_counter()
    call()
    return (perf_counter() - began) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    loaded = eepass.load("smollm2")
    config = ExitConfig().approximate(0.98)
    model = eepass.transform(loaded.model, loaded.artifact, config, 448)
    decoder, plan = model.decoder, model.plan
    assert plan is not None and model.artifact is not None
    engine: Any = model.engine
    segments = engine.exits
    tensors = exit_tensors(config.name, model.artifact, decoder.tensors, model.splits[1])
    tensors |= plan.threshold_tensors()
    every = {**decoder.tensors, **tensors}

    def fused_segments(rows: int) -> ExitSegments:
        made = insert_predictors(model.splits[1], plan, every, PassReport(), rows)
        fused = fuse_exit_predictor(model.splits[1], plan, every, PassReport(), rows)
        assert fused is not None
        return replace(made, predictors=fused.predictors)

    fused = Exits(decoder, plan, fused_segments, tensors)
    counted, layer = Statistics(decoder.num_layers), plan.exits[1].layer
    torch.manual_seed(0)
    hidden = torch.randn(1, 1, decoder.hidden_size).bfloat16() * 3
    place = decoder.side_inputs.span(100, 1)

    def step() -> None:
        state = hidden
        for index in range(decoder.num_layers):
            state = decoder.run_layer(index, state, place)
        decoder.logits(state)

    forms = {"segments": segments, "fused": fused}
    times: dict[str, list[float]] = {"segments": [], "fused": [], "step": []}
    with torch.no_grad():
        for exits in forms.values():
            exits.prepare(1)
        drafts = fused.draft_from(hidden, fused.begin(1), counted)
        for turn in range(options.rounds):
            for name in sorted(forms, reverse=bool(turn % 2)):
                times["step"].append(microseconds(step))
                check = forms[name].check
                times[name].append(
                    microseconds(lambda check=check: check(layer, hidden, drafts, [0], counted))
                )
    step_time = statistics.median(times.pop("step"))
    print(f"a step {step_time:.0f} µs")
    for name, taken in times.items():
        cost = statistics.median(taken)
        print(f"{name}: {cost:.0f} µs an exit, {CHECKED * cost / step_time:.2%} of a step")


if __name__ == "__main__":
    main()
