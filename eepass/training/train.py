"""``eepass.train``: an artefact for a model, from prompts; each stage can be resumed."""

from __future__ import annotations

import errno
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from eepass.checkpoints.artifact import Artifact, PresetPart, fingerprint
from eepass.checkpoints.draft_codes import rounded
from eepass.checkpoints.models import LoadedModel, original_of
from eepass.checkpoints.quantized_weights import quantization_of
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.training import corpus
from eepass.training.by_kind import report_by_kind
from eepass.training.calibration import Costs
from eepass.training.card import write_card
from eepass.training.corpus import HELD_OUT, Example, Prompt
from eepass.training.dense_model import HOT_TOKENS, DenseModel
from eepass.training.draft_head import STEPS, report_draft, train_draft
from eepass.training.exits import (
    PREDICTOR_PASSES,
    TRANSLATOR_PASSES,
    PresetExits,
    fit_predictors,
    fit_translator,
)
from eepass.training.forecast import forecast, peak_memory
from eepass.training.hidden_states import Collector, HiddenStateStore
from eepass.training.own_data import OwnData, default_own_prompts
from eepass.training.progress import NoProgress, Progress, check_request, claimed, made_once
from eepass.training.prompts import topics

DEFAULT_PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"
# by preset; 32 draft tokens tell a predictor nearly as much as the whole hot vocabulary
DRAFT_TOKENS = {"default": 32, "paper": 4}


def train(
    loaded: LoadedModel,
    out: str | Path,
    prompts: str | Path | None = None,
    tokens: int = 200_000,
    answers: str | Path | None = None,
    raw: bool = False,
    max_length: int = 512,
    samples: int = 1,
    temperature: float = 0.7,
    draft: Literal["eagle", "none"] = "eagle",
    steps: int = STEPS,
    own_prompts: int | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Train translators, draft head, predictors and thresholds for ``loaded``; write ``out``.

    ``prompts``: JSONL, ``{"prompt": ..., "kind": ...}`` a line, the kind optional; the shipped set
    otherwise. ``tokens``: answer tokens to generate. ``answers``: JSONL of the model's own answers,
    ``{"prompt": line of the prompts file from 0, "answer": [token ids]}``, instead of generating.
    ``samples``: further answers to each prompt of the first split, sampled at ``temperature``, in
    the last third of the tokens. ``draft``: whether to train a draft head and the preset ``paper``,
    which needs it; ``steps``: how far it is unrolled. ``own_prompts``: prompts that the model
    writes itself, of many kinds, beside those given, answered too; by default as many as the tokens
    need, none beside ``prompts`` or ``answers``. A run that was stopped is resumed from
    ``out/checkpoint``. Raises ``InputError`` for bad input.
    """
    progress = progress or NoProgress()
    original_of(loaded, "train on the original one, then transform that with what was trained")
    folder = Path(out)
    checkpoint = folder / "checkpoint"
    texts = corpus.read_kinds(Path(prompts or DEFAULT_PROMPTS))
    given = [_given(loaded.encode(text, raw), kind) for text, kind in texts]
    examples: list[Example] = []
    if answers is not None:
        examples = corpus.read_answers(Path(answers), given, loaded.model.config.vocab_size)
    if own_prompts is None:
        alone = prompts is None and answers is None and loaded.converses
        own_prompts = default_own_prompts(tokens, len(given)) if alone else 0
    request = {
        "model": fingerprint(loaded.model)["weights"],
        "quantized": quantization_of(loaded.model),
        "prompts": _hash(repr(given).encode()),
        "answers": _hash(repr(examples).encode()) if answers is not None else None,
        "tokens": None if answers is not None else tokens,
        "max_length": max_length,
        "samples": samples,
        "temperature": temperature if samples else None,
        "draft": draft,
        "steps": steps,
        "own_prompts": own_prompts,
    }
    held = ExitStack()
    try:
        held.enter_context(claimed(checkpoint, folder))
        check_request(checkpoint, request)
        trainer = Trainer(loaded.model, checkpoint, progress, max_length, draft=draft, steps=steps)
        progress.say(forecast(trainer.model, 0 if answers is not None else tokens, own_prompts))
        data = OwnData(loaded, checkpoint, trainer.collector, progress)
        if answers is not None:
            trainer.collector.catch_up(examples)
        unanswered = [] if answers is not None else given
        examples += data.write(unanswered, own_prompts, tokens, samples, temperature)
        _refuse_too_few(examples, [*unanswered, *data.own], tokens)
        artifact = trainer.run(examples)
        artifact.save(folder)
        write_card(folder, loaded, artifact)
    except OSError as error:
        if error.filename and not Path(error.filename).is_relative_to(folder):
            # compiled code, say, that has no room in a cache
            raise
        room = "make room and " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or error}); what was done before is "
            f"kept: {room}run the same command again"
        ) from error
    finally:
        held.close()
    return artifact


def _given(ids: list[int], kind: str) -> Prompt:
    held_out = kind in {topic.kind for topic in topics() if topic.held_out}
    return Prompt(ids, kind, HELD_OUT if held_out else corpus.split_of(ids))


def _refuse_too_few(examples: Sequence[Example], prompts: Sequence[Prompt], tokens: int) -> None:
    """Raise ``InputError`` where a split has no answers, saying what there should be more of."""
    if {example.split for example in examples} >= {split for split, _ in corpus.SPLITS}:
        return
    made = sum(len(example.answer) for example in examples)
    left = {tuple(prompt.ids) for prompt in prompts} - {tuple(e.prompt) for e in examples}
    raise InputError(
        f"{len(examples)} answers of {made} tokens are too few: "
        + (f"raise --tokens above {max(made, tokens)}" if left else "give more prompts")
    )


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


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

    @torch.no_grad()
    def run(self, examples: Sequence[Example]) -> Artifact:
        """All stages; what the checkpoint holds is not done again."""
        self._timed("collect", self.collector.finish, examples)
        answered = {split: len(self.store.labels(split)) for split, _ in corpus.SPLITS}
        if not all(answered.values()):
            raise InputError("too few answers to train on: give more prompts")
        tensors = self._timed("hot", self._hot)
        tensors |= self._timed("translators", self._translators, tensors["hot.ids"])
        if self.draft == "eagle":
            tensors |= self._timed("draft", self._draft)
        costs = self.model.costs(self.hot_tokens)
        tried = [
            self._timed(f"predictors.{layer}", self._preset, layer, tensors, costs)
            for layer in self.draft_layers
        ]
        report: dict[str, Any] = {
            "draft_layers": {str(part.draft_layer): made["targets"] for _, part, made in tried}
        }
        presets: dict[str, PresetPart] = {}
        # the draft layer whose exits gain most at the default target
        target = ExitConfig().target_agreement
        trained, presets["default"], report["default"] = max(
            tried, key=lambda made: made[1].at_target(target).speedup
        )
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
            self.progress,
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
