"""The ``eepass::`` operators that compute a whole exit point.

Each is a chain of the operators in ``eepass.ops.exits`` and ``eepass.ops.rows`` written as one, so
that it can be one kernel. Shapes as there.
"""

import torch
from torch import Tensor

from eepass.ops.exits import predict_exit, translated
from eepass.ops.registry import define

# from a hidden state to the logits, as ``kernel_forms.HeadChain`` describes it
_TO_STATE = (
    "Tensor hidden, Tensor? scale, Tensor? down, Tensor? up, Tensor? norm_weight, Tensor? norm_bias"
)
_HEAD = "Tensor lm_head, Tensor? head_scales, Tensor? head_bias"
_NORM_FORM = "str norm, float eps, float weight_offset"
_LOGIT_FORM = "float logit_scale, float logit_cap"
_PREDICTOR = "Tensor previous, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor threshold"


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _flags(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.bool)


def _ids(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.long)


@define(
    f"exit_predictor({_TO_STATE}, {_HEAD}, Tensor draft_ids, {_PREDICTOR}, "
    f"{_NORM_FORM}, {_LOGIT_FORM}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda hidden, draft_ids: (
        _floats(hidden, len(hidden)), _floats(hidden, *draft_ids.shape),
        hidden.new_empty(hidden.shape), _flags(hidden, len(hidden)),
    ),
)  # fmt: skip
def exit_predictor(
    hidden: Tensor, scale: Tensor | None, down: Tensor | None, up: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None,
    lm_head: Tensor, head_scales: Tensor | None, head_bias: Tensor | None,
    draft_ids: Tensor, previous: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, threshold: Tensor,
    norm: str, eps: float, weight_offset: float, logit_scale: float, logit_cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """All that one exit point computes: hidden state -> probability float32 [R], draft
    probabilities float32 [R, K], normed state z [R, H], exits bool [R].

    hidden [R, H]; ``translate``'s tensors or None; final norm ``norm`` ("rms", "layer" or "none")
    with weight [H] (``weight_offset`` is added: 1 + w) and bias; lm_head [V, H], int8 with
    ``head_scales`` [V] or floating, with bias [V]; logits · logit_scale, then soft-capped unless
    ``logit_cap`` is 0; then as ``predict_exit``. ``exits`` is probability > threshold [1]: a
    non-finite hidden state never triggers an exit. In float32 between hidden and logits; z has
    hidden's dtype.
    """
    z = _normed_state(hidden, scale, down, up, norm_weight, norm_bias, norm, eps, weight_offset)
    rows = lm_head[draft_ids].float()
    logits = (rows * z.unsqueeze(1)).sum(-1)
    if head_scales is not None:
        logits = logits * head_scales[draft_ids].float()
    if head_bias is not None:
        logits = logits + head_bias[draft_ids].float()
    logits = _scaled_and_capped(logits, logit_scale, logit_cap)
    probability, probabilities = predict_exit(logits, previous, w1, b1, w2, b2)
    return probability, probabilities, z.to(hidden.dtype), probability > threshold.float()


@define(
    f"verify_head({_TO_STATE}, {_HEAD}, Tensor? hot_ids, Tensor draft_ids, "
    f"{_NORM_FORM}, {_LOGIT_FORM}, bool want_logits) -> (Tensor, Tensor, Tensor)",
    fake=lambda hidden, lm_head, want_logits: (
        _ids(hidden, len(hidden)), _flags(hidden, len(hidden)),
        _floats(hidden, len(hidden), len(lm_head) if want_logits else 0),
    ),
)  # fmt: skip
def verify_head(
    hidden: Tensor, scale: Tensor | None, down: Tensor | None, up: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None,
    lm_head: Tensor, head_scales: Tensor | None, head_bias: Tensor | None,
    hot_ids: Tensor | None, draft_ids: Tensor,
    norm: str, eps: float, weight_offset: float, logit_scale: float, logit_cap: float,
    want_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The likeliest token int64 [R] after a hidden state, whether it is among draft_ids [R, K]
    (bool [R]), and float32 logits [R, V], or [R, 0] unless ``want_logits``.

    As ``exit_predictor``, but the normed state is rounded to hidden's dtype, as in the model.
    ``lm_head`` may hold the rows of the hot vocabulary alone; ``hot_ids`` are then their token ids.
    Of equal logits the first wins and NaN is largest, as in ``torch.argmax``.
    """
    z = _normed_state(hidden, scale, down, up, norm_weight, norm_bias, norm, eps, weight_offset)
    logits = _head_logits(
        z.to(hidden.dtype), lm_head, head_scales, head_bias, logit_scale, logit_cap
    )
    best = logits.argmax(-1)
    token = best if hot_ids is None else hot_ids[best]
    known = (token[:, None] == draft_ids).any(-1)
    return token, known, logits if want_logits else logits.new_empty(len(logits), 0)


@define(
    f"draft_topk(Tensor z, {_HEAD}, Tensor? hot_ids, int k, {_LOGIT_FORM}) -> (Tensor, Tensor)",
    fake=lambda z, k: (_floats(z, len(z), k), _ids(z, len(z), k)),
)
def draft_topk(
    z: Tensor, lm_head: Tensor, head_scales: Tensor | None, head_bias: Tensor | None,
    hot_ids: Tensor | None, k: int, logit_scale: float, logit_cap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k likeliest tokens of z [R, H]: log-probabilities float32 [R, k], ids int64 [R, k].

    Sorted from the likeliest on; of equal logits the first wins; NaN is largest.
    """
    logits = _head_logits(z, lm_head, head_scales, head_bias, logit_scale, logit_cap)
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    ids = order[:, :k] if hot_ids is None else hot_ids[order[:, :k]]
    return values[:, :k] - logits.logsumexp(-1, keepdim=True), ids.contiguous()


def _normed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float, offset: float
) -> Tensor:
    if norm not in ("none", "rms", "layer"):
        raise ValueError(f"norm={norm!r}: expected none, rms or layer")
    if norm == "none":
        return x
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        x = x * (weight.float() + offset)
    return x if bias is None else x + bias.float()


def _normed_state(
    hidden: Tensor, scale: Tensor | None, down: Tensor | None, up: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, norm: str, eps: float, offset: float,
) -> Tensor:  # fmt: skip
    x = hidden.float()
    if scale is not None and down is not None and up is not None:
        x = translated(x, scale, down, up)
    return _normed(x, weight, bias, norm, eps, offset)


def _head_logits(
    z: Tensor, lm_head: Tensor, scales: Tensor | None, bias: Tensor | None,
    logit_scale: float, logit_cap: float,
) -> Tensor:  # fmt: skip
    logits = z.float() @ lm_head.float().T
    if scales is not None:
        logits = logits * scales.float()
    return _scaled_and_capped(
        logits if bias is None else logits + bias.float(), logit_scale, logit_cap
    )


def _scaled_and_capped(logits: Tensor, scale: float, cap: float) -> Tensor:
    logits = logits * scale
    return logits if cap == 0 else torch.tanh(logits / cap) * cap
