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
    "spans_mask(Tensor spans, int slots, ScalarType dtype) -> Tensor",
    fake=lambda spans, slots, dtype: spans.new_empty(1, 1, len(spans), slots, dtype=dtype),
)
def spans_mask(spans: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
    """The additive mask [1, 1, R, C] over C ``slots`` that ``spans`` int64 [R, 3] stand for
    (``eepass.masks``): 0 where a row attends, else the dtype's lowest finite value."""
    first, end, bits = spans[:, :, None].unbind(1)
    slot = torch.arange(slots, device=spans.device)[None]
    on_path = ((bits >> (slot - end).clamp(0, 63)) & 1) > 0
    seen = torch.where(slot < end, slot >= first, on_path)
    mask = torch.zeros(seen.shape, dtype=dtype, device=spans.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[None, None]


@define(
    "attend_spans(Tensor q, Tensor k, Tensor v, Tensor spans, float scale) -> Tensor",
    fake=lambda q, v: q.new_empty(q.shape[0], q.shape[1], v.shape[2]),
)
def attend_spans(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, scale: float) -> Tensor:
    """``attend_rows`` with the slots that rows attend to as ``spans`` int64 [R, 3]; a bit field
    reaches 63 slots."""
    mask = spans_mask(spans, k.shape[1], torch.float32)[0, 0]
    return attend_rows(q, k, v, mask, scale)


@define(
    "prefix_mask(Tensor prefix, int rows, int slots, ScalarType dtype, Device device) -> Tensor",
    fake=lambda rows, slots, dtype, device: torch.empty(
        1, 1, rows, slots, dtype=dtype, device=device
    ),
)
def prefix_mask(
    prefix: Tensor, rows: int, slots: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The additive mask [1, 1, R, C] that a ``prefix`` stands for: int64 [3], on the host.

    R ``rows`` in contiguous slots attend to what is before them and to themselves: from slot
    ``prefix[0]`` on, the last row in the slot before ``prefix[1]``, each row ``prefix[2]`` slots
    back, itself included (−n: in chunks of n slots; 0: all).
    """
    first, end, window = prefix.tolist()
    row = torch.arange(end - rows, end, device=device)[:, None]
    slot = torch.arange(slots, device=device)[None]
    seen = (slot >= first) & (slot <= row)
    if window:
        within = slot > row - window if window > 0 else slot >= row - (row - first) % -window
        seen = seen & within
    mask = torch.zeros(seen.shape, dtype=dtype, device=device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[None, None]


@define(
    "attend_prefix(Tensor q, Tensor k, Tensor v, Tensor prefix, float scale) -> Tensor",
    fake=lambda q, v: q.new_empty(q.shape[0], q.shape[1], v.shape[2]),
)
def attend_prefix(q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, scale: float) -> Tensor:
    """Grouped attention of a chunk of a prompt by torch's own kernels, over what of the cache the
    ``prefix`` int64 [3] (see ``prefix_mask``) lets it attend to: the host knows how much that is.

    q [Q, R, D], k [G, C, D], v [G, C, E] with Q a multiple of G -> [Q, R, E]. Without a window
    there is no mask, and flash attention (Dao, 2023) aligns rows with the last slots.
    """
    # imports Dynamo, which no start of a folder needs
    from torch.nn.attention.bias import causal_lower_right

    first, end, window = prefix.tolist()
    rows, seen, heads = q.shape[1], end - first, len(q) // len(k)
    k, v = k[:, first:end], v[:, first:end]
    mask: Tensor = causal_lower_right(rows, seen)
    if window:
        within = torch.tensor([0, seen, window], device="cpu")
        mask = prefix_mask(within, rows, seen, q.dtype, q.device)
    flash = q.dtype != torch.float32 and v.shape[-1] == q.shape[-1] <= 256 and not window
    if heads > 1 and not flash:
        # of torch's kernels only flash attention lets query heads share keys
        k, v = (part.repeat_interleave(heads, 0) for part in (k, v))
    attend = F.scaled_dot_product_attention
    return attend(q[None], k[None], v[None], mask, scale=scale, enable_gqa=flash)[0]


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
