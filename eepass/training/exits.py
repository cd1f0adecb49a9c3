"""Train what an exit needs: a translator, a predictor, and with them the presets' thresholds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from eepass.checkpoints.artifact import PresetPart, without_prefix
from eepass.exit_rule import among_drafts
from eepass.ops import exits as exit_ops
from eepass.training.calibration import Costs, ExitScores, calibrate
from eepass.training.dense_model import DenseModel, best_token
from eepass.training.hidden_states import HiddenStateStore
from eepass.training.unrolling import draft_states

RATE = 2e-3
TRANSLATOR_RANK = 128
TRANSLATOR_PASSES = 2
TRANSLATOR_BATCH = 512
WIDTH = 512
PREDICTOR_PASSES = 8
PREDICTOR_BATCH = 1024
PREDICTOR_TENSORS = ("w1", "b1", "w2", "b2")
PAPER_TOKENS = 12_000
# answer tokens at a time
CHUNK = 2048


def fit_translator(
    hidden: Tensor,
    z: Tensor,
    norm: Callable[[Tensor], Tensor],
    hot_head: Tensor,
    progress: Callable[[int], None],
    rank: int = TRANSLATOR_RANK,
    passes: int = TRANSLATOR_PASSES,
) -> dict[str, Tensor]:
    """A low-rank map from hidden states [n, H] to the basis of the final norm.

    The loss is the cross entropy between the hot vocabulary's probabilities from z [n, H], the
    last, normed states of the same tokens, and from the translated state; ``norm`` is the model's
    final norm on [n, H]. Returns ``scale`` [H], ``down`` [rank, H], ``up`` [H, rank] in the model's
    dtype; ``progress`` gets the rows of each batch.
    """
    width = hidden.shape[1]
    generator = torch.Generator().manual_seed(0)
    scale = torch.ones(width, requires_grad=True)
    down = torch.randn(rank, width, generator=generator).mul_(width**-0.5).requires_grad_()
    up = torch.zeros(width, rank, requires_grad=True)
    optimizer = torch.optim.AdamW([scale, down, up], RATE, betas=(0.9, 0.98), weight_decay=0.0)
    steps = max(passes * len(hidden) // TRANSLATOR_BATCH, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 50) * max(0.02, 1 - step / steps)
    )
    for _ in range(passes):
        for rows in torch.randperm(len(hidden), generator=generator).split(TRANSLATOR_BATCH):
            target = (z[rows] @ hot_head.T).detach().float().softmax(-1)
            with torch.enable_grad():
                state = exit_ops.translate(hidden[rows], scale, down, up)
                loss = F.cross_entropy((norm(state) @ hot_head.T).float(), target)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            schedule.step()
            progress(len(rows))
    tensors = {"scale": scale, "down": down, "up": up}
    return {name: tensor.detach().to(hidden.dtype) for name, tensor in tensors.items()}


@dataclass(frozen=True, slots=True)
class ExitData:
    """What n tokens are like at the exits after ``layers``: ``logits`` [n, K] of the draft tokens
    at each; ``verified`` [exits, n]: whether the verified token is a draft token; ``right``
    [exits, n]: whether it is the dense token; ``text`` and ``kind`` [n]: numbers of the token's
    text and of its kind."""

    layers: Sequence[int]
    logits: Sequence[Tensor]
    verified: Tensor
    right: Tensor
    text: Tensor
    kind: Tensor


def fit_predictors(data: ExitData, progress: Callable[[int], None]) -> dict[str, Tensor]:
    """One MLP per exit: ``<layer>.w1`` [W, 3K], ``.b1`` [W], ``.w2`` [W], ``.b2`` [1], float32.

    It sees what it sees when the model decodes. Which predictor is evaluated before this one in a
    step depends on the schedule: each example draws it from the earlier exits, or none. The label
    differs from the paper's code: an exit is right when the token that verification finds there is
    the dense one and among the draft tokens.
    """
    generator = torch.Generator().manual_seed(0)
    labels = (data.verified & data.right).float()
    probabilities = [logits.softmax(-1) for logits in data.logits]
    fitted: dict[str, Tensor] = {}
    for index, (layer, logits) in enumerate(zip(data.layers, data.logits, strict=True)):
        count, k = logits.shape
        w1 = (torch.randn(WIDTH, 3 * k, generator=generator) * (3 * k) ** -0.5).requires_grad_()
        b1 = torch.zeros(WIDTH, requires_grad=True)
        w2 = (torch.randn(WIDTH, generator=generator) * WIDTH**-0.5).requires_grad_()
        b2 = torch.zeros(1, requires_grad=True)
        parameters = [w1, b1, w2, b2]
        optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.01)
        # the rate falls to zero, so that the scores settle in the last pass
        steps = PREDICTOR_PASSES * -(-count // PREDICTOR_BATCH)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        earlier = torch.stack([torch.zeros_like(logits), *probabilities[:index]])
        for _ in range(PREDICTOR_PASSES):
            for rows in torch.randperm(count, generator=generator).split(PREDICTOR_BATCH):
                # the nearest exits before this one are the likeliest to be active
                back = torch.empty(len(rows)).exponential_(0.7, generator=generator).long()
                previous = earlier[(index - back).clamp_min(0), rows]
                with torch.enable_grad():
                    probability, _ = exit_ops.predict_exit(logits[rows], previous, *parameters)
                    loss = F.binary_cross_entropy(probability, labels[index, rows])
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
                schedule.step()
                progress(len(rows))
        for name, parameter in zip(PREDICTOR_TENSORS, parameters, strict=True):
            fitted[f"{layer}.{name}"] = parameter.detach()
    return fitted


@torch.no_grad()
def score_exits(data: ExitData, fitted: Mapping[str, Tensor]) -> ExitScores:
    """The predictors' probabilities, as if each exit were evaluated right after the one before."""
    rows = []
    previous = torch.zeros_like(data.logits[0])
    for layer, logits in zip(data.layers, data.logits, strict=True):
        mlp = [fitted[f"{layer}.{name}"] for name in PREDICTOR_TENSORS]
        probability, previous = exit_ops.predict_exit(logits, previous, *mlp)
        rows.append(probability)
    return ExitScores(
        data.layers, torch.stack(rows), data.verified, data.right, data.text, data.kind
    )


