"""eepass in each launch mode, behind one interface.

Tracing and compiling is done once; the engines share segments, weights and cache, so that they can
take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

import eepass
from benchmarks.suite.bench import Bench
from benchmarks.suite.parts import Missing
from eepass.config import ExitConfig
from eepass.errors import EngineError
from eepass.model import EarlyExitModel
from eepass.passes.pipeline import split_for_rows
from eepass.planning import make_plan
from eepass.runtime.engine.engine import Engine as HostEngine
from eepass.runtime.exits.exits import ExitDecision, RowState
from eepass.runtime.step.launching import choose


@dataclass(frozen=True, slots=True)
class How:
    """A way of decoding; ``layer``: of a forced exit."""

    name: Literal["dense", "never", "real", "exact", "drafted", "forced"]
    layer: int = 0

    def __str__(self) -> str:
        return f"exit after {self.layer}" if self.layer else self.name


# never: predictors run and no token exits; real: the artefact's thresholds; exact: the dense
# tokens; in mode engine wrong exits and drafts are rolled back, captured steps verify draft tokens
# from the text; drafted: in captured steps, those of the draft head as well
DENSE, NEVER, REAL, EXACT = How("dense"), How("never"), How("real"), How("exact")
DRAFTED = How("drafted")
STEPS = {
    "exact": ExitConfig(exits=False, speculate="suffix"),
    "drafted": ExitConfig(exits=False, speculate="cascade"),
}
TARGET = 0.98
# rows of a pass of the tiny model: of a prompt, or a token and the pending ones
TINY_ROWS = 8


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens, the layers each took, and the seconds all but the first took."""

    tokens: list[int]
    layers: list[int]
    seconds: float


class Engine:
    """A transformed model in one launch mode; "engine": layer by layer, as without ``launch=``."""

    def __init__(self, bench: Bench, mode: str, model: Any, transformed: EarlyExitModel) -> None:
        """``model``: the Hugging Face model that ``transformed`` was made of."""
        self.bench, self.mode, self.hf, self.early = bench, mode, model, transformed
        plan = make_plan(_config(REAL, bench), bench.artifact, model.config.num_hidden_layers)
        self.drafting, self.draft_tokens = plan.draft_layer, plan.draft_tokens
        self._made: dict[How, Any] = {}
        try:
            self._launching = None if mode == "engine" else choose(mode, bench.device)
        except EngineError as error:
            raise Missing(str(error)) from error

    def ready(self, how: How) -> Any:
        """What decodes so: an engine, or a model whose steps are captured."""
        if how not in self._made:
            for other in [other for other in self._made if other.name == "forced"]:
                # one for each layer would fill the device
                self._close(self._made.pop(other))
            with self._on_device():
                self._made[how] = self._make(how)
        return self._made[how]

    def answer(
        self, ids: Sequence[int], count: int, how: How, after_first: Callable[[], Any] = int
    ) -> Answer:
        """``count`` tokens after ``ids``, whatever end tokens are among them. ``after_first`` is
        called after the prompt."""
        engine = self._decoding(how)
        tokens, layers, began = [], [], 0.0
        with self._on_device():
            for step in engine.generate(list(ids), count):
                if not tokens:
                    after_first()
                    began = perf_counter()
                tokens.append(step.token)
                layers.append(step.exit_layer)
            self.bench.synchronize()
        return Answer(tokens, layers, perf_counter() - began)

    def counting(self, how: How) -> Any:
        """What holds the statistics, its counts at zero."""
        engine = self._decoding(how)
        engine.statistics = type(engine.statistics)(engine.statistics.num_layers)
        return engine

    def _decoding(self, how: How) -> Any:
        made = self.ready(how)
        return made if self._launching is None else made.engine

    def tokens_a_pass(self, how: How) -> float:
        """Confirmed tokens by passes, since the counts were at zero."""
        return float(self._decoding(how).statistics.summary()["accepted_per_pass"])

    def launch_report(self, how: How = REAL) -> dict[str, Any]:
        if self._launching is None:
            return {"mode": self.mode, "reason": "layer by layer, from the host"}
        return asdict(self.ready(how).launch_report)

    def exit_logits(self, layer: int, hidden: Tensor, forced: bool = False) -> Tensor:
        """Logits float32 [n, V] of hidden states [n, H] after ``layer`` by the eager definitions:
        the LM head's at a forced exit; at a trained one those of its hot rows over the translated
        hidden state, others as low as can be."""
        tensors = self.bench.artifact.tensors
        names = [f"translator.{layer}.{part}" for part in ("scale", "down", "up")]
        if not forced and names[0] in tensors:
            parts = [tensors[name].to(hidden.device, hidden.dtype) for name in names]
            hidden = torch.ops.eepass.translate(hidden, *parts)
        z = self.hf.base_model.norm(hidden).float()
        head = self.hf.get_output_embeddings().weight
        if forced:
            return z @ head.float().T
        hot = tensors["hot.ids"].to(hidden.device).long()
        logits = z.new_full((len(z), len(head)), torch.finfo(torch.float32).min)
        logits[:, hot] = z @ head[hot].float().T
        return logits

    def close(self) -> None:
        """Free what was captured."""
        for made in self._made.values():
            self._close(made)
        self._made.clear()

    def _make(self, how: How) -> Any:
        if self._launching is None:
            return self._make_engine(how)
        made = self.early.share(self._launching)
        if how.name == "dense":
            made.configure(dense=True)
        elif how.name == "forced":
            made.configure(_config(how, self.bench), force=how.layer)
        else:
            made.configure(STEPS.get(how.name) or _config(how, self.bench))
        return made

    def _make_engine(self, how: How) -> Any:
        early = self.early.share()
        if how.name == "dense":
            return early.dense
        engine: Any = early.configure(_config(how, self.bench))
        if how.name == "forced":
            forced: Any = _Forced(engine.exits, how.layer, self)
            return HostEngine(engine.decoder, forced, options=engine.options)
        return engine

    def _close(self, made: Any) -> None:
        if isinstance(made, EarlyExitModel):
            made.close()
            self.bench.empty_cache()

    def _on_device(self) -> ExitStack:
        """A context for all that runs: engines create tensors on its device."""
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        if self._launching is None:
            stack.enter_context(self.bench.device)
        return stack


