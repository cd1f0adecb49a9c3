"""``eepass.bench``: lossless speculation and early exit against dense, compiled by others, eager.

All systems decode in turns in this process, on the same weights (``turns``). Speed and exit layer
of the frontier are measured on the positions that agreement is: teacher-forced along the dense
answer. Free-running figures stand beside them, with the repetition and the likelihood of the
answers: a run that falls into repetition exits early and looks fast.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch

from eepass.benchmark import turns
from eepass.benchmark.baselines import HfDecoder, fastest_compiled
from eepass.benchmark.frontier import Notify, Pairs, follow_pairs, frontier, score
from eepass.benchmark.turns import Answer, EngineStream, Stream, speed_up
from eepass.checkpoints.models import LoadedModel, original_of
from eepass.codegen.cpu.stream import stream_gb_s
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.model import EarlyExitModel
from eepass.runtime.engine.engine import Engine
from eepass.runtime.statistics import Statistics

# tokens of a prompt, where nobody asked for more
MAX_PROMPT = 320
LLAMA = "llama.cpp"
# agreement that approximate speculation is to keep
T3_TARGET = 0.99
SHOWN = (
    "accepted_per_pass", "near_ties", "rollbacks", "mean_exit_layer", "draft_share",
    "predictor_share", "verify_share", "false_verify_rate",
)  # fmt: skip
# of plain early exit, in place of the free-running figures
FOLLOWED = (
    "agreement", "mean_exit_layer", "active_predictors", "false_verify_rate", "predictor_share",
    "draft_share", "verify_share", "full_head_rate", "exit_layers",
)  # fmt: skip


class TokenStream(Protocol):
    """Another system that is measured beside the engines: it answers token by token."""

    def tokens(self, ids: list[int], new_tokens: int, stop: frozenset[int]) -> Iterator[int]: ...


@dataclass(slots=True)
class _System:
    """A way of decoding and its answers to all prompts."""

    stream: Callable[[list[int]], Stream]
    engine: Engine | None = None
    answers: list[Answer] = field(default_factory=list)

    def ms_per_token(self) -> list[float]:
        """By prompt, the prompt's pass apart; 0 for an answer of one token."""
        return [1e3 * answer.seconds_per_token for answer in self.answers]


