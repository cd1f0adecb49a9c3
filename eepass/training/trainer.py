"""The stages of training, from answers to an artefact; each can be resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from eepass.checkpoints.artifact import Artifact, PresetPart, fingerprint
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.training.calibration import Costs
from eepass.training.corpus import SPLITS, Example
from eepass.training.dense_model import HOT_TOKENS, DenseModel
from eepass.training.draft_head import STEPS
from eepass.training.draft_stage import report_draft, train_draft
from eepass.training.hidden_states import HiddenStateStore, collect
from eepass.training.predictor_stage import PredictorStage
from eepass.training.predictors import PASSES as PREDICTOR_PASSES
from eepass.training.predictors import fit_predictors
from eepass.training.progress import Progress
from eepass.training.resume import made_once
from eepass.training.trained_layers import TrainedLayers
from eepass.training.translators import PASSES as TRANSLATOR_PASSES
from eepass.training.translators import fit_translator

# by preset; 32 draft tokens tell a predictor nearly as much as the whole hot vocabulary
DRAFT_TOKENS = {"default": 32, "paper": 4}


class Trainer:
    """One training: a model, and a checkpoint folder with what is done."""

    def __init__(
        self,
        model: Any,
        checkpoint: Path,
        progress: Progress,
        max_length: int = 512,
        hot_tokens: int = HOT_TOKENS,
        draft: Literal["eagle", "none"] = "eagle",
        steps: int = STEPS,
    ) -> None:
        self.original, self.checkpoint, self.progress = model, checkpoint, progress
        self.hot_tokens, self.draft, self.steps = hot_tokens, draft, steps
        self.seconds: dict[str, float] = {}
        self.model = DenseModel(model, max_length)
        self.layers = TrainedLayers(self.model.decoder.num_layers)
        self.store = HiddenStateStore(
            checkpoint / "shards", self.layers.stored, self.layers.features
        )

    @torch.no_grad()
    def run(self, examples: Sequence[Example]) -> Artifact:
        """All stages; what the checkpoint holds is not done again."""
        self._timed("collect", lambda: self._collect(examples))
        tensors = self._timed("hot", self._hot)
        tensors |= self._timed("translators", lambda: self._translators(tensors["hot.ids"]))
        if self.draft == "eagle":
            tensors |= self._timed("draft", self._draft)
        costs = self.model.costs(self.hot_tokens)
        presets: dict[str, PresetPart] = {}
        report: dict[str, Any] = {}
        tried = [
            self._timed(f"predictors.{layer}", partial(self._preset, layer, tensors, costs))
            for layer in self.layers.draft_layers
        ]
        report["draft_layers"] = {
            str(part.draft_layer): [asdict(c) for c in part.calibrations] for _, part, _ in tried
        }
        # the draft layer whose exits gain most at the default target
        target = ExitConfig().target_agreement
        trained, presets["default"], report["default"] = max(
            tried, key=lambda made: made[1].at_target(target).speedup
        )
        if self.draft == "eagle":
            paper, presets["paper"], report["paper"] = self._timed(
                "predictors.paper", partial(self._preset, 0, tensors, costs)
            )
            trained = trained | paper
            report["draft_head"] = report_draft(tensors, self.store, self.model, self.steps)
        used = {str(layer) for layer in self.layers.exits(presets["default"].draft_layer)}
        tensors = {
            name: tensor
            for name, tensor in tensors.items()
            if not name.startswith("translator.") or name.split(".")[1] in used
        }
        tensors |= trained
        report["examples"] = len(examples)
        report["tokens"] = {split: len(self.store.labels(split)) for split, _ in SPLITS}
        hot = torch.isin(self.store.labels("calibrate"), tensors["hot.ids"].long())
        report["hot_coverage"] = float(hot.float().mean())
        report["seconds"] = {name: round(value, 1) for name, value in self.seconds.items()}
        report["layers_per"] = {"head": costs.head, "draft": costs.draft, "verify": costs.verify,
                                "predictor": costs.predictor, "row": costs.row}  # fmt: skip
        return Artifact(fingerprint(self.original), presets, tensors, report)

    def _collect(self, examples: Sequence[Example]) -> None:
        total = sum(len(e.prompt) + len(e.answer) for e in examples)
        self.progress.begin("collecting hidden states", total)
        collect(self.model, examples, self.store, self.progress.advance)
        if min(len(self.store.labels(split)) for split, _ in SPLITS) == 0:
            raise InputError("too few answers to train on: give more prompts or raise --tokens")

    def _hot(self) -> dict[str, Tensor]:
        vocabulary = len(self.model.lm_head)
        counts = torch.bincount(self.store.labels("fit"), minlength=vocabulary)
        hot = counts.argsort(descending=True, stable=True)[: min(self.hot_tokens, vocabulary)]
        # by token id, so that ties are broken as in the whole vocabulary
        return {"hot.ids": hot.sort().values.to(torch.int32)}

    def _translators(self, hot_ids: Tensor) -> dict[str, Tensor]:
        hot_head = self.model.lm_head[hot_ids.long()].contiguous()
        z = self.store.read("fit", "z")
        updates = TRANSLATOR_PASSES * len(z)
        self.progress.begin("translators", updates * len(self.layers.translated))
        tensors: dict[str, Tensor] = {}
        for layer in self.layers.translated:
            path = self.checkpoint / f"translator-{layer}.safetensors"
            if path.exists():
                self.progress.advance(updates)
            made = made_once(path, partial(self._fit_translator, layer, z, hot_head))
            tensors |= {f"translator.{layer}.{n}": t for n, t in made.items()}
        return tensors

    def _fit_translator(self, layer: int, z: Tensor, hot_head: Tensor) -> dict[str, Tensor]:
        hidden, norm = self.store.hidden("fit", layer), self.model.lens.norm
        return fit_translator(hidden, z, norm, hot_head, self.progress.advance)

    def _draft(self) -> dict[str, Tensor]:
        path = self.checkpoint / "eagle.safetensors"
        return train_draft(path, self.store, self.model, self.hot_tokens, self.steps, self.progress)

    def _preset(
        self, draft_layer: int, tensors: Mapping[str, Tensor], costs: Costs
    ) -> tuple[dict[str, Tensor], PresetPart, dict[str, Any]]:
        """Predictors and thresholds with the draft taken at a layer; 0 is the preset ``paper``."""
        preset = "default" if draft_layer else "paper"
        layers = self.layers.exits(draft_layer) if draft_layer else self.layers.paper_exits
        self.progress.begin(
            f"predictors, draft at {draft_layer}" if draft_layer else "predictors (paper)",
            PREDICTOR_PASSES * len(layers) * len(self.store.labels("predict")),
        )
        stage = PredictorStage(self.model, self.store, tensors, draft_layer, DRAFT_TOKENS[preset])

        def fit() -> dict[str, Tensor]:
            return fit_predictors(stage.data("predict", layers), self.progress.advance)

        fitted = made_once(self.checkpoint / f"predictors-{draft_layer}.safetensors", fit)
        part, agreement = stage.calibrated(fitted, layers, costs)
        report = {
            "agreement_by_exit": agreement,
            "dense_in_draft": stage.draft_hits(),
            "targets": [asdict(c) for c in part.calibrations],
        }
        return {f"predictor.{preset}.{name}": t for name, t in fitted.items()}, part, report

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        self.seconds[stage] = time.perf_counter() - began
        return result