class _Forced:
    """Replaces an engine's exits: every row exits after one layer with the LM head's token."""

    def __init__(self, exits: Any, layer: int, engine: Engine) -> None:
        self.thresholds, self.plan = {layer: 0.0}, exits.plan
        self._exits, self._engine, self._layer = exits, engine, layer

    def prepare(self, most: int) -> None:
        """Nothing of it is compiled."""

    def begin(self, rows: int, drafts: Tensor | None = None) -> RowState:
        return self._exits.begin(rows, drafts)

    def draft_from(self, hidden: Tensor, state: RowState, statistics: Any) -> RowState:
        return state

    def check(
        self, layer: int, hidden: Tensor, state: RowState, asked: Sequence[int], statistics: Any,
        choose: Any = None,
    ) -> tuple[ExitDecision, RowState]:  # fmt: skip
        best = self._engine.exit_logits(layer, hidden[0], forced=True).argmax(-1).tolist()
        # no draft is there that would take it for a feature
        z = hidden[0]
        return ExitDecision({n: best[n] for n in asked}, {n: z[n] for n in asked}), state


def _config(how: How, bench: Bench) -> ExitConfig:
    if how.name == "exact":
        # as users have it; tiny: with exits alone, always on
        if bench.options.tiny:
            return ExitConfig(speculate="off", adaptive=False)
        return ExitConfig(remember=False)
    early = ExitConfig().approximate(TARGET)
    if how.name == "never":
        # no probability is above it
        return replace(early, threshold=1.0)
    # the model it is compared with, which has no deeper layers, has nothing to catch up either
    return replace(early, kv="drop") if how.name == "forced" else early


def engine(bench: Bench, mode: str) -> Engine:
    """The twin in launch mode ``mode``, made once; ``Missing`` where the mode cannot run here."""
    if mode not in bench.engines:
        bench.engines[mode] = Engine(bench, mode, bench.twin, transformed(bench))
    return bench.engines[mode]


def transformed(bench: Bench) -> EarlyExitModel:
    """The twin transformed, once for all launch modes."""
    if bench.transformed is None:
        bench.transformed = transform(bench, bench.twin, artifact=True)
    return bench.transformed


def transform(bench: Bench, model: Any, artifact: bool) -> EarlyExitModel:
    """``model`` (the twin or a cut of it), traced and compiled for the device."""
    bench.require_device()
    given = bench.artifact if artifact else None
    if bench.on_cuda:
        return eepass.transform(model, given, max_length=bench.max_length, device="cuda")
    if not bench.options.tiny:
        return eepass.transform(model, given, max_length=bench.max_length)
    # the tiny model is not timed, and so need not be compiled
    with torch.no_grad():
        splits, report = split_for_rows(model, bench.max_length + 64, (1,), TINY_ROWS)
    return EarlyExitModel(splits, report, frozenset(), given, compiler=not_compiled)


def not_compiled(graph: Any, structure: str, examples: Any, *, logits: bool = False) -> Any:
    def run(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        found = graph(*inputs)
        return tuple(found) if isinstance(found, (tuple, list)) else (found,)

    return run


def or_missing(run: Callable[[], Any]) -> Any:
    """The result of ``run``, or what is missing for it; other errors are raised."""
    try:
        return run()
    except Missing as error:
        return {"missing": str(error)}
