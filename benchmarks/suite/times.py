"""Parts that measure. What is wrong gets no time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.suite import engines, hugging_face, measuring, reference
from benchmarks.suite.bench import Bench
from benchmarks.suite.correctness import judge_exits, judge_forced
from benchmarks.suite.parts import FORCED, Missing, Notify, Wrong, timed_modes
from benchmarks.suite.wide_twin import cut_model
from eepass.planning import DRAFT_HEAD

Answers = Callable[[list[int]], engines.Answer]


@dataclass(frozen=True, slots=True)
class System:
    """Something that answers prompts; ``exits``: the engine, where its tokens may exit early;
    ``exact``: the engine and how it decodes, where a pass may confirm several."""

    answers: Answers
    exits: engines.Engine | None = None
    exact: tuple[engines.Engine, engines.How] | None = None


def bandwidth(bench: Bench, notify: Notify) -> dict[str, Any]:
    """Copy bandwidth and what it allows: the time a dense step needs for reading its weights."""
    bench.require_device()
    copied = measuring.copy_bandwidth(bench)
    size = measuring.weight_bytes(bench.twin)
    return {"copy_bytes_per_second": copied, "weight_bytes": size,
            "roofline_ms": 1e3 * size / copied}  # fmt: skip


def side_by_side(bench: Bench, notify: Notify) -> dict[str, Any]:
    """Every system on the same prompts, in turns."""
    found: dict[str, Any] = {"new_tokens": bench.new_tokens, "ms_per_token": {}, "quality": {},
                             "missing": {}}  # fmt: skip
    ready: dict[str, Answers] = {}
    for name, prepare in _systems(bench).items():
        if bench.seconds_left() < 20 and not bench.options.tiny:
            found["missing"][name] = "no time was left to prepare it"
            continue
        skips = hugging_face.cudagraph_skips()
        try:
            system = prepare()
            found["quality"][name] = _quality(bench, system)
            ready[name] = system.answers
        except (Missing, Wrong) as error:
            found["missing"][name] = str(error)
        except Exception as error:
            # one system that fails leaves the others to be measured, unless the device is lost
            if bench.device_is_lost():
                raise
            first = (str(error).strip().splitlines() or [""])[0][:200]
            found["missing"][name] = f"{type(error).__name__}: {first}"
        if name == "hf compiled":
            found["cudagraph_skips"] = hugging_face.cudagraph_skips() - skips
        notify(found)

    def keep(times: dict[str, list[float]]) -> None:
        found["ms_per_token"] = measuring.medians(times)
        found["rounds"] = {name: list(taken) for name, taken in times.items()}
        notify(found)

    systems = {name: _ms(bench, answers) for name, answers in ready.items()}
    measuring.in_turns(bench, systems, bench.rounds, keep)
    return found


def _systems(bench: Bench) -> dict[str, Callable[[], System]]:
    found: dict[str, Callable[[], System]] = {
        "hf eager": lambda: _hf(hugging_face.eager(bench), bench),
        "hf compiled": lambda: _hf(hugging_face.compiled(bench), bench),
    }
    for mode in timed_modes(bench.options.device):
        for how in (engines.DENSE, engines.REAL, engines.EXACT):
            label = "exits" if how is engines.REAL else how.name
            found[f"eepass {label}, {mode}"] = lambda mode=mode, how=how: System(
                _eepass(bench, engines.engine(bench, mode), how),
                engines.engine(bench, mode) if how is engines.REAL else None,
                (engines.engine(bench, mode), how) if how is engines.EXACT else None,
            )
    return found


def _hf(system: hugging_face.HfGreedy, bench: Bench) -> System:
    depth = bench.twin.config.num_hidden_layers

    def answers(ids: list[int]) -> engines.Answer:
        tokens, seconds = system.answer(ids, bench.new_tokens)
        return engines.Answer(tokens, [depth] * len(tokens), seconds)

    return System(answers)


def _eepass(bench: Bench, engine: engines.Engine, how: engines.How) -> Answers:
    return lambda ids: engine.answer(ids, bench.new_tokens, how)


def _ms(bench: Bench, answers: Answers) -> Callable[[], float]:
    """Milliseconds a token, the median over the prompts."""

    def run() -> float:
        found = [answers(ids) for ids in bench.prompts]
        return statistics.median(1e3 * a.seconds / (len(a.tokens) - 1) for a in found)

    return run


def _quality(bench: Bench, system: System) -> dict[str, Any]:
    """Agreement of the answers with the eager argmax; raises ``Wrong`` for errors."""
    verdict, agreeing = reference.Verdict(), 0
    layers: list[int] = []
    if system.exact is not None:
        engine, how = system.exact
        engine.counting(how)
    for ids in bench.prompts:
        answer = system.answers(ids)
        if len(answer.tokens) != bench.new_tokens:
            raise Wrong(f"{len(answer.tokens)} tokens where {bench.new_tokens} were asked for")
        if system.exits is not None:
            agreeing += judge_exits(bench, system.exits, ids, answer, verdict)
        else:
            agreeing += _judge(bench, bench.twin, ids, answer, verdict)
        layers += answer.layers[1:]
    found = {"agreement": agreeing / verdict.tokens, "mean_exit_layer": sum(layers) / len(layers),
             "near_ties": verdict.found()["near_ties"]}  # fmt: skip
    if system.exact is not None:
        found["tokens_a_pass"] = engine.tokens_a_pass(how)
    return found


def _judge(
    bench: Bench, model: Any, ids: list[int], answer: engines.Answer,
    verdict: reference.Verdict,
) -> int:  # fmt: skip
    """``answer`` by the eager ``model``; how many of its tokens are the argmax."""
    _, logits = reference.follow(model, ids, answer.tokens)
    limit = bench.limits[model.config.num_hidden_layers]
    verdict.judge(logits, answer.tokens, limit, "its answer")
    return int((logits.argmax(-1).cpu() == torch.tensor(answer.tokens)).sum())


def never_exit(bench: Bench, notify: Notify, mode: str) -> dict[str, Any]:
    """What running all predictors costs when no token exits."""
    engine = engines.engine(bench, mode)
    systems = {}
    for how in (engines.DENSE, engines.NEVER):
        answers = _eepass(bench, engine, how)
        _quality(bench, System(answers))
        systems[how.name] = _ms(bench, answers)
    return _pair(bench, notify, systems, "never", "dense")


def exact_step(bench: Bench, notify: Notify, mode: str) -> dict[str, Any]:
    """The exact, speculative step beside the dense one, with draft tokens from the text and with
    those of the draft head too: tokens a second, tokens accepted a pass, the bonus token included,
    and what a pass takes by the dense one's time."""
    engine = engines.engine(bench, mode)
    ways = {"text": engines.EXACT}
    if DRAFT_HEAD in bench.artifact.tensors:
        ways["head and text"] = engines.DRAFTED
    quality: dict[str, dict[str, Any]] = {}
    systems = {"dense": _ms(bench, _eepass(bench, engine, engines.DENSE))}
    for name, how in ways.items():
        answers = _eepass(bench, engine, how)
        quality[name] = _quality(bench, System(answers, exact=(engine, how)))
        systems[name] = _ms(bench, answers)

    def found(times: dict[str, list[float]]) -> dict[str, Any]:
        speed = {name: 1e3 / ms for name, ms in measuring.medians(times).items()}
        report: dict[str, Any] = {
            "rows": engine.launch_report(engines.EXACT)["rows"], "rounds": times,
            "dense_tokens_per_second": speed["dense"], "ways": {},
        }  # fmt: skip
        for name in ways:
            faster = 1 / measuring.paired_ratio(times, name, "dense")
            report["ways"][name] = {
                "tokens_per_second": speed[name], "of_dense": faster, **quality[name],
                "pass_of_dense": quality[name]["tokens_a_pass"] / faster,
            }  # fmt: skip
        return report

    times = measuring.in_turns(bench, systems, bench.rounds, lambda times: notify(found(times)))
    return found(times)


