"""Train the predictors on what they see when the model decodes.

The label differs from the paper's code: an exit is right when the token that verification finds
there is the dense one and among the draft tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eepass.ops import exits as exit_ops
from eepass.training.calibration import ExitScores

WIDTH = 512
PASSES = 8
BATCH = 1024
RATE = 2e-3
# tensors of one predictor
NAMES = ("w1", "b1", "w2", "b2")


@dataclass(slots=True)
class ExitData:
    """What n tokens are like at each exit, by layer: ``logits`` [n, K] of the draft tokens;
    ``verified`` [n]: whether the verified token is a draft token; ``right`` [n]: whether it is the
    dense token."""

    layers: tuple[int, ...]
    logits: dict[int, Tensor]
    verified: dict[int, Tensor]
    right: dict[int, Tensor]


def fit_predictors(
    data: ExitData, progress: Callable[[int], None], passes: int = PASSES
) -> dict[str, Tensor]:
    """One MLP per exit: ``<layer>.w1`` [W, 3K], ``.b1`` [W], ``.w2`` [W], ``.b2`` [1], float32.

    Which predictor is evaluated before this one in a step depends on the schedule: each example
    draws it from the earlier exits, or none.
    """
    generator = torch.Generator().manual_seed(0)
    probabilities = {layer: data.logits[layer].softmax(-1) for layer in data.layers}
    fitted: dict[str, Tensor] = {}
    for index, layer in enumerate(data.layers):
        logits, now = data.logits[layer], probabilities[layer]
        count, k = logits.shape
        label = (data.verified[layer] & data.right[layer]).float()
        w1 = (torch.randn(WIDTH, 3 * k, generator=generator) * (3 * k) ** -0.5).requires_grad_()
        b1 = torch.zeros(WIDTH, requires_grad=True)
        w2 = (torch.randn(WIDTH, generator=generator) * WIDTH**-0.5).requires_grad_()
        b2 = torch.zeros(1, requires_grad=True)
        parameters = [w1, b1, w2, b2]
        optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.01)
        # the rate falls to zero, so that the scores settle in the last pass
        steps = passes * -(-count // BATCH)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        earlier = torch.stack(
            [torch.zeros_like(now)] + [probabilities[other] for other in data.layers[:index]]
        )
        for _ in range(passes):
            for rows in torch.randperm(count, generator=generator).split(BATCH):
                # the nearest exits before this one are the likeliest to be active
                back = torch.empty(len(rows)).exponential_(0.7, generator=generator).long()
                previous = earlier[(index - back).clamp_min(0), rows]
                with torch.enable_grad():
                    probability, _ = exit_ops.predict_exit(logits[rows], previous, *parameters)
                    loss = F.binary_cross_entropy(probability, label[rows])
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
                schedule.step()
                progress(len(rows))
        for name, parameter in zip(NAMES, parameters, strict=True):
            fitted[f"{layer}.{name}"] = parameter.detach()
    return fitted


@torch.no_grad()
def score_exits(data: ExitData, fitted: Mapping[str, Tensor]) -> ExitScores:
    """The predictors' probabilities, as if each exit were evaluated right after the one before."""
    rows = []
    previous = torch.zeros_like(data.logits[data.layers[0]])
    for layer in data.layers:
        mlp = [fitted[f"{layer}.{name}"] for name in NAMES]
        probability, previous = exit_ops.predict_exit(data.logits[layer], previous, *mlp)
        rows.append(probability)
    verified, right = (
        torch.stack([by_layer[layer] for layer in data.layers])
        for by_layer in (data.verified, data.right)
    )
    return ExitScores(data.layers, torch.stack(rows), verified, right)
