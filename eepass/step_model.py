"""A transformed decoder whose decode step runs by itself: on a GPU as one graph, or as asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eepass.checkpoints.artifact import Artifact
from eepass.config import ExitConfig
from eepass.errors import EngineError, InputError
from eepass.lengths import usual_length
from eepass.model import ALWAYS_ACTIVE, MAX_LENGTH, EarlyExitModel, split_model
from eepass.passes.report import PassReport
from eepass.plan import ExitPlan, FusedExits
from eepass.planning import exit_tensors, make_plan, without_artifact
from eepass.runtime.engine.engine import Engine
from eepass.runtime.engine.sequence import DecodedToken
from eepass.runtime.sampling import Sampling
from eepass.runtime.statistics import Statistics
from eepass.runtime.step.engine import StepEngine
from eepass.runtime.step.exit_points import ExitPoints, with_thresholds
from eepass.runtime.step.launching import (
    Launching,
    LaunchReport,
    choose,
    make_engine,
    require_device,
    require_room,
    running_out,
)
from eepass.runtime.step.layout import StepOptions

# what segments behind exits are made for on a CPU, where each count is compiled in seconds
CPU_ROWS = (1, 4, 8, 16)
CUDA_ROWS = (1, 2, 4, 8, 16, 32)


class StepModel:
    """A transformed decoder; ``configure`` says how it decodes, ``launch_report`` how it runs.

    One model serves one sequence at a time. Steps are approximate: a token that leaves is final.
    ``guarantee="exact"``, several tokens a pass and drafts from a trained head go through the
    engine, layer by layer from the host (``launch_report.mode`` is ``"engine"`` then).
    """

    def __init__(self, model: EarlyExitModel, launching: Launching, debug: bool = False) -> None:
        """``debug``: assert at each step that nothing has moved since it was captured."""
        self.model, self.launching, self.debug = model, launching, debug
        self.decoder, self.splits, self.stop = model.decoder, model.splits, model.stop
        self.artifact = model.artifact
        self.config: ExitConfig | None = None
        self.plan: ExitPlan | None = None
        self.engine: StepEngine | Engine = model.dense
        self._report: Callable[[], LaunchReport] | None = None
        self._made: StepEngine | None = None
        self._notes: tuple[str, ...] = ()
        # what the engine was made for: a step that draws is another one
        self._draws = False
        self._asked: dict[str, Any] = {}
        self._dense: StepEngine | None = None

    def configure(
        self,
        config: ExitConfig | None = None,
        *,
        dense: bool = False,
        force: int | None = None,
    ) -> StepEngine | Engine:
        """Decode so from now on; returns the engine, its statistics at zero.

        ``config``: approximate early exit unless given, or dense without an artefact. ``dense``: no
        exits. ``force``: every token leaves after so many layers and says what the head says there;
        deferred tokens catch up as always. Raises ``InputError`` for what does not go together or
        the artefact does not hold, ``EngineError`` for what does not fit the device.
        """
        dense = dense or (config is None and force is None and self.artifact is None)
        self._asked = {"dense": dense, "force": force}
        config = ExitConfig().approximate() if config is None else config
        # without exits and drafts an exact answer is a dense one
        dense = dense or (not config.exits and config.speculate in ("off", "lens"))
        layers = self.decoder.num_layers
        if force is not None and (dense or not 1 <= force <= layers):
            raise InputError(f"force={force}: from 1 to {layers}, and not dense")
        if not dense and force is None and _for_the_engine(config):
            return self._use_engine(config)
        self._drop()
        exits = None
        self._notes = ()
        options = self._options(config)
        if not dense and force is None:
            if self.artifact is None:
                without_artifact(config, False)
            exits, options = self._exits(config, options)
        options = replace(options, force=force, draws=self._draws)
        self._made, self._report = self._make(exits, options)
        self.engine, self.config = self._made, config
        return self.engine

    @property
    def dense(self) -> StepEngine:
        """The same steps without exits, over the same weights and cache."""
        if self._dense is None:
            self._dense, _ = self._make(None, self._options(ExitConfig().approximate()))
        return self._dense

    def _drawing(self) -> StepEngine:
        """The engine made anew, to draw: greedy steps need not sort logits."""
        self._draws = True
        asked = {"dense": True} if self.engine is self._dense else self._asked
        try:
            engine = self.configure(self.config, **asked)
        finally:
            self._draws = False
        assert isinstance(engine, StepEngine)
        return engine

    def _make(
        self, exits: ExitPoints | None, options: StepOptions
    ) -> tuple[StepEngine, Callable[[], LaunchReport]]:
        fuse = getattr(self.model.compiler, "fuse", None)
        return make_engine(self.decoder, exits, options, self.launching, fuse, self.debug)

    @property
    def launch_report(self) -> LaunchReport:
        """How steps are launched, and what they cost besides."""
        if self._report is None:
            reason = "exact answers and several tokens a pass go layer by layer"
            return LaunchReport("engine", reason, (), self.decoder.buckets, 0, 0.0, ())
        report = self._report()
        report.missing = (*report.missing, *self._notes)
        return report

    @property
    def statistics(self) -> Statistics:
        return self.engine.statistics

    def stream(
        self, ids: Sequence[int], max_new_tokens: int = 128, sampling: Sampling | None = None
    ) -> Iterator[DecodedToken]:
        """Tokens after ``ids``, each with the layers it took."""
        engine, sampling = self.engine, sampling or Sampling()
        if isinstance(engine, StepEngine):
            if not sampling.greedy and not engine.draws:
                engine = self._drawing()
            return engine.generate(list(ids), max_new_tokens, sampling)
        return self._through_engine(engine, list(ids), max_new_tokens, sampling)

    def generate(
        self,
        input_ids: Tensor | Sequence[int] | Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
    ) -> Tensor:
        """Continuation of one prompt: ids [1, T] (or T) -> [1, T + new], end token included.

        Raises ``InputError`` for several prompts at once, ``EngineError`` for what does not fit and
        where the device fails.
        """
        ids = torch.as_tensor(input_ids)
        if ids.ndim == 2 and ids.shape[0] != 1:
            raise InputError(f"one prompt at a time, not {ids.shape[0]}")
        prompt = ids.reshape(-1).tolist()
        new = [step.token for step in self.stream(prompt, max_new_tokens, sampling)]
        return torch.tensor([[*prompt, *new]])

    def close(self) -> None:
        """Give back what was captured; ``configure`` makes it anew."""
        self._drop()
        if self._dense is not None:
            self._dense.close()
            self._dense = None

    def _drop(self) -> None:
        if self._made is not None:
            self._made.close()
        self._made, self.engine, self._report = None, self.model.dense, None

    def on_device(self) -> AbstractContextManager[Any]:
        """Within, tensors are made on the model's device."""
        return torch.device(self.decoder.device)

    def _options(self, config: ExitConfig) -> StepOptions:
        rows = CPU_ROWS if self.decoder.device.type == "cpu" else CUDA_ROWS
        buckets = tuple(n for n in rows if n in self.splits)
        return StepOptions(
            kv=config.kv, pending=config.pending, buckets=buckets, stop=tuple(sorted(self.stop))
        )

    def _exits(self, config: ExitConfig, options: StepOptions) -> tuple[ExitPoints, StepOptions]:
        assert self.artifact is not None
        decoder = self.decoder
        plan = make_plan(config, self.artifact, decoder.num_layers)
        tensors = exit_tensors(config.name, self.artifact, decoder.tensors, self.splits[1])
        tensors = with_thresholds(tensors, plan)
        every = {**decoder.tensors, **tensors}
        with torch.no_grad(), self.on_device():
            segments = self.model.segments_for(config, plan, every, 1)
            plain = ExitPoints(decoder, plan, segments, tensors)
            # kernels keep logits to themselves, and drawing needs them
            kernels_too = decoder.device.type == "cuda" and not self._draws
            fused = self._fused(plan, every) if kernels_too else None
            exits = plain
            if fused is not None:
                kernels = ExitPoints(decoder, plan, segments, tensors, fused)
                if reason := kernels.differ_from(plain):
                    self._notes = (f"kernels of exit points: {reason}",)
                else:
                    exits = kernels
        self.plan = plan
        if config.schedule:
            options = replace(options, ranking=plan.ranking, always=ALWAYS_ACTIVE)
        return exits, options

    def _fused(self, plan: ExitPlan, tensors: dict[str, Tensor]) -> FusedExits | None:
        """Exit points as kernels, where the head is one that they know."""
        from eepass.passes.pipeline import fused_exits

        report = PassReport()
        fused = fused_exits(self.splits[1], plan, tensors, report)
        if fused is None:
            self._notes = tuple(f"kernels of exit points: {reason}" for _, reason in report.skipped)
        return fused

    def _use_engine(self, config: ExitConfig) -> Engine:
        self._drop()
        with torch.no_grad(), self.on_device():
            engine = self.model.configure(config)
        self.engine, self.config, self.plan = engine, config, self.model.plan
        return engine

    def _through_engine(
        self, engine: Engine, ids: list[int], count: int, sampling: Sampling
    ) -> Iterator[DecodedToken]:
        stream: Any = engine.generate(ids, count, self.stop, sampling)
        try:
            while True:
                # no mode is held over a yield: it would be the caller's as well
                with torch.no_grad(), self.on_device():
                    step = next(stream, None)
                if step is None:
                    return
                yield step
        finally:
            with torch.no_grad(), self.on_device():
                stream.close()


