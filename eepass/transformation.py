"""``eepass.transform``: a decoder in, the same decoder that stops early out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eepass.artifact import Artifact, load_artifact, refuse_other_model
from eepass.codegen.lower_cpu import CpuCompiler
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.passes.insert_predictors import insert_predictors
from eepass.passes.pipeline import split_for_rows
from eepass.passes.report import PassError, PassReport
from eepass.plan import ExitPieces, ExitPlan, ExitPoint, SplitDecoder
from eepass.runtime.decoder import Decoder
from eepass.runtime.eagle import EagleDraft
from eepass.runtime.engine import Engine, Step
from eepass.runtime.exits import Exits
from eepass.runtime.scheduler import PredictorSchedule
from eepass.runtime.statistics import Statistics
from eepass.runtime.weight_memory import settle_weights

PREFILL_ROWS = 64
STEP_ROWS = (1, 2, 4, 8)
ALWAYS_ACTIVE = 2


class EarlyExitModel:
    """A transformed decoder; ``generate`` is what ``transform`` promises.

    One model serves one sequence at a time. ``dense`` is the same runtime without exits, over the
    same weights and cache.
    """

    def __init__(
        self,
        splits: Mapping[int, SplitDecoder],
        report: PassReport,
        stop: frozenset[int],
        artifact: Artifact | None,
    ) -> None:
        self.splits, self.report, self.stop, self.artifact = splits, report, stop, artifact
        self.compiler = CpuCompiler()
        self.decoder = Decoder(splits, self.compiler)
        self.dense = Engine(self.decoder)
        self.engine = self.dense
        self.config: ExitConfig | None = None
        self.plan: ExitPlan | None = None
        self.pieces: ExitPieces | None = None

    def configure(self, config: ExitConfig) -> Engine:
        """Use ``config`` from now on; returns its engine (statistics start at zero).

        Raises ``InputError`` where the artefact does not hold what the config asks for.
        """
        if self.artifact is None:
            raise InputError("early exit needs an artefact: run eepass train, or ask for dense")
        head = self.splits[1].head
        part = self.artifact.presets[config.name]
        self.plan = make_plan(config, self.artifact, self.decoder.num_layers)
        tensors = exit_tensors(config.name, self.artifact, self.decoder.tensors, head.weight)
        self.pieces = insert_predictors(
            self.splits[1], self.plan, {**self.decoder.tensors, **tensors}, PassReport()
        )
        draft = None
        if config.draft == "eagle":
            embedding = self._embedding()
            draft = EagleDraft(tensors, embedding, part.draft_tokens, self.compiler)
        exits = Exits(self.decoder, self.plan, self.pieces, tensors, draft)
        schedule = PredictorSchedule(self.plan.ranking, ALWAYS_ACTIVE) if config.schedule else None
        self.engine = Engine(self.decoder, exits, schedule, config.kv, config.pending)
        self.config = config
        return self.engine

    def stream(self, ids: Sequence[int], max_new_tokens: int = 128) -> Iterator[Step]:
        """Tokens after ``ids``, each with the layer it left at, as they come."""
        return self.engine.generate(list(ids), max_new_tokens, self.stop)

    def generate(self, input_ids: Tensor | Sequence[int], max_new_tokens: int = 128) -> Tensor:
        """Greedy continuation of one prompt: ids [1, T] (or T) -> [1, T + new], end token included.

        Raises ``InputError`` for several prompts at once, ``EngineError`` for what does not fit.
        """
        ids = torch.as_tensor(input_ids)
        if ids.ndim == 2 and ids.shape[0] != 1:
            raise InputError(f"one prompt at a time, not {ids.shape[0]}")
        prompt = ids.reshape(-1).tolist()
        with torch.no_grad():
            new = [step.token for step in self.stream(prompt, max_new_tokens)]
        return torch.tensor([[*prompt, *new]])

    @property
    def statistics(self) -> Statistics:
        return self.engine.statistics

    def _embedding(self) -> Tensor:
        for role in self.splits[1].embed.inputs:
            if role.kind == "parameter" and self.decoder.tensors[role.name].ndim == 2:
                return self.decoder.tensors[role.name]
        raise InputError("the draft head needs the token embedding, and none was found")


def transform(
    model: Any,
    artifact: str | Path | Artifact | None = None,
    config: ExitConfig | None = None,
    max_length: int = 1024,
    stop: frozenset[int] = frozenset(),
    dump: Path | None = None,
) -> EarlyExitModel:
    """Transform a Hugging Face causal LM (on the CPU, fp32 or bf16, eval mode).

    ``artifact``: a folder written by ``eepass.train``; without one the result is dense.
    ``max_length``: prompt and answer together. ``stop``: end tokens. ``dump``: folder for the graph
    before and after each pass. Raises ``InputError`` for a
    model or artefact that does not fit, with the reason.
    """
    if model.training:
        raise InputError("the model is in training mode: call model.eval() first")
    loaded = load_artifact(Path(artifact)) if isinstance(artifact, (str, Path)) else artifact
    if loaded is not None:
        refuse_other_model(loaded, model, "artifact")
    slots = -(-(max_length + PREFILL_ROWS) // 64) * 64
    with torch.no_grad():
        settle_weights(model.parameters())
        try:
            splits, report = split_for_rows(model, slots, STEP_ROWS, PREFILL_ROWS, dump)
        except PassError as error:
            raise InputError(f"{type(model).__name__} cannot be transformed: {error}") from error
        transformed = EarlyExitModel(splits, report, stop, loaded)
        if loaded is not None:
            transformed.configure(config or ExitConfig())
    return transformed


def make_plan(config: ExitConfig, artifact: Artifact, num_layers: int) -> ExitPlan:
    """The exits of an artefact under ``config``."""
    part = artifact.presets.get(config.name)
    if part is None:
        raise InputError(f"the artefact has no preset {config.name!r}: train again")
    calibration = part.at_target(config.target_agreement)
    prefix = f"predictor.{config.name}."
    trained = sorted(
        {
            int(name[len(prefix) :].split(".")[0])
            for name in artifact.tensors
            if name.startswith(prefix)
        }
    )
    if config.threshold is None:
        thresholds = calibration.thresholds
        ranking = calibration.ranking
    else:
        thresholds = dict.fromkeys(trained, config.threshold)
        ranking = (*calibration.ranking, *(n for n in trained if n not in calibration.ranking))
    points = tuple(
        ExitPoint(layer, config.translators and f"translator.{layer}.down" in artifact.tensors, t)
        for layer, t in sorted(thresholds.items())
    )
    return ExitPlan(
        num_layers=num_layers,
        draft_layer=0 if config.draft == "eagle" else part.draft_layer,
        draft_tokens=part.draft_tokens,
        exits=points,
        verify=config.verify,
        kv_policy=config.kv,
        ranking=ranking,
    )


def exit_tensors(
    preset: str, artifact: Artifact, model_tensors: Mapping[str, Tensor], lm_head: str
) -> dict[str, Tensor]:
    """The artefact's tensors under the names the passes use, and the hot rows of the LM head."""
    prefix = f"predictor.{preset}."
    tensors: dict[str, Tensor] = {}
    dtype = model_tensors[lm_head].dtype
    for name, tensor in artifact.tensors.items():
        if name.startswith("predictor."):
            if name.startswith(prefix):
                tensors["predictor." + name[len(prefix) :]] = tensor
        else:
            tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor.long()
    tensors["hot.head"] = model_tensors[lm_head].detach()[tensors["hot.ids"]].contiguous()
    return tensors