@dataclass(frozen=True, slots=True)
class PresetExits:
    """The exits of one preset on the stored hidden states: ``draft_layer`` is where it drafts (0:
    with the draft head, the preset ``paper``); ``tensors`` holds ``hot.ids``, translators and draft
    head."""

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
        exits = []
        for layer in layers:
            states, chunks = self._normed(split, layer), []
            parts = (part[:count].split(CHUNK) for part in (states, drafts, label))
            for z, ids, dense in zip(*parts, strict=True):
                logits = lens.transform(exit_ops.draft_logits(z, lens.lm_head, None, ids))
                token = best_token(z, verify_head, candidates=4)
                token = token if hot is None else hot[token]
                chunks.append((logits, among_drafts(token, ids), token == dense))
            exits.append([torch.cat(column) for column in zip(*chunks, strict=True)])
        logits_at, verified, right = zip(*exits, strict=True)
        text, kind = (part[:count] for part in self.store.texts(split))
        return ExitData(layers, logits_at, torch.stack(verified), torch.stack(right), text, kind)

    def calibrated(
        self, fitted: Mapping[str, Tensor], layers: Sequence[int], costs: Costs
    ) -> tuple[PresetPart, dict[str, float]]:
        """Thresholds of the predictors ``fitted`` on the held-out answers, and by layer the share
        of tokens for which an exit is right."""
        held_out = self.data("calibrate", layers)
        if self.draft_layer:
            costs = replace(costs, draft_layer=self.draft_layer)
        else:
            costs = self.model.costs_with_draft_head(costs, without_prefix(self.tensors, "eagle."))
        found = calibrate(score_exits(held_out, fitted), costs)
        part = PresetPart(self.draft_layer, self.draft_tokens, tuple(found))
        shares = held_out.right.float().mean(1).tolist()
        return part, dict(zip(map(str, layers), shares, strict=True))

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
            head = without_prefix(self.tensors, "eagle.")
            states = draft_states(head, self.store.lines(split), self.model.embedding)
            states = states[self.store.read(split, "line.answer")]
        hot_head = self.model.lm_head[hot]
        ranked = [(s @ hot_head.T).topk(self.draft_tokens, -1).indices for s in states.split(CHUNK)]
        return hot[torch.cat(ranked)]

    def _normed(self, split: str, layer: int) -> Tensor:
        """The normed states [n, H] after ``layer``, translated except for the preset ``paper``."""
        if layer == self.model.decoder.num_layers:
            return self.store.read(split, "z")
        hidden = self.store.read(split, f"boundary.{layer}")
        if self.draft_layer:
            parts = [self.tensors[f"translator.{layer}.{n}"] for n in ("scale", "down", "up")]
            hidden = exit_ops.translate(hidden, *parts)
        return self.model.lens.norm(hidden)
