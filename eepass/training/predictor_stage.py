"""The stage that fits predictors and thresholds for one preset, on the stored hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eepass.checkpoints.artifact import PresetPart
from eepass.exit_rule import among_drafts
from eepass.ops import exits as exit_ops
from eepass.training.calibration import Costs, calibrate
from eepass.training.dense_model import DenseModel
from eepass.training.draft_stage import answer_states, draft_head_of
from eepass.training.hidden_states import HiddenStateStore
from eepass.training.lens import best_token
from eepass.training.predictors import ExitData, score_exits

PAPER_TOKENS = 12_000
# answer tokens at a time
CHUNK = 2048


@dataclass(frozen=True, slots=True)
class PredictorStage:
    """One preset: where it drafts (``draft_layer`` 0: with the draft head, the preset ``paper``)
    and how many tokens. ``tensors`` holds ``hot.ids``, translators and draft head."""

    model: DenseModel
    store: HiddenStateStore
    tensors: Mapping[str, Tensor]
    draft_layer: int
    draft_tokens: int

    def data(self, split: str, layers: Sequence[int]) -> ExitData:
        """What the exits after ``layers`` see of the tokens of ``split``."""
        drafts, label, lens = self._drafts(split), self.store.labels(split), self.model.lens
        hot = self.tensors["hot.ids"].long() if self.draft_layer else None
        verify_head = lens.lm_head if hot is None else lens.lm_head[hot]
        # the whole LM head at every exit is expensive; a few thousand tokens are enough for paper
        count = len(label) if self.draft_layer else min(len(label), PAPER_TOKENS)
        data = ExitData(tuple(layers), {}, {}, {})
        for layer in layers:
            states, chunks = self._normed(split, layer), []
            parts = (part[:count].split(CHUNK) for part in (states, drafts, label))
            for z, ids, dense in zip(*parts, strict=True):
                logits = lens.transform(exit_ops.draft_logits(z, lens.lm_head, None, ids))
                token = best_token(z, verify_head, candidates=4)
                token = token if hot is None else hot[token]
                chunks.append((logits, among_drafts(token, ids), token == dense))
            columns = (torch.cat(column) for column in zip(*chunks, strict=True))
            data.logits[layer], data.verified[layer], data.right[layer] = columns
        return data

    def calibrated(
        self, fitted: Mapping[str, Tensor], layers: Sequence[int], costs: Costs
    ) -> tuple[PresetPart, dict[str, float]]:
        """Thresholds of the predictors ``fitted`` on the held-out answers, and by layer the share
        of tokens for which an exit is right."""
        held_out = self.data("calibrate", layers)
        if self.draft_layer:
            costs = replace(costs, draft_layer=self.draft_layer)
        else:
            costs = self.model.costs_with_draft_head(costs, draft_head_of(self.tensors))
        found = calibrate(score_exits(held_out, fitted), costs)
        part = PresetPart(self.draft_layer, self.draft_tokens, tuple(found))
        return part, {str(n): float(right.float().mean()) for n, right in held_out.right.items()}

    def draft_hits(self) -> dict[str, float]:
        """How often the dense token is among the first draft tokens, on held-out answers."""
        drafts, label = self._drafts("calibrate"), self.store.labels("calibrate")
        hits = (drafts == label[:, None]).float()
        sizes = [k for k in (1, 4, 8, 32) if k <= drafts.shape[1]]
        return {f"top{k}": float(hits[:, :k].sum(1).mean()) for k in sizes}

    def _drafts(self, split: str) -> Tensor:
        """The draft tokens [n, K] at each answer token of ``split``."""
        if self.draft_layer:
            hot = self.tensors["hot.ids"].long()
            states = self._normed(split, self.draft_layer)
        else:
            hot = self.tensors["eagle.hot.ids"].long()
            states = answer_states(self.tensors, self.store, split, self.model.embedding)
        hot_head = self.model.lm_head[hot]
        ranked = [(s @ hot_head.T).topk(self.draft_tokens, -1).indices for s in states.split(CHUNK)]
        return hot[torch.cat(ranked)]

    def _normed(self, split: str, layer: int) -> Tensor:
        """The normed states [n, H] after ``layer``, translated except for the preset ``paper``."""
        if layer == self.model.decoder.num_layers:
            return self.store.read(split, "z")
        hidden = self.store.hidden(split, layer)
        if self.draft_layer:
            parts = [self.tensors[f"translator.{layer}.{n}"] for n in ("scale", "down", "up")]
            hidden = exit_ops.translate(hidden, *parts)
        return self.model.lens.norm(hidden)
