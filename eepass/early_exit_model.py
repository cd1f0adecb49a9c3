"""A transformed decoder: what it was made of, how it is to decode, and what decodes for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eepass.checkpoints.artifact import Artifact
from eepass.codegen.cpu.native import release_threads
from eepass.codegen.kept_code import KeepingCompiler
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.executors import CapturedSteps, ExitParts, Measured, drafts_in_a_step, engine_for
from eepass.kept.acceptance import KeptAcceptance
from eepass.kept.costs import KeptCosts
from eepass.kept.keys import environment, tensors_key
from eepass.kept.splits import kept_entries, kept_exits
from eepass.long.selecting import selection_for
from eepass.passes.report import PassReport
from eepass.plan import ExitPlan, ExitSegments
from eepass.planning import (
    draft_tensors,
    exit_tensors,
    fits_captured_steps,
    fits_exiting_steps,
    fits_speculative_steps,
    settle,
)
from eepass.reading import number
from eepass.runtime.context.selection import Selection
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.stepwise import StepwiseDecoder
from eepass.runtime.drafting.cascade import Head
from eepass.runtime.engine.engine import Engine
from eepass.runtime.engine.loop import EngineLoop
from eepass.runtime.engine.sequence import DecodedToken
from eepass.runtime.sampling import GREEDY, Sampling
from eepass.runtime.statistics import Statistics
from eepass.runtime.step.exit_points import with_thresholds
from eepass.runtime.step.launching import Launching, LaunchReport
from eepass.segments import SplitDecoder

# where a transformed folder keeps its artefact
ARTIFACT = "artifact"
# the segments at the exits of a plan for a number of rows
SegmentsFor = Callable[[ExitConfig, ExitPlan, Mapping[str, Tensor], int], ExitSegments]


class EarlyExitModel:
    """A transformed decoder; ``configure`` says how it decodes, ``launch_report`` how it runs.

    It decodes through its ``engine``: an ``Engine``, pass by pass from the host, or
    ``CapturedSteps``, where ``transform`` was given ``device=`` or ``launch=`` and the config can
    run as such; the config says what the tokens are. Engines, compiled code and captured steps are
    made when they are first needed. One model serves one sequence at a time. ``folder``: where it
    was read from, if from one that ``eepass transform`` wrote; such a model comes with a
    ``compiler`` that has compiled and ``segments_for`` that traces nothing.
    """

    def __init__(
        self,
        splits: Mapping[int, SplitDecoder],
        report: PassReport,
        stop: frozenset[int],
        artifact: Artifact | None,
        compiler: Any = None,
        segments_for: SegmentsFor | None = None,
        folder: Path | None = None,
        launching: Launching | None = None,
        debug: bool = False,
        kept: str = "",
    ) -> None:
        """``launching``: how captured steps are launched, None for no such steps. ``debug``: assert
        at each step that nothing has moved since it was captured. ``kept``: the key under which
        the splits are kept in the user's cache, "" where they are not."""
        self.splits, self.report, self.stop, self.artifact = splits, report, stop, artifact
        self.folder = folder
        # of another model, for ``speculate="model"``
        self.draft: Head | None = None
        self.launching, self.debug = launching, debug
        self.segments_for = segments_for or partial(_traced_segments, splits[1], kept)
        self._compiler = compiler_of = cache(lambda: compiler or _cpu_compiler())

        def compile(*args: Any, **options: Any) -> Any:
            return compiler_of()(*args, **options)

        def captured(*args: Any) -> Any:
            made = compiler_of()
            return getattr(made, "captured", made)(*args)

        if splits[1].stepwise:
            self.decoder: Decoder = StepwiseDecoder(splits[1], compile)
        else:
            spans = hasattr(compiler, "captured")
            wide = getattr(compiler, "wide", None)
            self.decoder = Decoder(splits, compile, captured, spans, wide)
        self._measured, self._kept = Measured(self.decoder, KeptCosts(kept)), kept
        self._dense: Engine | CapturedSteps | None = None
        self._engine: Engine | CapturedSteps | None = None
        self._loop: EngineLoop | None = None
        self.config: ExitConfig | None = None
        self.plan: ExitPlan | None = None
        self._is_dense = True
        self._force: int | None = None
        # whether captured steps verify draft tokens
        self._speculates = False
        self._selection: Selection | None = None

    def configure(
        self, config: ExitConfig | None = None, *, dense: bool = False, force: int | None = None
    ) -> Engine | CapturedSteps:
        """Decode so from here on; returns the engine, its statistics at zero.

        ``config``: ``ExitConfig()``, exact, unless given. ``dense``: no exits and no drafts.
        ``force``: every token exits after so many layers with the LM head's argmax there; wants
        captured steps and an approximate config. Raises ``InputError`` for what does not go
        together or the artefact does not hold; what does not fit the device is an ``EngineError``
        when it is first needed.
        """
        self.record(config, dense=dense, force=force)
        return self.engine

    def record(
        self, config: ExitConfig | None = None, *, dense: bool = False, force: int | None = None
    ) -> None:
        """As ``configure``; the engine is made when it is first asked for."""
        config, plan = ExitConfig() if config is None else config, None
        # asked for by name: where there is no artefact it is what the default comes to as well
        speculates = fits_speculative_steps(config) and not dense and force is None
        layers = self.decoder.num_layers
        if force is not None:
            if dense or not 1 <= force <= layers:
                raise InputError(f"force={force}: from 1 to {layers}, and not dense")
            if config.guarantee == "exact" or self.launching is None:
                raise InputError(
                    f"force={force}: wants an approximate config, and a model transformed with "
                    "launch= or device="
                )
        elif not dense:
            config, plan = settle(config, self.artifact, self.splits[1], self.draft is not None)
        selection = None
        if not dense and force is None:
            drafts = self.launching is None
            selection = selection_for(self.decoder, config, self.folder, drafts, self.report)
        if isinstance(self._engine, CapturedSteps):
            self._engine.close()
        self._engine, self.config, self.plan = None, config, plan
        self._is_dense, self._force = dense, force
        self._speculates = speculates and fits_speculative_steps(config)
        # biases by slot would be wrong for a tree: forced exits, which no plan settles, have none
        if not dense and (force is None or not self.splits[1].counts_slots):
            self._speculates = self._speculates or fits_exiting_steps(config)
        self._selection = selection

    @property
    def has_exits(self) -> bool:
        """Whether there is an artefact with exits, and not with a draft head alone."""
        return self.artifact is not None and bool(self.artifact.presets)

    @property
    def engine(self) -> Engine | CapturedSteps:
        """What decodes as configured; dense where nothing was."""
        if self._engine is None:
            config = self.config or ExitConfig()
            self._engine = self._make_engine(config, self._is_dense, self._force, self._speculates)
        return self._engine

    @property
    def loop(self) -> EngineLoop:
        """Decodes requests of any thread together, as configured. Raises ``InputError`` for a model
        that decodes by captured steps."""
        engine = self.engine
        if isinstance(engine, CapturedSteps):
            raise InputError("requests go pass by pass: transform without device= and launch=")
        if self._loop is None or self._loop.engine is not engine:
            # of whoever loaded the model
            release_threads()
            self._loop = EngineLoop(engine, release_threads)
        return self._loop

    @property
    def dense(self) -> Engine | CapturedSteps:
        """The same without exits and drafts, over the same weights and cache."""
        if self._dense is None:
            self._dense = self._make_engine(ExitConfig(), dense=True, force=None)
        return self._dense

    def host_engine(self, config: ExitConfig | None = None) -> Engine:
        """The engine configured by ``config``, or the dense one: for what looks at single passes.

        Raises ``InputError`` for a model that decodes by captured steps.
        """
        engine = self.dense if config is None else self.configure(config)
        if isinstance(engine, CapturedSteps):
            raise InputError("this goes pass by pass: transform without device= and launch=")
        return engine

    def _make_engine(
        self, config: ExitConfig, dense: bool, force: int | None, speculates: bool = False
    ) -> Engine | CapturedSteps:
        decoder, compiler = self.decoder, self._compiler
        plain, trace = dense or force is not None or not config.exits, self.folder is None

        def packs() -> bool:
            missing = getattr(compiler(), "kernels_missing", "not lowered")
            return decoder.device.type == "cpu" and not missing

        with torch.no_grad(), making_tensors_on(decoder.device):
            fits = dense or force is not None or speculates or fits_captured_steps(config)
            if self.launching is not None and fits:
                parts = None if plain else self.exit_parts(config)
                drafts: dict[str, Any] = {}
                if speculates:
                    head = self._draft_head(parts)
                    drafts["drafts"] = drafts_in_a_step(decoder, config, head, trace, packs)
                return CapturedSteps(
                    decoder, config, parts, self.launching, self.stop, force,
                    lambda: getattr(compiler(), "fuse", None), self.debug, **drafts,
                )  # fmt: skip
            if dense:
                return Engine(decoder)
            parts = self.exit_parts(config)
            return engine_for(
                self._measured, config, parts, self._draft_head(parts), self.draft, trace, packs,
                *self._expected_drafts(), self._selection,
            )  # fmt: skip

    def _draft_head(self, parts: ExitParts | None) -> Mapping[str, Tensor]:
        """The trained draft head's tensors, which exits have among theirs."""
        if parts is not None:
            return parts.tensors
        if self.artifact is None:
            return {}
        return draft_tensors(self.artifact, self.decoder.tensors, self.splits[1])

    def _expected_drafts(self) -> tuple[KeptAcceptance, list[float]]:
        """What is known of draft tokens beforehand: as learned by earlier processes, and how often
        the artefact's draft head was right on held-out answers."""
        if self.artifact is None:
            return KeptAcceptance(self._kept), []
        report, hits = self.artifact.report.get("draft_head") or {}, list[float]()
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            # a report is for people: one of another form says nothing here
            hits = [min(max(number(step["top1"]), 0.0), 1.0) for step in report["hits"]]
        trained = tensors_key(self.artifact.tensors, report)
        return KeptAcceptance(self._kept, trained), hits

    def exit_parts(self, config: ExitConfig) -> ExitParts | None:
        """The exits of the plan, as ``config`` set it up; None where there is no artefact."""
        plan, segments_for, own = self.plan, self.segments_for, self.decoder.tensors
        if plan is None or self.artifact is None:
            return None
        trained = exit_tensors(config.name, self.artifact, own, self.splits[1])
        tensors = with_thresholds(trained, plan)
        every = {**own, **tensors}
        return ExitParts(plan, tensors, lambda rows: segments_for(config, plan, every, rows))

    def stream(
        self, ids: Sequence[int], max_new_tokens: int = 128, sampling: Sampling | None = None
    ) -> Iterator[DecodedToken]:
        """Tokens after ``ids``, each with the layers it took, as they are confirmed."""
        engine = self.engine
        tokens = engine.generate(list(ids), max_new_tokens, self.stop, sampling or GREEDY)
        return tokens if isinstance(engine, CapturedSteps) else self._without_gradients(tokens)

    def _without_gradients(self, tokens: Iterator[DecodedToken]) -> Iterator[DecodedToken]:
        stream: Any = tokens
        device = self.decoder.device
        try:
            while True:
                # no mode is held over a yield: it would be the caller's as well
                with torch.no_grad(), making_tensors_on(device):
                    token = next(stream, None)
                if token is None:
                    return
                yield token
        finally:
            with torch.no_grad(), making_tensors_on(device):
                stream.close()

    def generate(
        self,
        input_ids: Tensor | Sequence[int] | Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
    ) -> Tensor:
        """Continuation of one prompt: ids [1, T] (or T) -> [1, T + new], end token included.

        Greedy without ``sampling``.

        Raises ``InputError`` for several prompts at once, and for a prompt and an answer that do
        not fit together; ``EngineError`` where the device fails.
        """
        ids = torch.as_tensor(input_ids)
        if ids.ndim == 2 and ids.shape[0] != 1:
            raise InputError(f"one prompt at a time, not {ids.shape[0]}")
        prompt = ids.reshape(-1).tolist()
        if len(prompt) + max_new_tokens > self.decoder.max_sequence_length:
            raise InputError(
                f"{len(prompt)} tokens of prompt and up to {max_new_tokens} of answer, and room "
                f"for {self.decoder.max_sequence_length} together: {self.decoder.length_hint}, or "
                "ask for fewer new tokens"
            )
        new = [step.token for step in self.stream(prompt, max_new_tokens, sampling)]
        return torch.tensor([[*prompt, *new]])

    @property
    def statistics(self) -> Statistics:
        return self.engine.statistics

    @property
    def launch_report(self) -> LaunchReport:
        """How decode steps are launched, and what they cost besides; captures them if need be."""
        if isinstance(self.engine, CapturedSteps):
            return self.engine.launch_report
        reason = "what is weighed by its costs, and other exact exits, go layer by layer"
        if self.launching is None:
            reason = "neither device= nor launch= was given: layer by layer, from the host"
        return LaunchReport("engine", reason, (), self.decoder.buckets, 0, 0.0, ())

    def close(self) -> None:
        """Give back what was captured; it is captured again when it is next needed."""
        for engine in (self._engine, self._dense):
            if isinstance(engine, CapturedSteps):
                engine.close()

    def share(self, launching: Launching | None = None) -> EarlyExitModel:
        """Another model over the same code, weights and cache, to be configured by itself; its
        steps are launched as ``launching`` says, or go through the engine."""
        other = copy(self)
        other.launching, other._engine, other._dense = launching, None, None
        other._loop = None
        other.record(dense=True)
        return other

    @property
    def compiler(self) -> Any:
        return self._compiler()

    @property
    def artifact_folder(self) -> Path | None:
        return None if self.folder is None else (self.folder / ARTIFACT).resolve()


def making_tensors_on(device: torch.device) -> AbstractContextManager[Any]:
    """Within, tensors are made on ``device``; on a CPU they are, without a mode to slow it down."""
    return nullcontext() if device.type == "cpu" else torch.device(device)


def _traced_segments(
    split: SplitDecoder,
    kept: str,
    config: ExitConfig,
    plan: ExitPlan,
    tensors: Mapping[str, Tensor],
    rows: int,
) -> ExitSegments:
    def trace() -> ExitSegments:
        # tracing is what a model that was compiled ahead of time, or before, does without
        from eepass.passes.pipeline import exit_segments

        # not fused: on a CPU inductor's code for the segments is faster (benchmarks/exit_share.py)
        return exit_segments(split, plan, tensors, rows)

    return kept_exits(kept, plan, tensors, rows, trace)


def _cpu_compiler() -> Any:
    def through_inductor() -> Any:
        # imports all of inductor, which a model whose code is kept does without
        from eepass.codegen.lower_cpu import CpuCompiler

        return CpuCompiler()

    return KeepingCompiler(kept_entries(), environment(), through_inductor)
