"""``eepass.bench``: lossless speculation and early exit against dense, compiled by others, eager.

All systems run side by side in this process, prompt by prompt, on the same weights. Speed and exit
layer of the frontier are taken on the positions agreement is: teacher-forced along the dense
answer. Free-running figures stand beside them, with the repetition and the likelihood of what was
said: a run that falls into repetition exits early and looks fast.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol

import torch

from eepass.benchmark.baselines import HfDecoder, fastest_compiled
from eepass.benchmark.frontier import Notify, follow_pairs, frontier
from eepass.benchmark.quality import judge, repetition_4gram
from eepass.checkpoints.models import LoadedModel, original_of
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.model import EarlyExitModel
from eepass.runtime.engine.engine import Engine
from eepass.runtime.statistics import Statistics

# prompt and answer together, where nobody asked for more
MAX_LENGTH = 448
# what approximate speculation is asked for
T3_TARGET = 0.99
SHOWN = (
    "accepted_per_pass", "near_ties", "rollbacks", "mean_exit_layer", "draft_share",
    "predictor_share", "verify_share", "false_verify_rate",
)  # fmt: skip


class Timed(Protocol):
    """Something that can be measured beside the engines: answers and the seconds they took."""

    def timed(
        self, new_tokens: int, stop: frozenset[int]
    ) -> Callable[[list[int]], tuple[list[int], float]]: ...


@dataclass(slots=True)
class _Run:
    """One system's answers to all prompts."""

    answer: Callable[[list[int]], tuple[list[int], float]]
    engine: Engine | None
    said: list[list[int]]
    seconds: list[float]

    def ms_per_token(self) -> list[float]:
        """By prompt; the first token is the prompt's."""
        pairs = zip(self.said, self.seconds, strict=True)
        return [1e3 * seconds / max(len(said) - 1, 1) for said, seconds in pairs]


