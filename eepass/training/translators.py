"""Train the translators: low-rank maps from a hidden state to the basis of the final norm."""

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
    hidden: Tensor,
    z: Tensor,
    norm: Callable[[Tensor], Tensor],
    hot_head: Tensor,
    progress: Callable[[int], None],
    rank: int = RANK,
    passes: int = PASSES,
) -> dict[str, Tensor]:
    """A translator for hidden states [n, H] of tokens whose last, normed states are z [n, H].

    The loss is the cross entropy between the hot vocabulary's probabilities from z and from the
    translated state; ``norm`` is the model's final norm on [n, H]. Returns ``scale`` [H], ``down``
    [rank, H], ``up`` [H, rank] in the model's dtype; ``progress`` gets the rows of each batch.
    """
    width = hidden.shape[1]
    generator = torch.Generator().manual_seed(0)
    scale = torch.ones(width, requires_grad=True)
    down = torch.randn(rank, width, generator=generator).mul_(width**-0.5).requires_grad_()
    up = torch.zeros(width, rank, requires_grad=True)
    optimizer = torch.optim.AdamW([scale, down, up], RATE, betas=(0.9, 0.98), weight_decay=0.0)
    steps = max(passes * len(hidden) // BATCH, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 50) * max(0.02, 1 - step / steps)
    )
    for _ in range(passes):
        for rows in torch.randperm(len(hidden), generator=generator).split(BATCH):
            with torch.no_grad():
                target = (z[rows] @ hot_head.T).float().softmax(-1)
            with torch.enable_grad():
                state = exit_ops.translate(hidden[rows], scale, down, up)
                logits = (norm(state) @ hot_head.T).float()
                loss = F.cross_entropy(logits, target)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            schedule.step()
            progress(len(rows))
    tensors = {"scale": scale, "down": down, "up": up}
    return {name: tensor.detach().to(hidden.dtype) for name, tensor in tensors.items()}