def forced_exit(bench: Bench, notify: Notify, mode: str) -> dict[str, Any]:
    """Exits after layer e, beside a model that has only e layers."""
    engine = engines.engine(bench, mode)
    found: dict[str, Any] = {}
    depth, ids = bench.twin.config.num_hidden_layers, bench.prompts[0]
    for layer in FORCED if depth > max(FORCED) else (1, depth - 1):
        cut = _cut(bench, mode, layer)
        judge_forced(bench, engine, layer, bench.new_tokens, reference.Verdict())
        short = _eepass(bench, cut, engines.DENSE)
        _judge(bench, cut.hf, ids, short(ids), reference.Verdict())
        forced = _eepass(bench, engine, engines.How("forced", layer))
        systems = {"forced": _ms(bench, forced), "cut": _ms(bench, short)}
        found[str(layer)] = _pair(bench, lambda _: None, systems, "forced", "cut")
        notify(found)
        cut.close()
    return found


def _cut(bench: Bench, mode: str, layer: int) -> engines.Engine:
    """The twin's first layers as a model, transformed once for all launch modes."""
    if layer not in bench.cuts:
        short = cut_model(bench.twin, layer)
        bench.cuts[layer] = short, engines.transform(bench, short, artifact=False)
    return engines.Engine(bench, mode, *bench.cuts[layer])


def _pair(
    bench: Bench, notify: Notify, systems: dict[str, Callable[[], float]], above: str, below: str,
) -> dict[str, Any]:  # fmt: skip
    def found(times: dict[str, list[float]]) -> dict[str, Any]:
        return {"ms_per_token": measuring.medians(times), "rounds": times,
                "ratio": measuring.paired_ratio(times, above, below)}  # fmt: skip

    times = measuring.in_turns(bench, systems, bench.rounds, lambda times: notify(found(times)))
    return found(times)
