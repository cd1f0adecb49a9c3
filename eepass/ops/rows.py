"""Operators over a few rows: linear layers, LM head logits, attention over a static cache.

Shapes: R rows (tokens in this pass), H hidden, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eepass.ops.registry import define


@define(
    "linear_rows(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]",
    fake=lambda x, weights: [x.new_empty(x.shape[0], w.shape[0]) for w in weights],
)
def linear_rows(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Linear layers over the same rows: x [R, I], weights [O_i, I], biases [O_i] -> [R, O_i]."""
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


@define(
    "logits_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=lambda x, weight: x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32),
)
def logits_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits x [R, H] · weight [V, H] in float32 [R, V], whatever the weights' dtype.

    Rounded to bf16, one token in seventy has two likeliest tokens.
    """
    logits = x.float() @ weight.float().T
    return logits if bias is None else logits + bias.float()


@define(
    "attend_rows(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor",
    fake=lambda q, v: q.new_empty(q.shape[0], q.shape[1], v.shape[2]),
)
def attend_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Grouped attention of a few rows over a static cache.

    q [Q, R, D], k [G, C, D], v [G, C, E] with Q a multiple of G, additive mask [R, C] whose lowest
    finite value forbids a slot -> [Q, R, E].
    """
    groups = q.shape[0] // k.shape[0]
    keys = k.float().repeat_interleave(groups, 0)
    scores = torch.einsum("qrd,qcd->qrc", q.float(), keys) * scale + mask.float()
    values = v.float().repeat_interleave(groups, 0)
    return torch.einsum("qrc,qce->qre", scores.softmax(-1), values).to(q.dtype)


@define(
    "allow_selected(Tensor mask, Tensor slots) -> Tensor", fake=lambda mask: torch.empty_like(mask)
)
def allow_selected(mask: Tensor, slots: Tensor) -> Tensor:
    """Additive ``mask`` [..., R, C] with all forbidden but ``slots`` int32 [R, K]. Each row's slots
    are in ascending order; what is left over holds -1."""
    # one more for what is left over
    chosen = mask.new_zeros(mask.shape[-2], mask.shape[-1] + 1, dtype=torch.bool)
    chosen.scatter_(1, slots.long().where(slots >= 0, mask.shape[-1]), True)
    return mask.masked_fill(~chosen[:, :-1], torch.finfo(mask.dtype).min)


@define(
    "attend_selected(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor slots, float scale)"
    " -> Tensor",
    fake=lambda q, v: q.new_empty(q.shape[0], q.shape[1], v.shape[2]),
)
def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slots: Tensor, scale: float
) -> Tensor:
    """``attend_rows`` with the mask that ``allow_selected`` makes of ``mask`` [R, C]."""
    return attend_rows(q, k, v, allow_selected(mask, slots), scale)


@define(
    "top_logits(Tensor logits, int k) -> Tensor[]",
    fake=lambda logits, k: [
        logits.new_empty(logits.shape[0], k),
        logits.new_empty(logits.shape[0], k, dtype=torch.long),
    ],
)
def top_logits(logits: Tensor, k: int) -> list[Tensor]:
    """The k largest of each row, float32 [R, N] -> values [R, k] and where they are [R, k], the
    largest first."""
    # of equal ones the first wins
    values, index = logits.sort(dim=-1, descending=True, stable=True)
    return [values[:, :k].contiguous(), index[:, :k].contiguous()]
