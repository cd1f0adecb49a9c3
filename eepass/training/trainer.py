"""The stages of a training: translators, draft head, predictors, thresholds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from eepass.checkpoints.artifact import Artifact, PresetPart, fingerprint, without_prefix
from eepass.checkpoints.draft_codes import rounded
from eepass.checkpoints.quantized_weights import quantization_of
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.runtime.drafting.eagle_layer import style_of
from eepass.training import corpus
from eepass.training.by_kind import report_by_kind
from eepass.training.calibration import Costs
from eepass.training.corpus import Example
from eepass.training.dense_model import HOT_TOKENS, DenseModel
from eepass.training.draft_head import STEPS, refuse_other_head, report_draft, train_draft
from eepass.training.exits import (
    PREDICTOR_PASSES,
    TRANSLATOR_PASSES,
    PresetExits,
    fit_predictors,
    fit_translator,
)
from eepass.training.forecast import peak_memory
from eepass.training.hidden_states import Collector, HiddenStateStore
from eepass.training.progress import Progress, made_once

# by preset; 32 draft tokens tell a predictor nearly as much as the whole hot vocabulary
DRAFT_TOKENS = {"default": 32, "paper": 4}
# tensors that are trained where the exits of an artefact are kept; what its report says of exits
NEW, TOLD_OF_EXITS = ("eagle.", "predictor.paper."), ("draft_layers", "default", "recalibrated")


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
        self.start: dict[str, Tensor] | None = None
        self.kept: Artifact | None = None
        self.model = DenseModel(model, max_length)
        depth = self.model.decoder.num_layers

        def at(*fractions: float) -> list[int]:
            return sorted({max(1, round(part * depth)) for part in fractions})

        # where the default preset may draft; training keeps the better
        self.draft_layers = at(0.63, 0.73)
        # every other layer from there on, and the last, where an exit saves the cold rows of the
        # LM head
        self.exits = {layer: [*range(layer, depth, 2), depth] for layer in self.draft_layers}
        self.translated = sorted({*chain.from_iterable(self.exits.values())} - {depth})
        # for the preset paper every layer but the last from two thirds of the depth on; before that
        # the logit lens rarely gives the dense answer
        self.exits[0] = list(range(max(1, round(0.65 * depth)), depth))
        # the draft head sees z and the hidden states after these layers, none later than an exit
        features = at(0.4, 0.67)
        stored = sorted({*self.translated, *self.exits[0]})
        self.store = HiddenStateStore(checkpoint / "shards", stored, features, self.translated)
        self.collector = Collector(self.model, self.store, progress)

    def start_from(self, artifact: Artifact, where: str, keep_exits: bool = False) -> None:
        """Train the draft head of ``artifact`` further, and keep its exits if so asked;
        ``InputError``, calling it ``where``, for one of another form."""
        head = without_prefix(artifact.tensors, "eagle.")
        style = style_of(self.model.config, len(self.store.features) + 1)
        try:
            refuse_other_head(head, style, self.store.features)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if keep_exits and "default" not in artifact.presets:
            raise InputError(f"{where}: it has no exits to keep, but a draft head alone")
        self.start, self.kept = head, artifact if keep_exits else None

    @torch.no_grad()
    def run(self, examples: Sequence[Example]) -> Artifact:
        """All stages; what the checkpoint holds is not done again."""
        self._timed("collect", self.collector.finish, examples)
        answered = {split: len(self.store.labels(split)) for split, _ in corpus.SPLITS}
        if not all(answered.values()):
            raise InputError("too few answers to train on: give more prompts")
        if self.kept is None:
            tensors = self._timed("hot", self._hot)
            tensors |= self._timed("translators", self._translators, tensors["hot.ids"])
        else:
            tensors = {n: t for n, t in self.kept.tensors.items() if not n.startswith(NEW)}
        if self.draft == "eagle":
            tensors |= self._timed("draft", self._draft)
        costs = self.model.costs(self.hot_tokens)
        trained, default, report = self._default_preset(tensors, costs)
        presets = {"default": default}
        if self.draft == "eagle":
            paper, presets["paper"], report["paper"] = self._timed(
                "predictors.paper", self._preset, 0, tensors, costs
            )
            trained = trained | paper
            report["draft_head"] = report_draft(tensors, self.store, self.model, self.steps)
            report["by_kind"] = report_by_kind(tensors, self.store, self.model, self.steps)
        used = {str(layer) for layer in self.exits[presets["default"].draft_layer]}
        for name in [name for name in tensors if name.startswith("translator.")]:
            if name.split(".")[1] not in used:
                del tensors[name]
        hot = torch.isin(self.store.labels("calibrate"), tensors["hot.ids"].long())
        report |= {
            "quantized": quantization_of(self.original),
            "examples": len(examples),
            "tokens": answered,
            "hot_coverage": float(hot.float().mean()),
            "kinds": dict(Counter(example.kind for example in examples)),
            "shard_bytes": self.store.size,
            "peak_memory": peak_memory(),
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "layers_per": {n: c for n, c in asdict(costs).items() if "layer" not in n},
        }
        return Artifact(fingerprint(self.original), presets, rounded(tensors | trained), report)

    def _default_preset(
        self, tensors: Mapping[str, Tensor], costs: Costs
    ) -> tuple[dict[str, Tensor], PresetPart, dict[str, Any]]:
        """Its predictors and thresholds, and what is reported of them, or those that are kept."""
        if self.kept is not None:
            told = {n: self.kept.report[n] for n in TOLD_OF_EXITS if n in self.kept.report}
            return {}, self.kept.presets["default"], {**told, "exits": "of the artefact before"}
        tried = [
            self._timed(f"predictors.{layer}", self._preset, layer, tensors, costs)
            for layer in self.draft_layers
        ]
        # the draft layer whose exits gain most at the default target
        target = ExitConfig().target_agreement
        trained, part, made = max(tried, key=lambda made: made[1].at_target(target).speedup)
        by_layer = {str(part.draft_layer): made["targets"] for _, part, made in tried}
        return trained, part, {"draft_layers": by_layer, "default": made}

    def _hot(self) -> dict[str, Tensor]:
        vocabulary = len(self.model.lm_head)
        counts = torch.bincount(self.store.labels("fit"), minlength=vocabulary)
        hot = counts.argsort(descending=True, stable=True)[: self.hot_tokens]
        # by token id, so that ties are broken as in the whole vocabulary
        return {"hot.ids": hot.sort().values.to(torch.int32)}

    def _translators(self, hot_ids: Tensor) -> dict[str, Tensor]:
        hot_head = self.model.lm_head[hot_ids.long()].contiguous()
        if not self.translated:
            return {}
        z = self.store.read("fit", "z")
        updates = TRANSLATOR_PASSES * len(z)
        self.progress.begin("translators", updates * len(self.translated))
        tensors: dict[str, Tensor] = {}
        for layer in self.translated:
            path = self.checkpoint / f"translator-{layer}.safetensors"
            if path.exists():
                self.progress.advance(updates)
            made = made_once(path, self._fit_translator, layer, z, hot_head)
            tensors |= {f"translator.{layer}.{n}": t for n, t in made.items()}
        return tensors

    def _fit_translator(self, layer: int, z: Tensor, hot_head: Tensor) -> dict[str, Tensor]:
        hidden, norm = self.store.read("fit", f"boundary.{layer}"), self.model.lens.norm
        return fit_translator(hidden, z, norm, hot_head, self.progress.advance)

    def _draft(self) -> dict[str, Tensor]:
        path = self.checkpoint / "eagle.safetensors"
        unfinished = path.with_suffix(".part")  # each finished pass
        made = made_once(
            path, train_draft, self.store, self.model, self.hot_tokens, self.steps, unfinished,
            self.progress, self.start,
        )  # fmt: skip
        unfinished.unlink(missing_ok=True)
        return {f"eagle.{name}": tensor for name, tensor in made.items()}

    def _preset(
        self, draft_layer: int, tensors: Mapping[str, Tensor], costs: Costs
    ) -> tuple[dict[str, Tensor], PresetPart, dict[str, Any]]:
        """Predictors and thresholds with the draft taken at a layer; 0 is the preset ``paper``."""
        preset = "default" if draft_layer else "paper"
        layers = self.exits[draft_layer]
        self.progress.begin(
            f"predictors, draft at {draft_layer}" if draft_layer else "predictors (paper)",
            PREDICTOR_PASSES * len(layers) * len(self.store.labels("predict")),
        )
        exits = PresetExits(self.model, self.store, tensors, draft_layer, DRAFT_TOKENS[preset])
        fitted = made_once(
            self.checkpoint / f"predictors-{draft_layer}.safetensors",
            lambda: fit_predictors(exits.data("predict", layers), self.progress.advance),
        )
        part, agreement = exits.calibrated(fitted, layers, costs)
        report = {
            "agreement_by_exit": agreement,
            "dense_in_draft": exits.draft_hits(),
            "targets": [asdict(c) for c in part.calibrations],
        }
        return {f"predictor.{preset}.{name}": t for name, t in fitted.items()}, part, report

    def _timed(self, stage: str, work: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        result = work(*arguments)
        self.seconds[stage] = time.perf_counter() - began
        return result
