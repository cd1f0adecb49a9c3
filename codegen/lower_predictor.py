"""Decompose the predictor's operators: for one row, into sums that inductor fuses into one kernel.

    before   eepass.translate(hidden, scale, down, up)
    after    products and row sums over down [rank, H] and up [H, rank]

A matrix product of one row would be a separate call; a sum of products is a loop in the kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eepass.ops import exits as exit_ops
from eepass.ops import packed


def _rows_by(x: Tensor, weight: Tensor) -> Tensor:
    """x [1, I] · weight [O, I] -> float32 [1, O]."""
    return (x.float()[0] * weight.float()).sum(-1)[None]


def translate(hidden: Tensor, scale: Tensor, down: Tensor, up: Tensor) -> Tensor:
    if hidden.shape[0] != 1:
        return exit_ops.translate(hidden, scale, down, up)
    h = hidden.float()
    length = h.pow(2).sum(-1, keepdim=True).sqrt()
    unit = h * (h.shape[-1] ** 0.5 / length.clamp_min(1e-6))
    gate = torch.nn.functional.silu(_rows_by(unit, down))
    return (scale.float() * h + length * _rows_by(gate, up)).to(hidden.dtype)


def predict_exit(
    logits: Tensor, previous: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> tuple[Tensor, Tensor]:
    if logits.shape[0] != 1:
        return exit_ops.predict_exit(logits, previous, w1, b1, w2, b2)
    probabilities = logits.softmax(-1)
    features = torch.cat([logits, probabilities, probabilities - previous], -1)
    inner = torch.relu(_rows_by(features, w1) + b1.float())
    return ((inner * w2.float()).sum(-1) + b2.float()).sigmoid(), probabilities


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.eepass.translate.default: translate,
    torch.ops.eepass.draft_logits.default: exit_ops.draft_logits,
    torch.ops.eepass.packed_draft_logits.default: packed.packed_draft_logits,
    torch.ops.eepass.predict_exit.default: predict_exit,
}
