"""``eepass.bench``: early exit against the same model dense, compiled by others, and eager.

All systems run side by side in this process, prompt by prompt, on the same weights. Speed and exit
layer of the frontier are taken on the positions agreement is: teacher-forced along the dense
answer. Free-running figures stand beside them, with the repetition and the likelihood of what was
said: a run that falls into repetition exits early and looks fast.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from eepass.baselines import HfDecoder, fastest_compiled
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.models import LoadedModel
from eepass.runtime.engine import Engine
from eepass.transformation import EarlyExitModel

FRONTIER = (0.90, 0.94, 0.975, 0.99)
Notify = Callable[[str, int, int], None]


def bench(
    loaded: LoadedModel,
    model: EarlyExitModel,
    prompts: Sequence[str],
    new_tokens: int = 128,
    config: ExitConfig | None = None,
    raw: bool = False,
    frontier: bool = True,
    baselines: bool = True,
    notify: Notify = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Measure; ``notify(stage, done, total)`` says how far it is.

    Ratios are speed-ups: the reference's time by the system's own, above 1 is faster. Raises
    ``InputError`` when no prompt fits, and when dense eepass disagrees with the eager model.
    """
    config = config or ExitConfig()
    encoded = [loaded.encode(prompt, raw) for prompt in prompts]
    encoded = [ids for ids in encoded if len(ids) + new_tokens <= model.decoder.capacity]
    if not encoded:
        raise InputError("no prompt fits the cache together with its answer: raise max_length")
    answers = _dense_answers(model, encoded, new_tokens, notify)
    pairs = [(ids, answer) for ids, answer in zip(encoded, answers, strict=True) if len(answer) > 2]
    if not pairs:
        raise InputError("the model answers every prompt with one token: nothing to measure")
    bandwidth = copy_bandwidth()
    systems = _free_running(loaded, model, config, pairs, new_tokens, baselines, notify)
    result: dict[str, Any] = {
        "model": loaded.name,
        "config": config.to_json(),
        "layers": model.decoder.num_layers,
        "prompts": len(pairs),
        "new_tokens": new_tokens,
        "threads": torch.get_num_threads(),
        "dtype": str(next(iter(loaded.model.parameters())).dtype).removeprefix("torch."),
        "copy_bandwidth_gb_s": bandwidth / 1e9,
        "systems": systems,
    }
    reference = "hf-compiled" if baselines else "eepass-dense"
    weight_seconds = _weight_bytes(loaded.model) / bandwidth
    result["ratios"] = {
        name: systems[reference]["ms_per_token"] / figures["ms_per_token"]
        for name, figures in systems.items()
    }
    result["reference"] = reference
    result["roofline_fraction"] = {
        name: 1e3 * weight_seconds / figures["ms_per_token"] for name, figures in systems.items()
    }
    presets = ("default", "paper") if frontier else ()
    result["frontier"] = [
        point
        for preset in presets
        for point in _frontier(
            model, replace(ExitConfig.preset(preset), kv=config.kv), pairs, notify
        )
    ]
    follow = _follow_pairs(model, {"approximate": model.configure(config)}, pairs, notify)
    systems["eepass-approximate"] |= {
        name: follow["approximate"][name]
        for name in (
            "agreement", "mean_exit_layer", "active_predictors", "false_verify_rate",
            "predictor_share", "draft_share", "verify_share", "full_head_rate", "exit_layers",
        )
    }  # fmt: skip
    systems["eepass-approximate"]["teacher_forced_ratio_to_dense"] = follow["approximate"][
        "ratio_to_dense"
    ]
    systems["eepass-approximate"]["text_equal_to_dense"] = _first_difference(systems)
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


def repetition_4gram(answers: Sequence[Sequence[int]]) -> float:
    """Share of 4-grams that were said before in the same answer."""
    repeated = total = 0
    for answer in answers:
        grams = Counter(tuple(answer[i : i + 4]) for i in range(len(answer) - 3))
        repeated += sum(count - 1 for count in grams.values())
        total += sum(grams.values())
    return repeated / max(total, 1)


def dense_nll(model: EarlyExitModel, prompt: list[int], answer: list[int]) -> tuple[float, int]:
    """Negative log-likelihood (nats, summed) of an answer under the dense model, and its tokens."""
    kept: list[torch.Tensor] = []
    last = model.decoder.num_layers

    def keep(layer: int, hidden: torch.Tensor) -> None:
        if layer == last:
            kept.append(hidden.clone())

    model.dense.prefill([*prompt, *answer[:-1]], keep)
    states = torch.cat(kept, 1)[:, len(prompt) - 1 :]
    total = 0.0
    for place, token in enumerate(answer):
        logits = model.decoder.logits(states[:, place : place + 1])[0, 0]
        total -= float(logits.log_softmax(-1)[token])
    return total, len(answer)


def _dense_answers(
    model: EarlyExitModel, encoded: Sequence[list[int]], new_tokens: int, notify: Notify
) -> list[list[int]]:
    answers = []
    for done, ids in enumerate(encoded):
        notify("dense answers", done, len(encoded))
        answers.append([s.token for s in model.dense.generate(ids, new_tokens, model.stop)])
    return answers


