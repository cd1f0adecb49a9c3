"""The ``eepass::`` operators and what they mean.

Each definition here is the reference: plain PyTorch, any device, any row count. ``codegen``
registers faster kernels for the same operators; tests compare them with these. Defined through
``torch.library.Library``, since ``custom_op`` imports all of Dynamo on its first call.

Shapes: R rows (tokens in this pass), H hidden, V vocabulary, N tokens of the hot vocabulary,
K draft tokens, W width of the predictor.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_library = torch.library.Library("eepass", "DEF")
# what each operator means, by its overload: for those who need a graph without them
MEANINGS: dict[Any, Callable[..., Any]] = {}


def define(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define ``schema`` with the decorated function as its meaning on every device."""

    def register(meaning: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(")[0]
        _library.define(schema)
        _library.impl(name, meaning, "CompositeExplicitAutograd")
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.eepass, packet), overload or "default")
        MEANINGS[operator] = meaning
        return meaning

    return register


@define("linear_rows(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]")
def linear_rows(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Linear layers over the same rows: x [R, I], weights [O_i, I], biases [O_i] -> [R, O_i]."""
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


@define("logits_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
def logits_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits x [R, H] · weight [V, H] in float32 [R, V], whatever the weights' dtype.

    Rounded to bf16, one token in seventy has two likeliest tokens.
    """
    logits = x.float() @ weight.float().T
    return logits if bias is None else logits + bias.float()


@define("attend_rows(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor")
def attend_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Grouped attention of few rows over a static cache.

    q [Q, R, D], k [G, C, D], v [G, C, E] with Q a multiple of G, additive mask [R, C] whose lowest
    finite value forbids a slot -> [Q, R, E].
    """
    groups = q.shape[0] // k.shape[0]
    keys = k.float().repeat_interleave(groups, 0)
    scores = torch.einsum("qrd,qcd->qrc", q.float(), keys) * scale + mask.float()
    values = v.float().repeat_interleave(groups, 0)
    return torch.einsum("qrc,qce->qre", scores.softmax(-1), values).to(q.dtype)


@define("translate(Tensor hidden, Tensor scale, Tensor down, Tensor up) -> Tensor")
def translate(hidden: Tensor, scale: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Low-rank map of a boundary to the basis of the final norm.

    s ⊙ h + ‖h‖ · B silu(A h/‖h‖·√H): hidden [R, H], scale [H], down A [rank, H], up B [H, rank]
    -> [R, H]. After the tuned lens of Belrose et al., 2023, in low rank and with a gate.
    """
    return translated(hidden.float(), scale, down, up).to(hidden.dtype)


def translated(h: Tensor, scale: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """``translate`` of h float32, not rounded."""
    length = h.norm(dim=-1, keepdim=True)
    unit = h * (h.shape[-1] ** 0.5 / length.clamp_min(1e-6))
    gate = F.silu(unit @ down.float().T)
    return scale.float() * h + length * (gate @ up.float().T)


@define("draft_logits(Tensor z, Tensor lm_head, Tensor? bias, Tensor draft_ids) -> Tensor")
def draft_logits(z: Tensor, lm_head: Tensor, bias: Tensor | None, draft_ids: Tensor) -> Tensor:
    """Logits of ``draft_ids`` [R, K] alone, from z [R, H] and lm_head [V, H]; float32 [R, K]."""
    rows = lm_head[draft_ids].float()  # [R, K, H]
    logits = (rows * z.float().unsqueeze(1)).sum(-1)
    return logits if bias is None else logits + bias[draft_ids].float()


@define(
    "predict_exit(Tensor logits, Tensor previous, Tensor w1, Tensor b1, Tensor w2, Tensor b2)"
    " -> (Tensor, Tensor)"
)
def predict_exit(
    logits: Tensor, previous: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> tuple[Tensor, Tensor]:
    """Probability that leaving here is right, and the draft's probabilities for the next predictor.

    Features: logits [R, K], their softmax, and its change since ``previous`` [R, K] (zeros at the
    first active predictor of a step); MLP w1 [W, 3K], b1 [W], w2 [W], b2 [1] with ReLU and
    sigmoid -> (float32 [R], float32 [R, K]). SpecEE's predictor (arXiv 2504.08850, 4.2).
    """
    probabilities = logits.softmax(-1)
    features = torch.cat([logits, probabilities, probabilities - previous], -1)
    inner = F.relu(features @ w1.float().T + b1.float())
    score = (inner * w2.float()).sum(-1) + b2.float()
    return score.sigmoid(), probabilities


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What operator ``name`` gives for fake tensors: the decorated function."""
    return torch.library.register_fake(f"eepass::{name}", lib=_library)


@fake("linear_rows")
def _(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


@fake("logits_rows")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@fake("attend_rows")
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


@fake("translate")
def _(hidden: Tensor, scale: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(hidden)


@fake("draft_logits")
def _(z: Tensor, lm_head: Tensor, bias: Tensor | None, draft_ids: Tensor) -> Tensor:
    return z.new_empty(draft_ids.shape, dtype=torch.float32)


@fake("predict_exit")
def _(
    logits: Tensor, previous: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0]), torch.empty_like(logits)
