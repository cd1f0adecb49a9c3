"""``eepass.train``: from prompts to an artefact, in stages that can be taken up again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from eepass import ops
from eepass.artifact import Artifact, PresetPart, fingerprint
from eepass.codegen.lower_cpu import CpuCompiler
from eepass.errors import InputError
from eepass.passes.pipeline import split_for_rows
from eepass.passes.report import PassError
from eepass.plan import SplitDecoder
from eepass.runtime.decoder import Decoder
from eepass.runtime.engine import Engine
from eepass.training.boundaries import BoundaryStore, collect, write_tensors
from eepass.training.calibration import Costs, calibrate
from eepass.training.corpus import Example
from eepass.training.draft_head import PASSES as DRAFT_PASSES
from eepass.training.draft_head import draft_states, fit_draft_head
from eepass.training.predictors import PASSES as PREDICTOR_PASSES
from eepass.training.predictors import ExitViews, fit_predictors, scores, view_exits
from eepass.training.translators import PASSES as TRANSLATOR_PASSES
from eepass.training.translators import fit_translator

PREFILL_ROWS = 128
HOT_TOKENS = 8192
PAPER_TOKENS = 12_000
DRAFT_TOKENS = {"default": 8, "paper": 4}


class Progress(Protocol):
    """Told how far training is: ``begin`` a stage of so many units, ``advance`` by some."""

    def begin(self, stage: str, total: int) -> None: ...
    def advance(self, amount: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Layout:
    """Which boundaries a model of ``num_layers`` is trained at, as fractions of its depth."""

    num_layers: int

    @property
    def draft_layer(self) -> int:
        return max(1, round(0.6 * self.num_layers))

    @property
    def exits(self) -> tuple[int, ...]:
        """Exits of the default preset: after the draft, the last boundary included."""
        return tuple(range(self.draft_layer + 1, self.num_layers + 1))

    @property
    def paper_exits(self) -> tuple[int, ...]:
        """Exits of the preset ``paper``: every layer but the last, from two thirds of the depth
        on; before that a lens rarely answers right."""
        return tuple(range(max(1, round(0.65 * self.num_layers)), self.num_layers))

    @property
    def kept(self) -> tuple[int, ...]:
        return tuple(sorted({self.draft_layer, *self.exits, *self.paper_exits} - {self.num_layers}))


@dataclass
class Trainer:
    """One training: a model, a checkpoint folder, and what the stages hand on."""

    model: Any
    checkpoint: Path
    progress: Progress
    max_length: int = 512
    hot_tokens: int = HOT_TOKENS
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.set_grad_enabled(False)
        slots = -(-(self.max_length + PREFILL_ROWS) // 64) * 64
        try:
            splits, _ = split_for_rows(self.model, slots, (1,), PREFILL_ROWS)
        except PassError as error:
            raise InputError(f"{type(self.model).__name__} cannot be trained: {error}") from error
        self._split: SplitDecoder = splits[1]
        head = self._split.head
        if head.norm is None:
            raise InputError(f"early exit is not possible here: {head.reason}")
        if head.bias:
            raise InputError("training for an LM head with a bias is not supported yet")
        self._engine = Engine(Decoder(splits, CpuCompiler()))
        tensors = self._engine.decoder.tensors
        self.lm_head = tensors[head.weight]
        self.embedding = self.model.get_input_embeddings().weight.detach()
        self.layout = Layout(self._engine.decoder.num_layers)
        self.store = BoundaryStore(self.checkpoint / "shards", self.layout.kept)

    def norm(self, hidden: Tensor) -> Tensor:
        """The model's final norm on [1, n, H], differentiable."""
        piece, tensors = self._split.head.norm, self._engine.decoder.tensors
        assert piece is not None
        return piece.graph(
            *(hidden if r.kind == "hidden" else tensors[r.name] for r in piece.inputs)
        )

    def transform(self, logits: Tensor) -> Tensor:
        piece = self._split.head.transform
        return logits if piece is None else piece.graph(logits)

    def run(self, examples: Sequence[Example], costs: Costs | None = None) -> Artifact:
        """All stages; what a checkpoint holds is not done again."""
        self._timed("collect", lambda: self._collect(examples))
        tensors = self._timed("hot", self._hot)
        hot_head = self.lm_head[tensors["hot.ids"].long()].contiguous()
        tensors |= self._timed("translators", lambda: self._translators(hot_head))
        tensors |= self._timed("draft", lambda: self._draft(hot_head))
        costs = costs or self.estimated_costs()
        presets, report = {}, {}
        for preset in ("default", "paper"):
            trained, part, measured = self._timed(
                f"predictors.{preset}", partial(self._preset, preset, tensors, costs)
            )
            tensors = tensors | trained
            presets[preset] = part
            report[preset] = measured
        report["examples"] = len(examples)
        report["tokens"] = {s: len(self._label(s)) for s in ("fit", "predict", "calibrate")}
        report["hot_coverage"] = self._coverage(tensors["hot.ids"])
        report["seconds"] = {name: round(value, 1) for name, value in self.seconds.items()}
        report["layers_per"] = {"head": costs.head, "draft": costs.draft, "verify": costs.verify,
                                "predictor": costs.predictor, "row": costs.row}  # fmt: skip
        return Artifact(fingerprint(self.model), presets, tensors, report)

    def estimated_costs(self) -> Costs:
        """Costs in layers from the bytes each part reads; what a layer's bytes take is one."""
        tensors = self._engine.decoder.tensors
        layer = sum(
            tensors[r.name].numel() for r in self._split.layers[-1].inputs if r.kind == "parameter"
        )
        hidden = self.lm_head.shape[1]
        hot = min(self.hot_tokens, len(self.lm_head)) * hidden / layer
        translator = 2 * 128 * hidden / layer
        return Costs(
            num_layers=self.layout.num_layers,
            head=self.lm_head.numel() / layer,
            draft=hot + translator,
            # the launch of a predictor weighs as much again as its bytes on a small model
            predictor=2 * translator + 0.05,
            verify=hot,
        )

    def _collect(self, examples: Sequence[Example]) -> None:
        self.progress.begin(
            "collecting boundaries", sum(len(e.prompt) + len(e.answer) for e in examples)
        )
        for example in examples[: self.store.examples_done]:
            self.progress.advance(len(example.prompt) + len(example.answer))
        collect(self._engine, self.norm, self.lm_head, examples, self.store, self.progress.advance)
        if min(len(self._label(s)) for s in ("fit", "predict", "calibrate")) == 0:
            raise InputError("too few answers to train on: give more prompts or raise --tokens")

    def _label(self, split: str) -> Tensor:
        if not list(self.store.folder.glob(f"{split}-*.safetensors")):
            return torch.zeros(0, dtype=torch.long)
        return self.store.read(split, "label").long()

    def _hot(self) -> dict[str, Tensor]:
        vocabulary = len(self.lm_head)
        counts = torch.bincount(self._label("fit"), minlength=vocabulary)
        hot = counts.argsort(descending=True, stable=True)[: min(self.hot_tokens, vocabulary)]
        # by token id, so that a tie goes to the token it goes to in the whole vocabulary
        return {"hot.ids": hot.sort().values.to(torch.int32)}

    def _coverage(self, hot_ids: Tensor) -> float:
        return float(torch.isin(self._label("calibrate"), hot_ids.long()).float().mean())

    def _translators(self, hot_head: Tensor) -> dict[str, Tensor]:
        layers = [self.layout.draft_layer, *self.layout.exits[:-1]]
        z = self.store.read("fit", "z")
        self.progress.begin("translators", TRANSLATOR_PASSES * len(z) * len(layers))
        tensors: dict[str, Tensor] = {}
        for layer in layers:
            path = self.checkpoint / f"translator-{layer}.safetensors"
            if path.exists():
                self.progress.advance(TRANSLATOR_PASSES * len(z))
            else:
                boundary = self.store.read("fit", f"boundary.{layer}")
                fitted = fit_translator(boundary, z, self.norm, hot_head, self.progress.advance)
                write_tensors(path, fitted)
            tensors |= {f"translator.{layer}.{n}": t for n, t in load_file(path).items()}
        return tensors

    def _draft(self, hot_head: Tensor) -> dict[str, Tensor]:
        path = self.checkpoint / "eagle.safetensors"
        if not path.exists():
            token, z, place = (self.store.read("fit", n) for n in ("token", "z", "place"))
            self.progress.begin("draft head", DRAFT_PASSES * len(token))
            fitted = fit_draft_head(
                token.long(), z, place, self.embedding, hot_head, self.progress.advance
            )
            write_tensors(path, fitted)
        return {f"eagle.{name}": tensor for name, tensor in load_file(path).items()}

    def _preset(
        self, preset: str, tensors: Mapping[str, Tensor], costs: Costs
    ) -> tuple[dict[str, Tensor], PresetPart, dict[str, Any]]:
        layers = self.layout.exits if preset == "default" else self.layout.paper_exits
        path = self.checkpoint / f"predictors-{preset}.safetensors"
        self.progress.begin(
            f"predictors ({preset})", PREDICTOR_PASSES * len(layers) * len(self._label("predict"))
        )
        if path.exists():
            stored = load_file(path)
            fitted = {
                layer: {n: stored[f"{layer}.{n}"] for n in ("w1", "b1", "w2", "b2")}
                for layer in layers
            }
        else:
            views = self._views(preset, "predict", layers, tensors)
            fitted = fit_predictors(views, self.progress.advance)
            write_tensors(path, {f"{e}.{n}": t for e, p in fitted.items() for n, t in p.items()})
        held_out = self._views(preset, "calibrate", layers, tensors)
        if preset == "paper":
            eagle = sum(t.numel() for n, t in tensors.items() if n.startswith("eagle."))
            layer_size = self.lm_head.numel() / costs.head
            costs = Costs(
                num_layers=costs.num_layers,
                head=costs.head,
                draft=costs.verify + eagle / layer_size,
                predictor=0.05,
                verify=costs.head,
                row=costs.row,
            )
        verified = torch.stack([held_out.verified[layer] for layer in layers])
        right = torch.stack([held_out.right[layer] for layer in layers])
        calibrations = calibrate(layers, scores(held_out, fitted), verified, right, costs)
        part = PresetPart(
            draft_layer=self.layout.draft_layer if preset == "default" else 0,
            draft_tokens=DRAFT_TOKENS[preset],
            calibrations=tuple(calibrations),
        )
        report = {
            "agreement_by_exit": {str(e): float(held_out.right[e].float().mean()) for e in layers},
            "draft_hit": float(held_out.verified[layers[-1]].float().mean()),
            "dense_in_draft": self._draft_hit(preset, tensors),
            "targets": [c.to_json() for c in calibrations],
        }
        names = {f"predictor.{preset}.{e}.{n}": t for e, p in fitted.items() for n, t in p.items()}
        return names, part, report

    def _views(
        self, preset: str, split: str, layers: Sequence[int], tensors: Mapping[str, Tensor]
    ) -> ExitViews:
        draft, label = self._drafts(preset, split, tensors), self._label(split)
        verify_ids = tensors["hot.ids"].long() if preset == "default" else None
        # the whole LM head at every exit is dear: the paper's few thousand tokens do for it
        count = len(label) if preset == "default" else min(len(label), PAPER_TOKENS)

        def states(layer: int) -> Tensor:
            if layer == self.layout.num_layers:
                return self.store.read(split, "z")[:count]
            return self._state(split, layer, tensors, translated=preset == "default")[:count]

        return view_exits(
            states, layers, draft[:count], label[:count], self.lm_head, verify_ids, self.transform
        )

    def _state(
        self, split: str, layer: int, tensors: Mapping[str, Tensor], translated: bool
    ) -> Tensor:
        hidden = self.store.read(split, f"boundary.{layer}")
        if translated:
            parts = [tensors[f"translator.{layer}.{n}"] for n in ("scale", "down", "up")]
            hidden = ops.translate(hidden, *parts)
        return self.norm(hidden[None])[0]

    def _drafts(self, preset: str, split: str, tensors: Mapping[str, Tensor]) -> Tensor:
        hot = tensors["hot.ids"].long()
        if preset == "default":
            states = self._state(split, self.layout.draft_layer, tensors, translated=True)
        else:
            token, z, place = (self.store.read(split, n) for n in ("token", "z", "place"))
            weights = {n[6:]: t for n, t in tensors.items() if n.startswith("eagle.")}
            states = draft_states(weights, token.long(), z, place, self.embedding)
        hot_head = self.lm_head[hot]
        k = DRAFT_TOKENS[preset]
        return torch.cat([hot[(s @ hot_head.T).topk(k, -1).indices] for s in states.split(2048)])

    def _draft_hit(self, preset: str, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        draft, label = self._drafts(preset, "calibrate", tensors), self._label("calibrate")
        hits = (draft == label[:, None]).float()
        return {
            f"top{k}": float(hits[:, :k].sum(1).mean()) for k in (1, 4, 8) if k <= draft.shape[1]
        }

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        self.seconds[stage] = time.perf_counter() - began
        return result