def _free_running(
    loaded: LoadedModel,
    model: EarlyExitModel,
    config: ExitConfig,
    pairs: Sequence[tuple[list[int], list[int]]],
    new_tokens: int,
    baselines: bool,
    notify: Notify,
) -> dict[str, dict[str, Any]]:
    """Each system answers each prompt by itself, one after another per prompt."""
    engines = {"eepass-dense": model.dense, "eepass-approximate": model.configure(config)}
    runs: dict[str, Callable[[list[int]], tuple[list[int], float]]] = {}
    variant = ""
    if baselines:
        notify("compiling the baseline", 0, 1)
        runs["hf-eager"] = HfDecoder(loaded.model, model.decoder.cache_length).timed(
            new_tokens, model.stop
        )
        variant, compiled = fastest_compiled(loaded.model, model.decoder.cache_length, pairs[0][0])
        runs["hf-compiled"] = compiled.timed(new_tokens, model.stop)
    for name, engine in engines.items():
        runs[name] = _timed_engine(engine, new_tokens, model.stop)
    times: dict[str, list[float]] = {name: [] for name in runs}
    said: dict[str, list[list[int]]] = {name: [] for name in runs}
    for run in runs.values():
        run(pairs[0][0])  # warm-up, not counted
    for done, (ids, _) in enumerate(pairs):
        notify("free running", done, len(pairs))
        for name, run in runs.items():
            answer, seconds = run(ids)
            said[name].append(answer)
            if len(answer) > 1:
                times[name].append(1e3 * seconds / (len(answer) - 1))
    systems: dict[str, dict[str, Any]] = {}
    for name in runs:
        ms = statistics.median(times[name])
        systems[name] = {"ms_per_token": ms, "tokens_per_s": 1e3 / ms}
    if variant:
        systems["hf-compiled"]["variant"] = variant
    for name in engines:
        notify("likelihood of the answers", 0, 1)
        nll = [
            dense_nll(model, ids, answer)
            for (ids, _), answer in zip(pairs, said[name], strict=True)
        ]
        systems[name]["repetition_4gram"] = repetition_4gram(said[name])
        systems[name]["dense_nll"] = sum(n for n, _ in nll) / sum(count for _, count in nll)
        systems[name]["answers"] = said[name]
    return systems


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


def _frontier(
    model: EarlyExitModel,
    preset: ExitConfig,
    pairs: Sequence[tuple[list[int], list[int]]],
    notify: Notify,
) -> list[dict[str, Any]]:
    points = []
    for target in FRONTIER:
        config = replace(preset, target_agreement=target, threshold=None)
        engine = model.configure(config)
        measured = _follow_pairs(model, {"exits": engine}, pairs, notify)["exits"]
        kept = (
            "agreement", "ms_per_token", "ratio_to_dense", "mean_exit_layer", "predictor_share",
            "draft_share", "verify_share", "full_head_rate", "active_predictors",
            "false_verify_rate",
        )  # fmt: skip
        points.append(
            {"preset": preset.name, "target": target, **{name: measured[name] for name in kept}}
        )
    return points


def _follow_pairs(
    model: EarlyExitModel,
    engines: dict[str, Engine],
    pairs: Sequence[tuple[list[int], list[int]]],
    notify: Notify,
) -> dict[str, dict[str, Any]]:
    """Teacher-force dense and ``engines`` along the dense answers, alternating prompt by prompt."""
    everything = {"dense": model.dense, **engines}
    for engine in everything.values():
        engine.follow(*pairs[0])  # warm-up, compiles what is missing
        engine.statistics = type(engine.statistics)(model.decoder.num_layers)
    ratios: dict[str, list[float]] = {name: [] for name in engines}
    equal: dict[str, int] = dict.fromkeys(engines, 0)
    total = 0
    for done, (ids, answer) in enumerate(pairs):
        notify("teacher forcing", done, len(pairs))
        seconds: dict[str, float] = {}
        dense: list[int] = []
        for name, engine in everything.items():
            before = engine.statistics.seconds
            tokens = [step.token for step in engine.follow(ids, answer)]
            seconds[name] = engine.statistics.seconds - before
            if name == "dense":
                dense, total = tokens, total + len(tokens)
            else:
                equal[name] += sum(a == b for a, b in zip(tokens, dense, strict=True))
                ratios[name].append(seconds["dense"] / seconds[name])
    found = {}
    for name, engine in engines.items():
        found[name] = engine.statistics.summary()
        found[name]["agreement"] = equal[name] / total
        found[name]["ratio_to_dense"] = model.dense.statistics.seconds / engine.statistics.seconds
        found[name]["median_ratio_to_dense"] = statistics.median(ratios[name])
    return found


def _first_difference(systems: dict[str, dict[str, Any]]) -> float:
    """Share of free-running answers that are word for word the dense ones; drops the answers."""
    dense = systems["eepass-dense"].pop("answers")
    own = systems["eepass-approximate"].pop("answers")
    return sum(a == b for a, b in zip(dense, own, strict=True)) / len(dense)


def _weight_bytes(model: Any) -> int:
    """Bytes a dense step reads: all weights but an embedding that is only looked up."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    looked_up = 0 if embedding is head else embedding.numel() * embedding.element_size()
    return sum(p.numel() * p.element_size() for p in model.parameters()) - looked_up
