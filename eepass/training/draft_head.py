"""Train the draft head on sequences of the model: prompts and its own answers.

From the second draft token on, the head is fed its own state in place of the model's features.
Training does the same, unrolled over ``steps`` steps at every position at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eepass.checkpoints.artifact import without_prefix
from eepass.runtime.drafting.eagle_layer import shapes
from eepass.training.dense_model import DenseModel
from eepass.training.hidden_states import HiddenStateStore
from eepass.training.progress import PassCheckpoint, Progress
from eepass.training.unrolling import Lines, draft_hits, unroll

STEPS = 4
PASSES = 4
# share of the passes, the last ones, that unroll: one step costs a fourth and is learned first
UNROLLED = 0.5
BATCH_ROWS = 2048
RATE = 0.02
NORM_RATE = 1e-3
WARMUP = 20
# each further step counts less: only a right draft token before it makes it matter
DECAY = 0.8
# share of the features that get noise: at run time about half of the z come from an exit
NOISE = 0.1
# so many of the likeliest hot tokens stand for the model's distribution
TARGETS = 32
# its hot vocabulary is larger than that of exits: the whole LM head verifies these draft tokens
HOT_SHARE = 1.5
# a token of a prompt counts this much of one of an answer when the hot tokens are chosen
PROMPT_SHARE = 0.3


def train_draft(
    store: HiddenStateStore,
    model: DenseModel,
    hot_tokens: int,
    steps: int,
    resume: Path,
    progress: Progress,
) -> dict[str, Tensor]:
    """The draft head's tensors, with a hot vocabulary of its own."""
    lines, vocabulary = store.lines("fit"), len(model.lm_head)
    counts = torch.bincount(store.labels("fit"), minlength=vocabulary).float()
    counts += PROMPT_SHARE * torch.bincount(lines.token, minlength=vocabulary)
    order = counts.argsort(descending=True, stable=True)
    hot = order[: round(HOT_SHARE * hot_tokens)].sort().values
    progress.begin("draft head", PASSES * len(lines.token))
    fitted = fit_draft_head(
        lines, model.embedding, model.lm_head[hot], progress.advance, steps, resume=resume
    )
    fitted["hot.ids"] = hot.to(torch.int32)
    fitted["features"] = torch.tensor(store.features, dtype=torch.int32)
    return fitted


def report_draft(
    tensors: Mapping[str, Tensor], store: HiddenStateStore, model: DenseModel, steps: int
) -> dict[str, Any]:
    """What the draft head is trained on, and its hits on held-out answers, step by step."""
    head, lines = without_prefix(tensors, "eagle."), store.lines("calibrate")
    hot, dense = head["hot.ids"].long(), store.labels("calibrate")
    label = torch.full((len(lines.token),), -1)
    label[store.read("calibrate", "line.answer")] = dense
    return {
        "features": list(store.features),
        "hot_tokens": len(hot),
        "hot_coverage": float(torch.isin(dense, hot).float().mean()),
        "tokens": len(store.read("fit", "line.token")),
        "passes": PASSES,
        "steps": steps,
        "hits": draft_hits(head, lines, label, model.embedding, hot, model.lm_head[hot], steps),
    }


