"""Operators of an exit point: translator, logits of the draft tokens, predictor.

Shapes: R rows (tokens in this pass), H hidden, V vocabulary, K draft tokens, W width of the
predictor.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from eepass.ops.registry import define


@define(
    "translate(Tensor hidden, Tensor scale, Tensor down, Tensor up) -> Tensor",
    fake=lambda hidden: torch.empty_like(hidden),
)
def translate(hidden: Tensor, scale: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Low-rank map of a hidden state to the basis of the final norm.

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


@define(
    "draft_logits(Tensor z, Tensor lm_head, Tensor? bias, Tensor draft_ids) -> Tensor",
    fake=lambda z, draft_ids: z.new_empty(draft_ids.shape, dtype=torch.float32),
)
def draft_logits(z: Tensor, lm_head: Tensor, bias: Tensor | None, draft_ids: Tensor) -> Tensor:
    """Logits of ``draft_ids`` [R, K] alone, from z [R, H] and lm_head [V, H]; float32 [R, K]."""
    rows = lm_head[draft_ids].float()  # [R, K, H]
    logits = (rows * z.float().unsqueeze(1)).sum(-1)
    return logits if bias is None else logits + bias[draft_ids].float()


@define(
    "predict_exit(Tensor logits, Tensor previous, Tensor w1, Tensor b1, Tensor w2, Tensor b2)"
    " -> (Tensor, Tensor)",
    fake=lambda logits: (logits.new_empty(logits.shape[0]), torch.empty_like(logits)),
)
def predict_exit(
    logits: Tensor, previous: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> tuple[Tensor, Tensor]:
    """Probability that an exit here is right, and the draft's probabilities for the next predictor.

    Features: logits [R, K], their softmax, and its change since ``previous`` [R, K] (zeros at the
    first active predictor of a step); MLP w1 [W, 3K], b1 [W], w2 [W], b2 [1] with ReLU and
    sigmoid -> (float32 [R], float32 [R, K]). SpecEE's predictor (arXiv 2504.08850, 4.2).
    """
    probabilities = logits.softmax(-1)
    features = torch.cat([logits, probabilities, probabilities - previous], -1)
    inner = F.relu(features @ w1.float().T + b1.float())
    score = (inner * w2.float()).sum(-1) + b2.float()
    return score.sigmoid(), probabilities