def step_model(
    model: Any,
    artifact: Artifact | None,
    config: ExitConfig | None,
    max_length: int | None,
    stop: frozenset[int],
    device: str | torch.device,
    launch: str,
    debug: bool = False,
) -> StepModel:
    """``model`` transformed for steps on ``device``, moved there if it is not.

    Raises ``EngineError`` for a device, dtype or launch mode that is not to be had here, or too
    little memory, ``InputError`` for a model that does not fit.
    """
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device={str(device)!r}: must be cpu or cuda") from error
    parameter = next(model.parameters())
    require_device(target, parameter.dtype)
    launching = choose(launch, target)
    length = max_length or usual_length(model, MAX_LENGTH)
    require_room(target, _bytes_needed(model, length, target))
    cuda = target.type == "cuda"
    with running_out("moving the model and tracing it"):
        model.to(target)
        early = _on(model, artifact, length, stop, cuda)
    made = StepModel(early, launching, debug)
    made.configure(config)
    return made


def _on(
    model: Any, artifact: Artifact | None, length: int, stop: frozenset[int], cuda: bool
) -> EarlyExitModel:
    with torch.device(next(model.parameters()).device):
        splits, report = split_model(model, length, CUDA_ROWS if cuda else CPU_ROWS)
        if splits[1].stepwise:
            raise InputError(
                f"{type(model).__name__} has recurrent layers: leave device= and launch= out"
            )
    compiler = _cuda_compiler() if cuda else None
    with torch.no_grad():
        return EarlyExitModel(splits, report, stop, artifact, compiler=compiler)


def _for_the_engine(config: ExitConfig) -> bool:
    several = config.speculate not in ("off", "lens")
    return config.guarantee == "exact" or several or config.draft == "eagle"


def _bytes_needed(model: Any, length: int, device: torch.device) -> int:
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = next(model.parameters()).element_size()
    # twice: a trace needs a cache of its own for a while
    cache = 2 * 2 * config.num_hidden_layers * heads * width * size * (length + 64)
    here = next(model.parameters()).device.type == device.type
    return int(cache) if here else int(cache) + sum(p.nbytes for p in model.parameters())


def _cuda_compiler() -> Any:
    from eepass.codegen.lower_cuda import CudaCompiler

    try:
        from eepass.codegen.kernels.register import register_kernels
    except ImportError as error:
        raise EngineError(f"{error}: pip install 'eepass[gpu]'") from error
    # logits and exit points are kernels
    register_kernels()
    return CudaCompiler()
