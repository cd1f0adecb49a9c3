"""``eepass.train``: from prompts to an artefact, in stages that can be taken up again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from eepass.checkpoints.artifact import Artifact, PresetPart, fingerprint
from eepass.codegen.lower_cpu import CpuCompiler
from eepass.config import ExitConfig
from eepass.errors import InputError, PassError
from eepass.files import write_tensors_atomically
from eepass.ops import exits as exit_ops
from eepass.passes.pipeline import split_for_rows
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.engine.engine import Engine
from eepass.segments import SplitDecoder
from eepass.training.calibration import Costs, calibrate
from eepass.training.corpus import Example
from eepass.training.draft_head import STEPS
from eepass.training.draft_stage import answer_states, eagle_weights, report_draft, train_draft
from eepass.training.exit_layout import ExitLayout, Progress
from eepass.training.hidden_states import HiddenStateStore, collect
from eepass.training.predictors import PASSES as PREDICTOR_PASSES
from eepass.training.predictors import ExitViews, fit_predictors, scores, view_exits
from eepass.training.translators import PASSES as TRANSLATOR_PASSES
from eepass.training.translators import fit_translator

PREFILL_ROWS = 128
HOT_TOKENS = 8192
PAPER_TOKENS = 12_000
# in layers of smollm2 in bf16 on two cores: calling a small compiled segment, ranking a draft, and
# a row more in a layer
CALL = 0.2
TOPK = 0.2
ROW = 0.1
# thirty-two rows tell a predictor nearly what the whole hot vocabulary would
DRAFT_TOKENS = {"default": 32, "paper": 4}


@dataclass
class Trainer:
    """One training: a model, a checkpoint folder, and what the stages hand on."""

    model: Any
    checkpoint: Path
    progress: Progress
    max_length: int = 512
    hot_tokens: int = HOT_TOKENS
    draft: Literal["eagle", "none"] = "eagle"
    steps: int = STEPS
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
        self.engine = Engine(Decoder(splits, CpuCompiler()))
        tensors = self.engine.decoder.tensors
        self.lm_head = head.values(tensors, self._split.hidden_example.dtype)
        self.embedding = self.model.get_input_embeddings().weight.detach()
        self.draft_tokens = dict(DRAFT_TOKENS)
        self.layout = ExitLayout(self.engine.decoder.num_layers)
        self.store = HiddenStateStore(
            self.checkpoint / "shards", self.layout.kept, self.layout.features
        )

    def norm(self, hidden: Tensor) -> Tensor:
        """The model's final norm on [1, n, H], differentiable."""
        return self._split.head.normed(hidden, self.engine.decoder.tensors)

    def transform(self, logits: Tensor) -> Tensor:
        segment = self._split.head.transform
        return logits if segment is None else segment.graph(logits)

    def run(self, examples: Sequence[Example], costs: Costs | None = None) -> Artifact:
        """All stages; what a checkpoint holds is not done again."""
        self._timed("collect", lambda: self._collect(examples))
        tensors = self._timed("hot", self._hot)
        hot_head = self.lm_head[tensors["hot.ids"].long()].contiguous()
        tensors |= self._timed("translators", lambda: self._translators(hot_head))
        if self.draft == "eagle":
            tensors |= self._timed("draft", self._draft)
        costs = costs or self.measured_costs()
        presets: dict[str, PresetPart] = {}
        report: dict[str, Any] = {}
        tried = [
            self._timed(f"predictors.{layer}", partial(self._preset, layer, tensors, costs))
            for layer in self.layout.draft_layers
        ]
        report["draft_layers"] = {
            str(part.draft_layer): [c.to_json() for c in part.calibrations] for _, part, _ in tried
        }
        # the layer whose exits are worth most at the target a user gets unasked
        usual = ExitConfig().target_agreement
        trained, presets["default"], report["default"] = max(
            tried, key=lambda made: made[1].at_target(usual).speedup
        )
        if self.draft == "eagle":
            paper, presets["paper"], report["paper"] = self._timed(
                "predictors.paper", partial(self._preset, 0, tensors, costs)
            )
            trained = trained | paper
            report["draft_head"] = report_draft(
                tensors, self.store, self.embedding, self.lm_head, self.steps
            )
        used = {str(layer) for layer in self.layout.exits(presets["default"].draft_layer)}
        tensors = {
            name: tensor
            for name, tensor in tensors.items()
            if not name.startswith("translator.") or name.split(".")[1] in used
        }
        tensors |= trained
        report["examples"] = len(examples)
        report["tokens"] = {s: len(self._label(s)) for s in ("fit", "predict", "calibrate")}
        hot = torch.isin(self._label("calibrate"), tensors["hot.ids"].long())
        report["hot_coverage"] = float(hot.float().mean())
        report["seconds"] = {name: round(value, 1) for name, value in self.seconds.items()}
        report["layers_per"] = {"head": costs.head, "draft": costs.draft, "verify": costs.verify,
                                "predictor": costs.predictor, "row": costs.row}  # fmt: skip
        return Artifact(fingerprint(self.model), presets, tensors, report)

    def recalibrated(
        self, artifact: Artifact, examples: Sequence[Example]
    ) -> tuple[dict[str, PresetPart], dict[str, dict[str, float]]]:
        """The presets of ``artifact`` with thresholds for this model's answers ``examples``, and by
        preset how often each exit is right there."""
        # the draft head is run as the engine runs it
        dtype = self._split.hidden_example.dtype
        tensors = {
            name: tensor.to(dtype)
            if name.startswith("eagle.") and tensor.is_floating_point()
            else tensor
            for name, tensor in artifact.tensors.items()
        }
        asked = {int(n.split(".")[2]) for n in tensors if n.startswith("predictor.")}
        asked |= {part.draft_layer for part in artifact.presets.values()}
        features = tensors.get("eagle.features", torch.zeros(0)).tolist()
        kept = sorted(asked - {0, self.layout.num_layers})
        self.store = HiddenStateStore(self.store.folder, kept, features)
        tensors.setdefault("eagle.hot.ids", tensors["hot.ids"])
        self.draft_tokens = {n: part.draft_tokens for n, part in artifact.presets.items()}
        self._collected(examples)
        costs = self.measured_costs()
        presets: dict[str, PresetPart] = {}
        agreement: dict[str, dict[str, float]] = {}
        for name, part in artifact.presets.items():
            prefix = f"predictor.{name}."
            fitted: dict[int, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                if key.startswith(prefix):
                    layer, _, which = key.removeprefix(prefix).partition(".")
                    fitted.setdefault(int(layer), {})[which] = tensor
            presets[name], agreement[name] = self.calibrated(
                part.draft_layer, sorted(fitted), fitted, tensors, costs
            )
        return presets, agreement

    def measured_costs(self) -> Costs:
        """Costs in layers: the head as timed here, the rest by the rows of it that they read."""
        decoder = self.engine.decoder
        hidden = torch.zeros(1, 1, decoder.hidden_size, dtype=self.lm_head.dtype)
        place = decoder.side_inputs.span(0, 1)
        layers: list[float] = []
        heads: list[float] = []
        for _ in range(12):
            began = time.perf_counter()
            for layer in range(decoder.num_layers):
                decoder.run_layer(layer, hidden, place)
            middle = time.perf_counter()
            decoder.logits(hidden)
            layers.append((middle - began) / decoder.num_layers)
            heads.append(time.perf_counter() - middle)
        head = statistics.median(heads) / statistics.median(layers)
        hot = head * min(self.hot_tokens, len(self.lm_head)) / len(self.lm_head)
        return Costs(
            num_layers=self.layout.num_layers,
            head=head,
            draft=hot + self._calls(CALL + TOPK),
            predictor=self._calls(CALL),
            verify=hot + self._calls(CALL / 2),
            row=self._calls(ROW),
        )

    def _collect(self, examples: Sequence[Example]) -> None:
        self._collected(examples)
        if min(len(self._label(s)) for s in ("fit", "predict", "calibrate")) == 0:
            raise InputError("too few answers to train on: give more prompts or raise --tokens")

    def _collected(self, examples: Sequence[Example]) -> None:
        self.progress.begin(
            "collecting boundaries", sum(len(e.prompt) + len(e.answer) for e in examples)
        )
        for example in examples[: self.store.examples_done]:
            self.progress.advance(len(example.prompt) + len(example.answer))
        collect(self.engine, self.norm, self.lm_head, examples, self.store, self.progress.advance)

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

    def _translators(self, hot_head: Tensor) -> dict[str, Tensor]:
        layers = self.layout.translated
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
                write_tensors_atomically(path, fitted)
            tensors |= {f"translator.{layer}.{n}": t for n, t in load_file(path).items()}
        return tensors

    def _draft(self) -> dict[str, Tensor]:
        path, count = self.checkpoint / "eagle.safetensors", self.hot_tokens
        weights = self.embedding, self.lm_head
        return train_draft(path, self.store, *weights, count, self.steps, self.progress)

    def _preset(
        self, draft_layer: int, tensors: Mapping[str, Tensor], costs: Costs
    ) -> tuple[dict[str, Tensor], PresetPart, dict[str, Any]]:
        """Predictors and thresholds with the draft taken at a layer; 0 is the preset ``paper``."""
        preset = _preset_of(draft_layer)
        layers = self.layout.exits(draft_layer) if draft_layer else self.layout.paper_exits
        path = self.checkpoint / f"predictors-{draft_layer}.safetensors"
        self.progress.begin(
            f"predictors, draft at {draft_layer}" if draft_layer else "predictors (paper)",
            PREDICTOR_PASSES * len(layers) * len(self._label("predict")),
        )
        if path.exists():
            stored = load_file(path)
            fitted = {
                layer: {n: stored[f"{layer}.{n}"] for n in ("w1", "b1", "w2", "b2")}
                for layer in layers
            }
        else:
            views = self._views(draft_layer, "predict", layers, tensors)
            fitted = fit_predictors(views, self.progress.advance)
            write_tensors_atomically(
                path, {f"{e}.{n}": t for e, p in fitted.items() for n, t in p.items()}
            )
        part, agreement = self.calibrated(draft_layer, layers, fitted, tensors, costs)
        report = {
            "agreement_by_exit": agreement,
            "dense_in_draft": self._draft_hit(draft_layer, tensors),
            "targets": [c.to_json() for c in part.calibrations],
        }
        names = {f"predictor.{preset}.{e}.{n}": t for e, p in fitted.items() for n, t in p.items()}
        return names, part, report

    def calibrated(
        self,
        draft_layer: int,
        layers: Sequence[int],
        fitted: Mapping[int, Mapping[str, Tensor]],
        tensors: Mapping[str, Tensor],
        costs: Costs,
    ) -> tuple[PresetPart, dict[str, float]]:
        """Thresholds of the predictors ``fitted`` on the answers held out, and how often each exit
        is right there."""
        held_out = self._views(draft_layer, "calibrate", layers, tensors)
        if draft_layer:
            costs = replace(costs, draft_layer=draft_layer)
        else:
            eagle = sum(tensor.numel() for tensor in eagle_weights(tensors).values())
            eagle *= self._split.hidden_example.element_size()
            hot = costs.head * len(tensors["eagle.hot.ids"]) / len(self.lm_head)
            drafting = hot + self._calls(CALL + TOPK) + eagle / self._layer_bytes()
            costs = replace(costs, draft=drafting, verify=costs.head)
        verified = torch.stack([held_out.verified[layer] for layer in layers])
        right = torch.stack([held_out.right[layer] for layer in layers])
        found = calibrate(layers, scores(held_out, fitted), verified, right, costs)
        count = self.draft_tokens[_preset_of(draft_layer)]
        part = PresetPart(draft_layer, count, tuple(found))
        return part, {str(e): float(held_out.right[e].float().mean()) for e in layers}

    def _layer_bytes(self) -> int:
        tensors = self.engine.decoder.tensors
        last = self._split.layers[-1]
        return sum(tensors[r.name].nbytes for r in last.inputs if r.kind == "parameter")

    def _calls(self, layers: float) -> float:
        """What takes the time of so many plain layers, in layers as they are: quantised ones take
        less time, and calls of small segments do not."""
        tensors, size = self.engine.decoder.tensors, self._split.hidden_example.element_size()
        inputs = self._split.layers[-1].inputs
        weights = [tensors[role.name] for role in inputs if role.kind == "parameter"]
        plain = sum(w.numel() * size * (2 if w.dtype == torch.uint8 else 1) for w in weights)
        return layers * plain / self._layer_bytes()

    def _views(
        self, draft_layer: int, split: str, layers: Sequence[int], tensors: Mapping[str, Tensor]
    ) -> ExitViews:
        draft, label = self._drafts(draft_layer, split, tensors), self._label(split)
        verify_ids = tensors["hot.ids"].long() if draft_layer else None
        # the whole LM head at every exit is dear: the paper's few thousand tokens do for it
        count = len(label) if draft_layer else min(len(label), PAPER_TOKENS)

        def states(layer: int) -> Tensor:
            if layer == self.layout.num_layers:
                return self.store.read(split, "z")[:count]
            return self._state(split, layer, tensors, translated=draft_layer > 0)[:count]

        return view_exits(
            states, layers, draft[:count], label[:count], self.lm_head, verify_ids, self.transform
        )

    def _state(
        self, split: str, layer: int, tensors: Mapping[str, Tensor], translated: bool
    ) -> Tensor:
        hidden = self.store.read(split, f"boundary.{layer}")
        if translated:
            parts = [tensors[f"translator.{layer}.{n}"] for n in ("scale", "down", "up")]
            hidden = exit_ops.translate(hidden, *parts)
        return self.norm(hidden[None])[0]

    def _drafts(self, draft_layer: int, split: str, tensors: Mapping[str, Tensor]) -> Tensor:
        if draft_layer:
            hot = tensors["hot.ids"].long()
            states = self._state(split, draft_layer, tensors, translated=True)
        else:
            hot = tensors["eagle.hot.ids"].long()
            states = answer_states(tensors, self.store, split, self.embedding)
        hot_head = self.lm_head[hot]
        k = self.draft_tokens[_preset_of(draft_layer)]
        return torch.cat([hot[(s @ hot_head.T).topk(k, -1).indices] for s in states.split(2048)])

    def _draft_hit(self, draft_layer: int, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        draft, label = self._drafts(draft_layer, "calibrate", tensors), self._label("calibrate")
        hits = (draft == label[:, None]).float()
        sizes = [k for k in (1, 4, 8, 32) if k <= draft.shape[1]]
        return {f"top{k}": float(hits[:, :k].sum(1).mean()) for k in sizes}

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        self.seconds[stage] = time.perf_counter() - began
        return result


def _preset_of(draft_layer: int) -> Literal["default", "paper"]:
    return "default" if draft_layer else "paper"