def fit_draft_head(
    lines: Lines,
    embedding: Tensor,
    hot_head: Tensor,
    progress: Callable[[int], None],
    steps: int = STEPS,
    passes: int = PASSES,
    resume: Path | None = None,
) -> dict[str, Tensor]:
    """The draft head's tensors; embedding [V, H], hot_head [N, H].

    At each position the head sees the token there and the features before it, and learns the hot
    probabilities of the z there. ``progress`` gets the positions of each batch; each finished pass
    is saved in ``resume``.
    """
    hidden, dtype = embedding.shape[1], embedding.dtype
    weights = _initial(hidden, lines.features.shape[1] // hidden)
    batches = _batches(lines)
    # tokens are expensive and passes few: with Muon matrices learn more from each than with Adam
    matrices, norms = ([w for w in weights.values() if w.ndim == ndim] for ndim in (2, 1))
    optimizers = (
        torch.optim.Muon(matrices, RATE, weight_decay=0.02),
        torch.optim.AdamW(norms, NORM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    )
    updates = passes * len(batches)
    targets = _targets(lines.features[:, :hidden], hot_head)
    checkpoint = PassCheckpoint(resume, weights, optimizers)
    done = checkpoint.restore()
    progress(done * len(lines.token))
    for number in range(done, passes):
        generator = torch.Generator().manual_seed(number)
        unrolled = steps if number >= passes * (1 - UNROLLED) else 1
        order = torch.randperm(len(batches), generator=generator).tolist()
        for update, index in enumerate(order, number * len(batches)):
            tokens, before, sources = _padded(batches[index], lines, generator)
            with torch.enable_grad():
                cast = {name: weight.to(dtype) for name, weight in weights.items()}
                states = unroll(tokens, before, embedding, cast, unrolled)
                loss: Any = 0.0
                for step, state in enumerate(states):
                    source = sources[:, step:]
                    real = source >= 0
                    target = [part[source[real]] for part in targets]
                    soft_loss = _SoftLoss.apply(state[:, step:][real], hot_head, *target)
                    loss = loss + DECAY**step * soft_loss
                loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            slower = min(1.0, (update + 1) / WARMUP) * max(0.01, 1 - update / updates)
            for optimizer, rate in zip(optimizers, (RATE, NORM_RATE), strict=True):
                optimizer.param_groups[0]["lr"] = rate * slower
                optimizer.step()
                optimizer.zero_grad()
            progress(sum(end - begin for begin, end in batches[index]))
        checkpoint.save(number + 1)
    return {name: weight.detach().to(dtype) for name, weight in weights.items()}


class _SoftLoss(torch.autograd.Function):
    """Cross-entropy with a few target tokens per row, without storing [n, N] for the backward pass.

    states [n, H], head [N, H], target ids and probabilities [n, K] -> mean over the rows.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(states)
        loss = torch.zeros(())
        for begin in range(0, len(states), 256):
            rows = slice(begin, begin + 256)
            probabilities = (states[rows] @ head.T).softmax(-1)
            likely = probabilities.gather(1, ids[rows])
            loss -= (targets[rows].float() * likely.float().clamp_min(1e-9).log()).sum()
            probabilities.scatter_(1, ids[rows], likely - targets[rows])
            gradient[rows] = probabilities @ head
        ctx.save_for_backward(gradient)
        return loss / max(len(states), 1)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * (outer[0] / max(len(gradient), 1)), None, None, None


@torch.no_grad()
def _targets(z: Tensor, hot_head: Tensor) -> tuple[Tensor, Tensor]:
    """The model's likeliest hot tokens [n, K] after each position, and their probabilities."""
    best = [(part @ hot_head.T).topk(min(TARGETS, len(hot_head)), -1) for part in z.split(1024)]
    probabilities = torch.cat([part.values.float().softmax(-1) for part in best])
    return torch.cat([part.indices for part in best]), probabilities.to(z.dtype)


def _initial(hidden: int, features: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes(hidden, features).items():
        value = torch.ones(shape)
        if len(shape) > 1:
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
    spans: Sequence[tuple[int, int]], lines: Lines, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, T], the features [B, T, F * H] of the position before each, and the index of each
    in ``lines`` [B, T], -1 where padded."""
    # the first token of a line has no features before it, so it makes no row
    length = max(end - begin for begin, end in spans) - 1
    source = torch.full((len(spans), length), -1)
    for row, (begin, end) in enumerate(spans):
        source[row, : end - begin - 1] = torch.arange(begin + 1, end)
    before = lines.features[(source - 1).clamp_min(0)]  # [B, T, F * H]
    noisy = torch.rand(*source.shape, 1, generator=generator) < NOISE
    noise = torch.randn(before.shape, generator=generator, dtype=before.dtype)
    scale = before.float().std(-1, keepdim=True) * 0.5 * noisy
    before = before + noise * scale.to(before.dtype)
    return lines.token[source.clamp_min(0)].long(), before, source
