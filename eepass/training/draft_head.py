"""Train the draft head on sequences of the model: prompts and its own answers.

A draft is made of drafts: from the second step on, the head is fed its own state in place of the
model's features. Training does the same, ``steps`` times over every position at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from eepass.files import write_tensors_atomically
from eepass.runtime.drafting.eagle_layer import shapes
from eepass.training.unrolling import Lines, unroll

STEPS = 4
PASSES = 4
# so many of the passes, at the end, unroll: one step costs a fourth, and comes first anyway
UNROLLED = 0.5
BATCH_ROWS = 2048
RATE = 0.02
NORM_RATE = 1e-3
WARMUP = 20
# each further step counts less: it is only reached where the one before was right
DECAY = 0.8
# share of the features replaced by a noisy copy: at run time z comes from an exit as often as not
NOISE = 0.1
# likeliest hot tokens that stand for the model's distribution
WANTED = 32


class _Batch(NamedTuple):
    tokens: Tensor  # [B, T]
    before: Tensor  # [B, T, F * H]: features of the position before each
    source: Tensor  # [B, T]: place of each in the lines, or -1


def fit_draft_head(
    lines: Lines,
    embedding: Tensor,
    hot_head: Tensor,
    progress: Callable[[int], None],
    steps: int = STEPS,
    passes: int = PASSES,
    resume: Path | None = None,
) -> dict[str, Tensor]:
    """The draft head's tensors.

    embedding [V, H]; hot_head [N, H]. At each position the head sees the token there and the
    features before it, and learns the hot probabilities of the z there. ``progress`` is told the
    positions done, ``passes`` times all of them; each finished pass is kept in ``resume``.
    """
    hidden, dtype = embedding.shape[1], embedding.dtype
    weights = _initial(hidden, lines.features.shape[1] // hidden)
    batches = _batches(lines)
    optimizers = _optimizers(weights)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    updates = passes * len(batches)
    wanted = _wanted(lines.features[:, :hidden], hot_head)
    done = _restore(resume, weights, optimizers)
    progress(done * len(lines.token))
    for number in range(done, passes):
        generator = torch.Generator().manual_seed(number)
        unrolled = steps if number >= passes * (1 - UNROLLED) else 1
        order = torch.randperm(len(batches), generator=generator).tolist()
        for update, index in enumerate(order, number * len(batches)):
            batch = _gathered(batches[index], lines, generator)
            with torch.enable_grad():
                cast = {name: weight.to(dtype) for name, weight in weights.items()}
                states = unroll(batch.tokens, batch.before, embedding, cast, unrolled)
                loss: Any = 0.0
                for step, state in enumerate(states):
                    known = batch.source[:, step:]
                    real = known >= 0
                    share = [part[known[real]] for part in wanted]
                    loss = loss + DECAY**step * _SoftLoss.apply(
                        state[:, step:][real], hot_head, *share
                    )
                loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            slower = min(1.0, (update + 1) / WARMUP) * max(0.01, 1 - update / updates)
            for optimizer, rate in zip(optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * slower
                optimizer.step()
                optimizer.zero_grad()
            progress(sum(end - begin for begin, end in batches[index]))
        _keep(resume, number + 1, weights, optimizers)
    return {name: weight.detach().to(dtype) for name, weight in weights.items()}


class _SoftLoss(torch.autograd.Function):
    """Cross-entropy with a few wanted tokens per row, without keeping [n, N] for the way back.

    states [n, H], head [N, H], wanted ids and probabilities [n, K] -> mean over the rows.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, ids: Tensor, wanted: Tensor) -> Tensor:
        gradient = torch.empty_like(states)
        loss = torch.zeros(())
        for rows in torch.arange(len(states)).split(256):
            first, last = int(rows[0]), int(rows[-1]) + 1
            target = wanted[first:last]
            found = (states[first:last] @ head.T).softmax(-1)
            likely = found.gather(1, ids[first:last])
            loss -= (target.float() * likely.float().clamp_min(1e-9).log()).sum()
            found.scatter_(1, ids[first:last], likely - target)
            gradient[first:last] = found @ head
        ctx.save_for_backward(gradient)
        return loss / max(len(states), 1)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * (outer[0] / max(len(gradient), 1)), None, None, None


@torch.no_grad()
def _wanted(z: Tensor, hot_head: Tensor) -> tuple[Tensor, Tensor]:
    """The model's likeliest hot tokens [n, K] after each position, and their probabilities."""
    best = [(part @ hot_head.T).topk(min(WANTED, len(hot_head)), -1) for part in z.split(1024)]
    wanted = torch.cat([part.values.float().softmax(-1) for part in best])
    return torch.cat([part.indices for part in best]), wanted.to(z.dtype)


def _initial(hidden: int, features: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes(hidden, features).items():
        value = torch.ones(shape)
        if len(shape) > 1:
            value = torch.randn(shape, generator=generator) * shape[1] ** -0.5
            value = value * (0.2 if name in ("o", "down") else 1.0)
        weights[name] = value.requires_grad_()
    return weights


def _optimizers(weights: dict[str, Tensor]) -> list[torch.optim.Optimizer]:
    matrices = [weight for weight in weights.values() if weight.ndim == 2]
    norms = [weight for weight in weights.values() if weight.ndim == 1]
    # tokens are dear and passes few: matrices learn more from each this way than with Adam
    return [
        torch.optim.Muon(matrices, RATE, weight_decay=0.02),
        torch.optim.AdamW(norms, NORM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _batches(lines: Lines) -> list[list[tuple[int, int]]]:
    """Sequences of like length together, so many that they are about ``BATCH_ROWS`` rows."""
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


def _gathered(spans: Sequence[tuple[int, int]], lines: Lines, generator: torch.Generator) -> _Batch:
    # nothing stands before the first token of a line, so it makes no row
    length = max(end - begin for begin, end in spans) - 1
    source = torch.full((len(spans), length), -1)
    for row, (begin, end) in enumerate(spans):
        source[row, : end - begin - 1] = torch.arange(begin + 1, end)
    before = lines.features[(source - 1).clamp_min(0)]  # [B, T, F * H]
    noisy = torch.rand(*source.shape, 1, generator=generator) < NOISE
    noise = torch.randn(before.shape, generator=generator, dtype=before.dtype)
    scale = before.float().std(-1, keepdim=True) * 0.5 * noisy
    before = before + noise * scale.to(before.dtype)
    return _Batch(lines.token[source.clamp_min(0)].long(), before, source)


def _keep(
    path: Path | None,
    done: int,
    weights: dict[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    if path is None:
        return
    tensors = {f"weight.{name}": weight.detach() for name, weight in weights.items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{number}.{index}.{n}": torch.as_tensor(v) for n, v in state.items()}
    write_tensors_atomically(path, {**tensors, "passes": torch.tensor(done)})


def _restore(
    path: Path | None,
    weights: dict[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
) -> int:
    """Passes done before, after which ``weights`` and ``optimizers`` are as they were then."""
    if path is None or not path.exists():
        return 0
    tensors = load_file(path)
    for name, weight in weights.items():
        weight.data.copy_(tensors[f"weight.{name}"])
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, tensor in tensors.items():
        owner, *rest = name.split(".", 2)
        if owner.isdecimal():
            states[int(owner)].setdefault(int(rest[0]), {})[rest[1]] = tensor
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(tensors["passes"])
