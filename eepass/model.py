"""``eepass.transform``: a decoder in, the same decoder that stops early out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor

from eepass.checkpoints.artifact import Artifact, load_artifact, refuse_other_model
from eepass.checkpoints.quantized_weights import weights_to_read
from eepass.checkpoints.read_torchao import read_quantized
from eepass.config import ExitConfig
from eepass.errors import InputError, PassError
from eepass.lengths import refuse_longer, usual_length
from eepass.passes.report import PassReport
from eepass.plan import ExitPlan, ExitSegments
from eepass.planning import exit_tensors, make_plan, without_artifact, without_guesses
from eepass.runtime.decoder.costs import logit_noise, pass_seconds
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.stepwise import StepwiseDecoder
from eepass.runtime.drafting.drafts import Cascade, Draft, EagleTree, NgramDraft
from eepass.runtime.drafting.eagle import EagleDraft
from eepass.runtime.drafting.model_draft import ModelDraft
from eepass.runtime.drafting.planner import Mode, Planner
from eepass.runtime.engine.engine import Engine, Options
from eepass.runtime.engine.sequence import DecodedToken
from eepass.runtime.exits.exits import Exits
from eepass.runtime.exits.scheduler import PredictorSchedule
from eepass.runtime.sampling import Sampling
from eepass.runtime.statistics import Statistics
from eepass.segments import SplitDecoder

if TYPE_CHECKING:
    from eepass.step_model import StepModel

PREFILL_ROWS = 64
MAX_LENGTH = 1024
# two rows cost what four do, three more what eight do; what there is must be compiled
STEP_ROWS = (1, 4, 8, 16)
# trees are no larger: on a few CPU cores more rows cost more than they bring
TREE_ROWS = 8
ALWAYS_ACTIVE = 2
# where a transformed folder keeps its artefact
ARTIFACT = "artifact"
# the segments at the exits of a plan for some rows, and how the plan was asked for
SegmentsFor = Callable[[ExitConfig, ExitPlan, Mapping[str, Tensor], int], ExitSegments]


class EarlyExitModel:
    """A transformed decoder; ``generate`` is what ``transform`` promises.

    One model serves one sequence at a time. ``dense`` is the same runtime without exits and drafts,
    over the same weights and cache. ``folder``: where it was read from, if from one that ``eepass
    transform`` wrote; such a model comes with a ``compiler`` that has compiled and ``segments_for``
    that traces nothing.
    """

    def __init__(
        self,
        splits: Mapping[int, SplitDecoder],
        report: PassReport,
        stop: frozenset[int],
        artifact: Artifact | None,
        draft_model: EarlyExitModel | None = None,
        compiler: Any = None,
        segments_for: SegmentsFor | None = None,
        folder: Path | None = None,
    ) -> None:
        self.splits, self.report, self.stop, self.artifact = splits, report, stop, artifact
        self.draft_model, self.folder = draft_model, folder
        self.segments_for = segments_for or self._traced_segments
        self.compiler = compiler if compiler is not None else _cpu_compiler()
        if splits[1].stepwise:
            self.decoder: Decoder = StepwiseDecoder(splits[1], self.compiler)
        else:
            self.decoder = Decoder(splits, self.compiler)
        self.dense = Engine(self.decoder)
        self.engine = self.dense
        self.config: ExitConfig | None = None
        self.plan: ExitPlan | None = None
        self._costs: dict[int, float] = {}
        self._noise: float | None = None

    def configure(self, config: ExitConfig) -> Engine:
        """Use ``config`` from now on; returns its engine (statistics start at zero).

        Raises ``InputError`` where the artefact does not hold what the config asks for.
        """
        exits = schedule = None
        tensors: dict[str, Tensor] = {}
        config = without_guesses(config, self.splits[1])
        if self.artifact is None:
            config = without_artifact(config, self.draft_model is not None)
        else:
            exits, tensors = self._exits(config)
            if config.schedule:
                schedule = PredictorSchedule(exits.plan.ranking, ALWAYS_ACTIVE)
        draft = self._draft(config, tensors)
        modes = cast(tuple[Mode, ...], config.modes)
        options = Options(config.guarantee, config.kv, config.pending, modes)
        planner = partial(self._planner, draft) if len(modes) > 1 or draft is not None else None
        self.engine = Engine(
            self.decoder, exits, schedule, draft, options, planner, self._logit_noise
        )
        self.config = config
        return self.engine

    def _exits(self, config: ExitConfig) -> tuple[Exits, dict[str, Tensor]]:
        assert self.artifact is not None
        plan = make_plan(config, self.artifact, self.decoder.num_layers)
        tensors = exit_tensors(config.name, self.artifact, self.decoder.tensors, self.splits[1])
        every = {**self.decoder.tensors, **tensors}

        def segments(rows: int) -> ExitSegments:
            return self.segments_for(config, plan, every, rows)

        self.plan = plan
        # what fused predictors read; the others count on the plan
        device = tensors["hot.ids"].device
        tensors |= {name: t.to(device) for name, t in plan.threshold_tensors().items()}
        return Exits(self.decoder, plan, segments, tensors), tensors

    def _traced_segments(
        self, config: ExitConfig, plan: ExitPlan, tensors: Mapping[str, Tensor], rows: int
    ) -> ExitSegments:
        # tracing is what a model that was compiled ahead of time does without
        from eepass.passes.pipeline import exit_segments

        # not fused: on a CPU inductor's code for the segments is faster (benchmarks/exit_share.py)
        return exit_segments(self.splits[1], plan, tensors, rows)

    def _draft(self, config: ExitConfig, tensors: Mapping[str, Tensor]) -> Draft | None:
        source = config.speculate
        if source == "model":
            if self.draft_model is None:
                raise InputError("speculate='model': give transform a draft_model")
            return ModelDraft(self.draft_model.decoder)
        trained = "eagle.mix" in tensors
        if source == "ngram" or (source == "cascade" and not trained):
            return NgramDraft()
        if source in ("eagle", "cascade") or config.draft == "eagle":
            if not trained:
                raise InputError(
                    f"speculate={source!r}: the artefact has no draft head; run eepass train "
                    "--draft eagle, or ask for cascade or ngram"
                )
            trace = self.folder is None
            eagle = EagleTree(EagleDraft(tensors, self._embedding(), self.compiler, trace=trace))
            return Cascade(eagle) if source == "cascade" else eagle
        return None

    def _planner(self, draft: Draft | None) -> Planner:
        if not self._costs:
            rows = [size for size in self.decoder.buckets if size <= TREE_ROWS]
            self._costs = pass_seconds(self.decoder, rows, at=256)
        seconds = draft.call_seconds() if draft is not None else 0.0
        expected = draft.expected if draft is not None else 1.0
        return Planner(dict(self._costs), seconds, expected)

    def _logit_noise(self) -> float:
        if self._noise is None:
            # rows that go one by one are the same wherever they stand
            stepwise = self.splits[1].stepwise
            self._noise = 0.0 if stepwise else logit_noise(self.decoder)
        return self._noise

    def stream(
        self, ids: Sequence[int], max_new_tokens: int = 128, sampling: Sampling | None = None
    ) -> Iterator[DecodedToken]:
        """Tokens after ``ids``, each with the layers it took, as they are confirmed."""
        return self.engine.generate(list(ids), max_new_tokens, self.stop, sampling or Sampling())

    def generate(
        self,
        input_ids: Tensor | Sequence[int],
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
    ) -> Tensor:
        """Continuation of one prompt: ids [1, T] (or T) -> [1, T + new], end token included.

        Greedy without ``sampling``.

        Raises ``InputError`` for several prompts at once, and for a prompt and an answer that do
        not fit together.
        """
        ids = torch.as_tensor(input_ids)
        if ids.ndim == 2 and ids.shape[0] != 1:
            raise InputError(f"one prompt at a time, not {ids.shape[0]}")
        prompt = ids.reshape(-1).tolist()
        if len(prompt) + max_new_tokens > self.decoder.longest:
            raise InputError(
                f"{len(prompt)} tokens of prompt and up to {max_new_tokens} of answer, and room "
                f"for {self.decoder.longest} together: {self.decoder.remedy}, or ask for fewer "
                "new tokens"
            )
        with torch.no_grad():
            new = [step.token for step in self.stream(prompt, max_new_tokens, sampling)]
        return torch.tensor([[*prompt, *new]])

    @property
    def statistics(self) -> Statistics:
        return self.engine.statistics

    @property
    def artifact_folder(self) -> Path | None:
        return None if self.folder is None else (self.folder / ARTIFACT).resolve()

    def _embedding(self) -> Tensor:
        for role in self.splits[1].embed.inputs:
            if role.kind == "parameter" and self.decoder.tensors[role.name].ndim == 2:
                return self.decoder.tensors[role.name]
        raise InputError("the draft head needs the token embedding, and none was found")


@overload
def transform(
    model: Any,
    artifact: str | Path | Artifact | None = None,
    config: ExitConfig | None = None,
    max_length: int | None = None,
    stop: frozenset[int] = frozenset(),
    dump: Path | None = None,
    draft_model: EarlyExitModel | None = None,
) -> EarlyExitModel: ...
@overload
def transform(
    model: Any,
    artifact: str | Path | Artifact | None = None,
    config: ExitConfig | None = None,
    max_length: int | None = None,
    stop: frozenset[int] = frozenset(),
    *,
    device: str | torch.device,
    launch: str = "auto",
    debug: bool = False,
) -> StepModel: ...
@overload
def transform(
    model: Any,
    artifact: str | Path | Artifact | None = None,
    config: ExitConfig | None = None,
    max_length: int | None = None,
    stop: frozenset[int] = frozenset(),
    *,
    launch: str,
    debug: bool = False,
) -> StepModel: ...
def transform(
    model: Any,
    artifact: str | Path | Artifact | None = None,
    config: ExitConfig | None = None,
    max_length: int | None = None,
    stop: frozenset[int] = frozenset(),
    dump: Path | None = None,
    draft_model: EarlyExitModel | None = None,
    *,
    device: str | torch.device | None = None,
    launch: str | None = None,
    debug: bool = False,
) -> EarlyExitModel | StepModel:
    """Transform a Hugging Face causal LM (on the CPU, fp32 or bf16, eval mode).

    Layers that torchao quantised are replaced in ``model`` by ones that say the same and can be
    compiled; exact then means: as the quantised model says it.

    One that is transformed already (``eepass.load`` of a folder ``eepass transform`` wrote) is
    configured anew over the same code, weights and cache; it has its own artefact or none.
    ``artifact``: a folder written by ``eepass.train``; without one no token leaves early, and
    drafts come from the prompt. ``max_length``: prompt and answer together, 1024 if not given, and
    no more than the model knows positions for.
    ``stop``: end tokens. ``dump``: folder for the graph before and after each pass.
    ``draft_model``: a small transformed model of the same vocabulary, for ``speculate="model"``.
    With ``device`` "cuda", or a ``launch`` mode on either device, decode steps run by themselves:
    the result is a ``StepModel``, approximate unless ``config`` says otherwise (dense without an
    artefact). ``launch``: "device" (one CUDA graph with IF nodes), "predicated" (one without),
    "host" (segment by segment), "interpret" (on a CPU, mistrusting every launch), "auto" (the best
    there is). ``debug``: assert at each step that nothing has moved since it was captured.
    Raises ``InputError`` for a model or artefact that does not fit, with the reason;
    ``EngineError`` for a device or launch mode that is not to be had.
    """
    steps = device is not None or launch is not None
    if steps and (dump is not None or draft_model is not None):
        raise InputError("dump and draft_model go with neither device= nor launch=")
    if isinstance(model, EarlyExitModel):
        if steps:
            raise InputError("device= and launch= want the original model, not a transformed one")
        if dump is not None:
            raise InputError(f"the passes are done in {model.folder}: give the original model")
        return _again(model, artifact, config, max_length, draft_model)
    if model.training:
        raise InputError("the model is in training mode: call model.eval() first")
    read_quantized(model)
    loaded = load_artifact(Path(artifact)) if isinstance(artifact, (str, Path)) else artifact
    if loaded is not None:
        refuse_other_model(loaded, model, "artifact")
    if steps:
        from eepass.step_model import step_model

        return step_model(
            model, loaded, config, max_length, stop, device or "cpu", launch or "auto", debug
        )
    splits, report = split_model(model, max_length, STEP_ROWS, dump)
    with torch.no_grad():
        transformed = EarlyExitModel(splits, report, stop, loaded, draft_model)
        transformed.configure(config or ExitConfig())
    return transformed


def split_model(
    model: Any, max_length: int | None, rows: Sequence[int], dump: Path | None = None
) -> tuple[dict[int, SplitDecoder], PassReport]:
    """``model`` split for passes of ``rows`` and for prompts, its weights laid out to be read."""
    from eepass.passes.pipeline import split_for_rows
    from eepass.runtime.cache.weight_memory import settle_weights

    length = max_length or usual_length(model, MAX_LENGTH)
    refuse_longer(model, length, f"max_length={length}")
    slots = -(-(length + PREFILL_ROWS) // 64) * 64
    with torch.no_grad():
        settle_weights(weights_to_read(model))
        try:
            return split_for_rows(model, slots, rows, PREFILL_ROWS, dump)
        except PassError as error:
            raise InputError(f"{type(model).__name__} cannot be transformed: {error}") from error


def _again(
    model: EarlyExitModel,
    artifact: str | Path | Artifact | None,
    config: ExitConfig | None,
    max_length: int | None,
    draft_model: EarlyExitModel | None,
) -> EarlyExitModel:
    room = model.decoder.longest
    if max_length is not None and max_length > room:
        raise InputError(
            f"max_length={max_length}: this was transformed for texts of {room} tokens; shorten "
            "the prompt, ask for fewer new tokens, or transform the original for longer ones"
        )
    own: Any = model.artifact
    if isinstance(artifact, (str, Path)):
        own = artifact if Path(artifact).resolve() == model.artifact_folder else None
    other = copy(model)
    if artifact is None:
        other.artifact = None
    elif artifact is not own:
        raise InputError(
            f"{artifact}: a transformed model has its own artefact, compiled in; "
            "transform the original one with this artefact"
        )
    other.draft_model = draft_model
    with torch.no_grad():
        other.configure(config or ExitConfig())
    return other


def _cpu_compiler() -> Any:
    # imports all of inductor, which a model that was compiled ahead of time does without
    from eepass.codegen.lower_cpu import CpuCompiler

    return CpuCompiler()