def bench(
    loaded: LoadedModel,
    model: EarlyExitModel,
    prompts: Sequence[str],
    new_tokens: int = 128,
    config: ExitConfig | None = None,
    raw: bool = False,
    frontier_too: bool = True,
    baselines: bool = True,
    others: dict[str, Timed] | None = None,
    notify: Notify = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Measure; ``notify(stage, done, total)`` says how far it is; ``others``: further systems.

    Ratios are speed-ups: the reference's time by the system's own, above 1 is faster. Raises
    ``InputError`` when no prompt fits, and when an exact answer is not the dense one for another
    reason than a near tie.
    """
    config = config or ExitConfig()
    if baselines:
        original_of(loaded, "leave Hugging Face out (--no-baselines), or bench the original")
    encoded = [loaded.encode(prompt, raw) for prompt in prompts]
    encoded = [ids for ids in encoded if len(ids) + new_tokens <= model.decoder.max_sequence_length]
    if not encoded:
        raise InputError("no prompt fits the cache together with its answer: raise max_length")
    answers = _dense_answers(model, encoded, new_tokens, notify)
    pairs = [(ids, answer) for ids, answer in zip(encoded, answers, strict=True) if len(answer) > 2]
    if not pairs:
        raise InputError("the model answers every prompt with one token: nothing to measure")
    runs, variant = _systems(loaded, model, config, new_tokens, pairs[0][0], baselines, others)
    _run_all(runs, [ids for ids, _ in pairs], notify)
    systems = {name: _figures(model, run, runs, pairs, notify) for name, run in runs.items()}
    if variant:
        systems["hf-compiled"]["variant"] = variant
    bandwidth = copy_bandwidth()
    reference = "hf-compiled" if baselines else "eepass-dense"
    weight_seconds = _weight_bytes(model) / bandwidth
    times = {name: figures["ms_per_token"] for name, figures in systems.items()}
    result: dict[str, Any] = {
        "model": loaded.name,
        "config": config.to_json(),
        "layers": model.decoder.num_layers,
        "prompts": len(pairs),
        "new_tokens": new_tokens,
        "threads": torch.get_num_threads(),
        "dtype": str(model.decoder.kv.keys[0].dtype).removeprefix("torch."),
        "copy_bandwidth_gb_s": bandwidth / 1e9,
        "systems": systems,
        "reference": reference,
        "ratios": {name: times[reference] / ms for name, ms in times.items()},
        "ratios_to_dense": {name: times["eepass-dense"] / ms for name, ms in times.items()},
        "t3_gain": times["eepass-speculative"] / times["eepass-speculative-t3"],
        "roofline_fraction": {name: 1e3 * weight_seconds / ms for name, ms in times.items()},
    }
    presets = ("default", "paper") if frontier_too else ()
    result["frontier"] = [
        point
        for preset in presets
        for point in frontier(
            model, replace(ExitConfig.preset(preset), kv=config.kv), pairs, notify
        )
    ]
    result["by_position"] = _follow(model, config, pairs, systems["eepass-approximate"], notify)
    model.configure(config)
    return result


def copy_bandwidth(size: int = 1 << 28, rounds: int = 7) -> float:
    """Bytes a second this machine copies from memory to memory, read and write counted."""
    source = torch.ones(size // 8, dtype=torch.int64)
    target = torch.zeros_like(source)
    times = []
    for _ in range(rounds):
        began = perf_counter()
        target.copy_(source)
        times.append(perf_counter() - began)
    return 2 * size / statistics.median(times)


def _dense_answers(
    model: EarlyExitModel, encoded: Sequence[list[int]], new_tokens: int, notify: Notify
) -> list[list[int]]:
    answers = []
    for done, ids in enumerate(encoded):
        notify("dense answers", done, len(encoded))
        answers.append([s.token for s in model.dense.generate(ids, new_tokens, model.stop)])
    return answers


def _systems(
    loaded: LoadedModel,
    model: EarlyExitModel,
    config: ExitConfig,
    new_tokens: int,
    example: list[int],
    baselines: bool,
    others: dict[str, Timed] | None,
) -> tuple[dict[str, _Run], str]:
    if model.artifact is None:
        raise InputError("early exit needs an artefact: run eepass train")
    target = min(T3_TARGET, model.artifact.presets[config.name].most)
    exact = replace(config, guarantee="exact", adaptive=True, kv="defer")
    engines = {
        "eepass-dense": model.dense,
        "eepass-approximate": model.configure(config.approximate()),
        "eepass-exact": model.configure(replace(exact, exits=True, speculate="off")),
        "eepass-speculative": model.configure(replace(exact, exits=False)),
        "eepass-speculative-t3": model.configure(
            replace(exact, guarantee="approximate", exits=True, target_agreement=target)
        ),
    }
    variant = ""
    timed: dict[str, Callable[[list[int]], tuple[list[int], float]]] = {}
    if baselines:
        hf = HfDecoder(loaded.model, model.decoder.cache_length)
        timed["hf-eager"] = hf.timed(new_tokens, model.stop)
        variant, compiled = fastest_compiled(loaded.model, model.decoder.cache_length, example)
        timed["hf-compiled"] = compiled.timed(new_tokens, model.stop)
    for name, other in (others or {}).items():
        timed[name] = other.timed(new_tokens, model.stop)
    runs = {name: _Run(answer, None, [], []) for name, answer in timed.items()}
    for name, engine in engines.items():
        runs[name] = _Run(_timed_engine(engine, new_tokens, model.stop), engine, [], [])
    return runs, variant


def _timed_engine(
    engine: Engine, new_tokens: int, stop: frozenset[int]
) -> Callable[[list[int]], tuple[list[int], float]]:
    def run(ids: list[int]) -> tuple[list[int], float]:
        answer: list[int] = []
        began = perf_counter()
        for step in engine.generate(ids, new_tokens, stop):
            if not answer:
                began = perf_counter()  # the prompt is behind, decoding begins
            answer.append(step.token)
        # catching up what is pending is part of the price
        return answer, perf_counter() - began

    return run


def _run_all(runs: dict[str, _Run], prompts: Sequence[list[int]], notify: Notify) -> None:
    """Each system answers each prompt by itself, one after another per prompt."""
    for done, run in enumerate(runs.values()):
        notify("warming up", done, len(runs))
        run.answer(prompts[0])  # not counted
        if run.engine is not None:
            run.engine.statistics = Statistics(run.engine.decoder.num_layers)
    for done, ids in enumerate(prompts):
        notify("free running", done, len(prompts))
        for run in runs.values():
            answer, seconds = run.answer(ids)
            run.said.append(answer)
            run.seconds.append(seconds)


def _figures(
    model: EarlyExitModel,
    run: _Run,
    runs: dict[str, _Run],
    pairs: Sequence[tuple[list[int], list[int]]],
    notify: Notify,
) -> dict[str, Any]:
    ms = run.ms_per_token()
    typical = statistics.median(ms)
    found: dict[str, Any] = {"ms_per_token": typical, "tokens_per_s": 1e3 / typical}
    if run.engine is None:
        return found
    dense = runs["eepass-dense"]
    slower = zip(dense.ms_per_token(), ms, strict=True)
    found["worst_ratio_to_dense"] = min(its / own for its, own in slower)
    same = [own == other for own, other in zip(run.said, dense.said, strict=True)]
    found["exact_match"] = sum(same) / len(same)
    summary = run.engine.statistics.summary()
    found |= {name: summary[name] for name in SHOWN}
    notify("likelihood of the answers", 0, 1)
    judged = [judge(model, ids, said) for (ids, _), said in zip(pairs, run.said, strict=True)]
    tokens = sum(j.tokens for j in judged)
    found["agreement"] = sum(j.agreeing for j in judged) / tokens
    found["dense_nll"] = sum(j.nll for j in judged) / tokens
    found["repetition_4gram"] = repetition_4gram(run.said)
    if len(run.engine.options.modes) > 1:
        found["decision"] = run.engine.planner.decision()
    exact = run.engine.options.guarantee == "exact" and run.engine is not model.dense
    if exact and not all(same) and not summary["near_ties"]:
        raise InputError("an exact answer differs from the dense one without a near tie: a defect")
    return found


def _follow(
    model: EarlyExitModel,
    config: ExitConfig,
    pairs: Sequence[tuple[list[int], list[int]]],
    figures: dict[str, Any],
    notify: Notify,
) -> list[dict[str, Any]]:
    """Teacher-forced figures of plain early exit, in place of the free-running ones; returns them
    by position in the answer."""
    engine = model.configure(config.approximate())
    followed = follow_pairs(model, {"approximate": engine}, pairs, notify)["approximate"]
    figures["teacher_forced_ratio_to_dense"] = followed["ratio_to_dense"]
    figures["free_running_agreement"] = figures["agreement"]
    figures |= {
        name: followed[name]
        for name in (
            "agreement", "mean_exit_layer", "active_predictors", "false_verify_rate",
            "predictor_share", "draft_share", "verify_share", "full_head_rate", "exit_layers",
        )
    }  # fmt: skip
    by_position: list[dict[str, Any]] = followed["by_position"]
    return by_position


def _weight_bytes(model: EarlyExitModel) -> int:
    """Bytes a dense step reads: what layers and head take, not an embedding only looked up."""
    split = model.splits[1]
    segments = (*split.layers, split.head.whole)
    read = {
        role.name for segment in segments for role in segment.inputs if role.kind == "parameter"
    }
    return sum(model.decoder.tensors[name].nbytes for name in read)
