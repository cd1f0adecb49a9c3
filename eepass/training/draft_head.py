"""Train the draft head on sequences of the model: prompts and its own answers.

From the second draft token on, the head is fed its own state in place of the model's features.
Training does the same, unrolled over ``steps`` steps at every position at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eepass.checkpoints.artifact import without_prefix
from eepass.errors import InputError
from eepass.runtime.drafting.eagle_form import form_of
from eepass.runtime.drafting.eagle_layer import MATRICES, HeadStyle, style_of
from eepass.training.dense_model import DenseModel
from eepass.training.hidden_states import HiddenStateStore
from eepass.training.muon import Muon
from eepass.training.progress import PassCheckpoint, Progress
from eepass.training.unrolling import Lines, draft_hits, unroll

STEPS = 4
# at most; training ends earlier where a pass no longer lowers the loss on what is held out by a
# share of GAIN. In the last pass the rate falls to zero
PASSES = 8
GAIN = 0.01
# passes, the first ones, that do not unroll: one step costs a fourth and is learned first
PLAIN = 1
BATCH_ROWS = 2048
RATE = 0.02
NORM_RATE = 1e-3
WARMUP = 20
# each further step counts less: only a right draft token before it makes it matter
DECAY = 0.8
# share of the features that get noise: at run time about half of the z come from an exit
NOISE = 0.1
# share of cross-entropy in the loss
CE = 0.1
# so many of the likeliest hot tokens stand for the model's distribution
TARGETS = 32
# its hot vocabulary is larger than that of exits: the whole LM head verifies these draft tokens
HOT_SHARE = 1.0
# a token of a prompt counts this much of one of an answer when the hot tokens are chosen
PROMPT_SHARE = 0.3
# held-out rows that the loss is measured on
HELD_OUT = 16_384


def train_draft(
    store: HiddenStateStore,
    model: DenseModel,
    hot_tokens: int,
    steps: int,
    resume: Path,
    progress: Progress,
    start: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The draft head's tensors, with a hot vocabulary of its own; ``start``: those of a head that
    is trained further."""
    lines, vocabulary = store.lines("fit"), len(model.lm_head)
    counts = torch.bincount(store.labels("fit"), minlength=vocabulary).float()
    counts += PROMPT_SHARE * torch.bincount(lines.token, minlength=vocabulary)
    order = counts.argsort(descending=True, stable=True)
    hot = order[: round(HOT_SHARE * hot_tokens)].sort().values
    progress.begin("draft head", PASSES * len(lines.token))
    fitted = fit_draft_head(
        lines, model.embedding, model.lm_head[hot], style_of(model.config, len(store.features) + 1),
        progress.advance, steps, resume=resume, held_out=_some(store.lines("calibrate")),
        start=start,
    )  # fmt: skip
    fitted["hot.ids"] = hot.to(torch.int32)
    fitted["features"] = torch.tensor(store.features, dtype=torch.int32)
    return fitted


def report_draft(
    tensors: Mapping[str, Tensor], store: HiddenStateStore, model: DenseModel, steps: int
) -> dict[str, Any]:
    """What the draft head is trained on, and its hits on held-out answers, step by step."""
    head = without_prefix(tensors, "eagle.")
    return {
        "features": list(store.features),
        "hot_tokens": len(head["hot.ids"]),
        "tokens": len(store.read("fit", "line.token")),
        "steps": steps,
        **hits_of(head, store, model, steps),
    }


def hits_of(
    head: Mapping[str, Tensor], store: HiddenStateStore, model: DenseModel, steps: int
) -> dict[str, Any]:
    """On held-out answers, the share of dense tokens that ``head`` can name, and its hits."""
    lines, dense, hot = store.lines("calibrate"), store.labels("calibrate"), head["hot.ids"].long()
    label = torch.full((len(lines.token),), -1)
    label[store.read("calibrate", "line.answer")] = dense
    hot_head = head.get("hot.head", model.lm_head[hot])
    return {
        "hot_coverage": float(torch.isin(dense, hot).float().mean()),
        "hits": draft_hits(head, lines, label, model.embedding, hot, hot_head, steps),
    }


