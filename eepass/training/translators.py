"""Train the translators: low-rank maps from a boundary to the basis of the final norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from eepass.ops import exits as exit_ops

RANK = 128
PASSES = 2
BATCH = 512
RATE = 2e-3


def fit_translator(
    boundary: Tensor,
    z: Tensor,
    norm: Callable[[Tensor], Tensor],
    hot_head: Tensor,
    progress: Callable[[int], None],
    rank: int = RANK,
    passes: int = PASSES,
) -> dict[str, Tensor]:
    """A translator from boundary [n, H] to where z [n, H] came from, by distillation.

    The loss is the cross entropy between the hot vocabulary's probabilities from z and from the
    translated state; ``norm`` is the model's final norm on [1, n, H]. Returns ``scale`` [H],
    ``down`` [rank, H], ``up`` [H, rank] in the model's dtype; ``progress`` is told rows done.
    """
    width = boundary.shape[1]
    generator = torch.Generator().manual_seed(0)
    scale = torch.ones(width, requires_grad=True)
    down = torch.randn(rank, width, generator=generator).mul_(width**-0.5).requires_grad_()
    up = torch.zeros(width, rank, requires_grad=True)
    optimizer = torch.optim.AdamW([scale, down, up], RATE, betas=(0.9, 0.98), weight_decay=0.0)
    steps = max(passes * len(boundary) // BATCH, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 50) * max(0.02, 1 - step / steps)
    )
    for _ in range(passes):
        for rows in torch.randperm(len(boundary), generator=generator).split(BATCH):
            with torch.no_grad():
                wanted = (z[rows] @ hot_head.T).float().softmax(-1)
            with torch.enable_grad():
                state = exit_ops.translate(boundary[rows], scale, down, up)
                logits = (norm(state[None])[0] @ hot_head.T).float()
                loss = F.cross_entropy(logits, wanted)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            schedule.step()
            progress(len(rows))
    dtype = boundary.dtype
    return {
        name: tensor.detach().to(dtype)
        for name, tensor in (("scale", scale), ("down", down), ("up", up))
    }