def bench(
    loaded: LoadedModel,
    model: EarlyExitModel,
    prompts: Sequence[str],
    new_tokens: int = 128,
    config: ExitConfig | None = None,
    raw: bool = False,
    frontier_too: bool = True,
    baselines: bool = True,
    others: dict[str, TokenStream] | None = None,
    notify: Notify = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Measure; ``notify(stage, done, total)`` reports progress; ``others``: further systems.

    Ratios are speed-ups: the reference's time by the system's own, above 1 is faster; None where
    they could not be measured (``turns.SpeedUp``). Without an artefact there is no early exit, and
    drafts come from the text alone. Raises ``InputError`` when no prompt fits, and when an exact
    answer differs from the dense one for another reason than a near tie.
    """
    # what one run remembered would be drafted in the next
    config = replace(config or ExitConfig(), remember=False)
    if baselines:
        original_of(loaded, "leave Hugging Face out (--no-baselines), or bench the original")
    encoded = [loaded.encode(prompt, raw) for prompt in prompts]
    encoded = [ids for ids in encoded if len(ids) + new_tokens <= model.decoder.max_sequence_length]
    if not encoded:
        raise InputError("no prompt fits the cache together with its answer: raise max_length")
    pairs = []
    for done, ids in enumerate(encoded):
        notify("dense answers", done, len(encoded))
        answer = [s.token for s in model.host_engine().generate(ids, new_tokens, model.stop)]
        if len(answer) > 2:
            pairs.append((ids, answer))
    if not pairs:
        raise InputError("the model answers every prompt with one token: nothing to measure")
    foreign: dict[str, TokenStream] = {}
    variant = ""
    if baselines:
        length = model.decoder.cache_length
        foreign["hf-eager"] = HfDecoder(loaded.model, length)
        variant, foreign["hf-compiled"] = fastest_compiled(loaded.model, length, pairs[0][0])
    systems = _systems(model, config, new_tokens, foreign | (others or {}))
    _decode_all(systems, [ids for ids, _ in pairs], notify)
    figures = {
        name: _figures(model, system, systems["eepass-dense"], pairs, notify)
        for name, system in systems.items()
    }
    if variant:
        figures["hf-compiled"]["variant"] = variant
    stream = stream_gb_s()
    reference = "hf-compiled" if baselines else "eepass-dense"
    fastest_ms = model.splits[1].bytes_a_pass / stream / 1e6
    result: dict[str, Any] = {
        "model": loaded.name,
        "config": config.to_json(),
        "layers": model.decoder.num_layers,
        "prompts": len(pairs),
        "new_tokens": new_tokens,
        "block_tokens": turns.BLOCK_TOKENS,
        "threads": torch.get_num_threads(),
        "dtype": str(model.decoder.kv.keys[0].dtype).removeprefix("torch."),
        "stream_gb_s": stream,
        "systems": figures,
        "reference": reference,
        **_ratios("ratios", systems, reference),
        **_ratios("ratios_to_dense", systems, "eepass-dense"),
        **(_ratios("ratios_to_llama", systems, LLAMA) if LLAMA in systems else {}),
        "roofline_fraction": {
            name: fastest_ms / found["ms_per_token"] for name, found in figures.items()
        },
    }
    result |= {"frontier": [], "by_position": []}
    if not model.has_exits:
        return result
    result |= speed_up(
        systems["eepass-speculative"].answers, systems["eepass-speculative-t3"].answers
    ).to_json("t3_gain")
    presets = [replace(ExitConfig.preset(name), kv=config.kv) for name in ("default", "paper")]
    if frontier_too:
        result["frontier"] = frontier(model, presets, pairs, notify)
    approximate = model.host_engine(config.approximate())
    followed = follow_pairs(model, {"it": approximate}, pairs, notify)["it"]
    figures["eepass-approximate"] |= {
        "free_running_agreement": figures["eepass-approximate"]["agreement"],
        "teacher_forced_ratio_to_dense": followed["ratio_to_dense"],
        "teacher_forced_ratio_to_dense_spread": followed["ratio_to_dense_spread"],
        **{name: followed[name] for name in FOLLOWED},
    }
    result["by_position"] = followed["by_position"]
    model.host_engine(config)
    return result


def _ratios(name: str, systems: dict[str, _System], reference: str) -> dict[str, Any]:
    """Speed-ups of all systems over ``reference``, and their blocks' ranges beside them."""
    found = {n: speed_up(systems[reference].answers, s.answers) for n, s in systems.items()}
    return {
        name: {system: ratio.value for system, ratio in found.items()},
        f"{name}_spread": {system: ratio.spread() for system, ratio in found.items()},
    }


def _systems(
    model: EarlyExitModel, config: ExitConfig, new_tokens: int, foreign: dict[str, TokenStream]
) -> dict[str, _System]:
    exact = replace(config, guarantee="exact", adaptive=True, kv="defer")
    engines = {"eepass-dense": model.host_engine()}
    if model.has_exits:
        assert model.artifact is not None
        target = min(T3_TARGET, model.artifact.presets[config.name].most)
        engines |= {
            "eepass-approximate": model.host_engine(config.approximate()),
            "eepass-exact": model.host_engine(replace(exact, exits=True, speculate="off")),
            "eepass-speculative-t3": model.host_engine(
                replace(exact, guarantee="approximate", exits=True, target_agreement=target)
            ),
        }
    engines["eepass-speculative"] = model.host_engine(replace(exact, exits=False))

    def stream_of(system: TokenStream, ids: list[int]) -> Stream:
        return Stream([token] for token in system.tokens(ids, new_tokens, model.stop))

    systems = {name: _System(partial(stream_of, system)) for name, system in foreign.items()}
    for name, engine in engines.items():
        stream = partial(EngineStream.generate, engine, new_tokens=new_tokens, stop=model.stop)
        systems[name] = _System(stream, engine)
    return systems


def _decode_all(systems: dict[str, _System], prompts: Sequence[list[int]], notify: Notify) -> None:
    """Every system answers every prompt: a prompt at a time, in turns."""
    for done, system in enumerate(systems.values()):
        notify("warming up", done, len(systems))
        list(system.stream(prompts[0]).passes)  # not counted
        if system.engine is not None:
            system.engine.statistics = Statistics(system.engine.decoder.num_layers)
    for done, ids in enumerate(prompts):
        notify("free running", done, len(prompts))
        streams = {name: system.stream(ids) for name, system in systems.items()}
        for name, answer in turns.decode_in_turns(streams, done).items():
            systems[name].answers.append(answer)


def _figures(
    model: EarlyExitModel, system: _System, dense: _System, pairs: Pairs, notify: Notify
) -> dict[str, Any]:
    ms = system.ms_per_token()
    if not any(ms):
        raise InputError("a system answers every prompt with one token: nothing to measure")
    typical = statistics.median(filter(None, ms))
    found: dict[str, Any] = {"ms_per_token": typical, "tokens_per_s": 1e3 / typical}
    if system.engine is None:
        return found
    answers = [answer.tokens for answer in system.answers]
    ratios = (its / own for its, own in zip(dense.ms_per_token(), ms, strict=True) if own)
    found["worst_ratio_to_dense"] = min(ratios)
    same = [own == its.tokens for own, its in zip(answers, dense.answers, strict=True)]
    found["exact_match"] = sum(same) / len(same)
    summary = system.engine.statistics.summary()
    found |= {name: summary[name] for name in SHOWN}
    notify("likelihood of the answers", 0, 1)
    found |= score(model, pairs, answers)
    if len(system.engine.options.modes) > 1:
        found["decision"] = system.engine.planner.decision()
    exact = system.engine.options.guarantee == "exact" and system.engine is not model.host_engine()
    if exact and not all(same) and not summary["near_ties"]:
        raise InputError("an exact answer differs from the dense one without a near tie: a defect")
    return found