def fit_draft_head(
    lines: Lines,
    embedding: Tensor,
    hot_head: Tensor,
    style: HeadStyle,
    progress: Callable[[int], None],
    steps: int = STEPS,
    passes: int = PASSES,
    resume: Path | None = None,
    held_out: Lines | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The draft head's tensors; embedding [V, H], hot_head [N, H]; ``start``: those of a head that
    has learned already, and is trained further.

    At each position the head sees the token there and the features before it, and learns the hot
    probabilities of the z there. ``progress`` gets the positions of each batch; each finished pass
    is saved in ``resume``. After at most ``passes``, or where a pass gained nothing on the lines
    ``held_out``, the next one is the last.
    """
    dtype = embedding.dtype
    weights = _initial(style, start)
    plain = PLAIN if start is None else 0
    batches = _batches(lines)
    # tokens are expensive and passes few: with Muon matrices learn more from each than with Adam
    matrices, norms = ([w for w in weights.values() if w.ndim == ndim] for ndim in (2, 1))
    optimizers = (
        Muon(matrices, RATE),
        torch.optim.AdamW(norms, NORM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    )
    teacher = _Teacher(embedding, hot_head, style.rotary, steps)
    targets = teacher.targets(lines)
    checkpoint = PassCheckpoint(resume, weights, optimizers)
    losses = checkpoint.restore()
    progress(len(losses) * len(lines.token))
    for number in range(len(losses), passes):
        last = number == passes - 1 or _settled(losses[plain:])
        generator = torch.Generator().manual_seed(number)
        order = torch.randperm(len(batches), generator=generator).tolist()
        for update, index in enumerate(order):
            batch = _padded(batches[index], lines, generator)
            with torch.enable_grad():
                cast = {name: weight.to(dtype) for name, weight in weights.items()}
                loss = teacher.loss(cast, *batch, targets, 1 if number < plain else steps)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            rate = min(1.0, (number * len(order) + update + 1) / WARMUP)
            rate *= max(0.01, 1 - update / len(order)) if last else 1.0
            for optimizer, usual in zip(optimizers, (RATE, NORM_RATE), strict=True):
                optimizer.param_groups[0]["lr"] = usual * rate
                optimizer.step()
                optimizer.zero_grad()
            progress(sum(end - begin for begin, end in batches[index]))
        cast = {name: weight.detach().to(dtype) for name, weight in weights.items()}
        losses.append(0.0 if held_out is None else teacher.held_out_loss(cast, held_out))
        checkpoint.save(losses)
        if last:
            progress((passes - number - 1) * len(lines.token))
            break
    made = {name: weight.detach().to(dtype) for name, weight in weights.items()}
    return {**made, "rotary": style.rotary}


def _settled(losses: Sequence[float]) -> bool:
    """Whether the last of the passes that unrolled gained nothing on what is held out."""
    return len(losses) > 1 and losses[-1] > (1 - GAIN) * losses[-2] > 0


def _some(lines: Lines) -> Lines:
    """Whole ``lines``, spread over all of them, about ``HELD_OUT`` rows."""
    every = max(1, len(lines.token) // HELD_OUT)
    rows = torch.cat([torch.arange(*span) for span in lines.spans()[::every]])
    return Lines(*(part[rows] for part in lines))


@dataclass(frozen=True, slots=True)
class _Teacher:
    """What a draft head is trained to say, unrolled over at most ``steps``."""

    embedding: Tensor
    hot_head: Tensor
    rotary: Tensor
    steps: int

    def loss(
        self,
        weights: Mapping[str, Tensor],
        tokens: Tensor,
        before: Tensor,
        sources: Tensor,
        targets: tuple[Tensor, Tensor],
        steps: int,
    ) -> Any:
        """Of rows as ``_padded`` makes them; ``targets`` of all lines."""
        head = {**weights, "rotary": self.rotary}
        loss: Any = 0.0
        for step, state in enumerate(unroll(tokens, before, self.embedding, head, steps)):
            source = sources[:, step:]
            real = source >= 0
            target = [part[source[real]] for part in targets]
            soft_loss = _SoftLoss.apply(state[:, step:][real], self.hot_head, *target)
            loss = loss + DECAY**step * soft_loss
        return loss

    @torch.no_grad()
    def targets(self, lines: Lines) -> tuple[Tensor, Tensor]:
        """The model's likeliest hot tokens [n, K] after each position, and their probabilities."""
        z, count = lines.features[:, : self.hot_head.shape[1]], min(TARGETS, len(self.hot_head))
        best = [(part @ self.hot_head.T).topk(count, -1) for part in z.split(1024)]
        probabilities = torch.cat([part.values.float().softmax(-1) for part in best])
        return torch.cat([part.indices for part in best]), probabilities.to(z.dtype)

    @torch.no_grad()
    def held_out_loss(self, weights: Mapping[str, Tensor], lines: Lines) -> float:
        targets, losses, count = self.targets(lines), 0.0, 0
        for batch in _batches(lines):
            rows = sum(end - begin for begin, end in batch)
            padded = _padded(batch, lines)
            losses += rows * float(self.loss(weights, *padded, targets, self.steps))
            count += rows
        return losses / max(count, 1)


class _SoftLoss(torch.autograd.Function):
    """LK's hybrid loss (arXiv 2602.23881), ``CE`` cross-entropy and the rest total variation, which
    is one minus the chance of a draft token to be accepted; without storing [n, N] for the backward
    pass.

    states [n, H], head [N, H], target ids and probabilities [n, K] -> mean over the rows.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(states)
        loss = torch.zeros(())
        for begin in range(0, len(states), 256):
            rows = slice(begin, begin + 256)
            probabilities = (states[rows] @ head.T).softmax(-1)
            wanted, likely = targets[rows], probabilities.gather(1, ids[rows])
            loss -= CE * (wanted.float() * likely.float().clamp_min(1e-9).log()).sum()
            loss += (1 - CE) * (1 - torch.minimum(wanted, likely).float().sum(-1)).sum()
            # what the gradient of the total variation takes: mass that is missing
            missing = torch.where(likely < wanted, likely, 0) * (1 - CE)
            probabilities *= CE * wanted.sum(-1, keepdim=True) + missing.sum(-1, keepdim=True)
            probabilities.scatter_add_(1, ids[rows], -(CE * wanted + missing))
            gradient[rows] = probabilities @ head
        ctx.save_for_backward(gradient)
        return loss / max(len(states), 1)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * (outer[0] / max(len(gradient), 1)), None, None, None


def refuse_other_head(
    head: Mapping[str, Tensor], style: HeadStyle, features: Sequence[int]
) -> None:
    """Raise ``InputError`` where ``head`` is not one that training here would go on with."""
    if not head:
        raise InputError("it holds no draft head")
    read = tuple(head["features"].tolist()) if "features" in head else ()
    if read != tuple(features):
        raise InputError(
            f"its draft head reads the hidden states after layers {', '.join(map(str, read))}, and "
            f"training reads those after {', '.join(map(str, features))}"
        )
    for name, shape in style.shapes().items():
        if name not in head or head[name].shape != shape:
            raise InputError(f"its draft head has no tensor {name} of {shape}")
    if not form_of(head).trained_here:
        raise InputError("its draft head has another form than those trained here")


def _initial(style: HeadStyle, start: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    if start is not None:
        return {name: start[name].float().clone().requires_grad_() for name in style.shapes()}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in style.shapes().items():
        value = torch.ones(shape)
        if name in MATRICES:
            value = torch.randn(shape, generator=generator) * shape[1] ** -0.5
        if name in ("o", "down"):
            value = value * 0.2
        weights[name] = value.requires_grad_()
    return weights


def _batches(lines: Lines) -> list[list[tuple[int, int]]]:
    """Sequences of similar length together, about ``BATCH_ROWS`` rows a batch."""
    batches: list[list[tuple[int, int]]] = []
    room = 0
    for begin, end in sorted(lines.spans(), key=lambda span: span[1] - span[0]):
        size = end - begin
        if size < 3:
            continue
        if room < size:
            batches.append([])
            room = max(BATCH_ROWS, size)
        batches[-1].append((begin, end))
        room -= size
    return batches


def _padded(
    spans: Sequence[tuple[int, int]], lines: Lines, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, T], the features [B, T, F * H] of the position before each, and the index of each
    in ``lines`` [B, T], -1 where padded. ``generator``: of noise, None for none."""
    # the first token of a line has no features before it, so it makes no row
    length = max(end - begin for begin, end in spans) - 1
    source = torch.full((len(spans), length), -1)
    for row, (begin, end) in enumerate(spans):
        source[row, : end - begin - 1] = torch.arange(begin + 1, end)
    before = lines.features[(source - 1).clamp_min(0)]  # [B, T, F * H]
    tokens = lines.token[source.clamp_min(0)].long()
    if generator is None:
        return tokens, before, source
    noisy = torch.rand(*source.shape, 1, generator=generator) < NOISE
    noise = torch.randn(before.shape, generator=generator, dtype=before.dtype)
    scale = before.float().std(-1, keepdim=True) * 0.5 * noisy
    before = before + noise * scale.to(before.dtype)
    return tokens, before, source
