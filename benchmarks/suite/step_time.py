"""Where a step's time goes: on a GPU by its kernels, on a CPU as the engine counts it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.suite import engines
from benchmarks.suite.bench import Bench
from benchmarks.suite.parts import Missing, Notify

# what a kernel belongs to, by a part of its name; the first that fits. The rest are segments, the
# draft's matrix product among them
KINDS = {
    "predictors": ("_exit_kernel", "_gate_kernel", "_state_kernel"),
    "verify": ("_verify_kernel",),
    "linear": ("_rows_kernel", "_packed_kernel"),
    "attention": ("_attend_kernel", "_combine_kernel"),
    "draft": ("_score_kernel", "_merge_kernel", "topk", "TopK"),
    "conditions": ("eepass_set_condition",),
}
TOKENS = 33


def step_split(bench: Bench, notify: Notify, mode: str) -> dict[str, Any]:
    """Milliseconds a token by kind, for dense decoding and for real exits."""
    engine = engines.engine(bench, mode)
    found = {}
    for how in (engines.DENSE, engines.REAL):
        run = _of_kernels if bench.on_cuda else _of_statistics
        found[str(how)] = engines.or_missing(lambda how=how, run=run: run(bench, engine, how))
        notify(found)
    found["launch_report"] = engine.launch_report()
    return found


def _of_statistics(bench: Bench, engine: engines.Engine, how: engines.How) -> dict[str, Any]:
    engine.answer(bench.prompts[0], TOKENS, how)
    owner = engine.counting(how)
    answer = engine.answer(bench.prompts[0], TOKENS, how)
    counted = owner.statistics
    if engine.mode != "engine":
        return {"whole": 1e3 * counted.seconds / (len(answer.tokens) - 1)}
    tokens = len(answer.tokens) - 1
    split = {
        "predictors": counted.predictor_seconds,
        "verify": counted.verify_seconds,
        "draft": counted.draft_seconds,
    }
    split["segments"] = counted.seconds - sum(split.values())
    return {name: 1e3 * seconds / tokens for name, seconds in split.items()}


def _of_kernels(bench: Bench, engine: engines.Engine, how: engines.How) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    engine.answer(bench.prompts[0], TOKENS, how)
    # the prompt's kernels are no step's
    taken = profile(activities=[ProfilerActivity.CUDA])
    engine.answer(bench.prompts[0], TOKENS, how, taken.start)
    taken.stop()
    device = [event for event in taken.events() if event.device_type.name == "CUDA"]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in device)
    if not spans:
        raise Missing("the profiler saw no kernel: CUPTI is not at hand")
    return {name: us / 1e3 / (TOKENS - 1) for name, us in split_spans(spans).items()}


def split_spans(spans: Sequence[tuple[float, float, str]]) -> dict[str, float]:
    """Time by kind of spans (begin, end, name) in order of begin; ``gaps``: nothing ran.

    Spans that overlap count once, for the one that began first.
    """
    found = dict.fromkeys([*KINDS, "segments", "gaps"], 0.0)
    at = spans[0][0]
    for begin, end, name in spans:
        found["gaps"] += max(begin - at, 0.0)
        found[_kind(name, KINDS.items())] += max(end - max(begin, at), 0.0)
        at = max(at, end)
    return found


def _kind(name: str, kinds: Iterable[tuple[str, Sequence[str]]]) -> str:
    return next((kind for kind, marks in kinds if any(mark in name for mark in marks)), "segments")
