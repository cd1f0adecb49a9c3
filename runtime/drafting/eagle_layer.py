"""The layer of the trained draft head: one decoder layer over tokens and the model's features.

    x  = embed · norm(embedding of token t) + mix · [norm(feature) ...]     features of token t - 1
    x += attention(norm(x));  x += mlp(norm(x));  state = norm(x)
    the next token's log-probabilities = log_softmax(hot rows of the LM head · state)

The features of a confirmed token are the model's normed last hidden state z and its hidden states
after a few earlier layers. A draft token has none: ``carry · state`` of the token before it takes
their place. After EAGLE-3 (Li et al., 2025), with draft tokens from the hot vocabulary alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_WIDTH = 64
LAYER = ("embed", "q", "k", "v", "o", "gate", "up", "down", "norm1", "norm2", "norm3")
# how many confirmed tokens a row attends to; answers in training are no longer
WINDOW = 512


def shapes(hidden: int, features: int = 1) -> dict[str, tuple[int, ...]]:
    """Shapes of the head's tensors for a model of width ``hidden``, with so many features."""
    width = max(hidden // HEAD_WIDTH, 1) * HEAD_WIDTH
    inner = -(-hidden * 8 // 3 // 64) * 64
    return {
        "embed": (hidden, hidden),
        "mix": (hidden, features * hidden),
        "carry": (hidden, hidden),
        "q": (width, hidden),
        "k": (width, hidden),
        "v": (width, hidden),
        "o": (hidden, width),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
        "norm1": (hidden,),
        "norm2": (hidden,),
        "norm3": (hidden,),
    }


def rotary(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [R, 64] of rotary positions [R]."""
    half = torch.arange(0, HEAD_WIDTH, 2, device=positions.device).float()
    angle = positions.float()[:, None] * 10000.0 ** (-half / HEAD_WIDTH)
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def mixed(features: Tensor, mix: Tensor) -> Tensor:
    """What the features [..., F * H] of a confirmed token add to its row [..., H]."""
    apart = features.unflatten(-1, (-1, mix.shape[0]))
    return F.linear(_rms_norm(apart).flatten(-2), mix)


def eagle_layer(
    embedded: Tensor,
    feature: Tensor,
    cos: Tensor,
    sin: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    weights: Mapping[str, Tensor],
) -> Tensor:
    """embedded [B, T, H], feature [B, T, H] (mixed or carried) -> state [B, T, H].

    ``attend`` takes q, k, v [B, heads, T, 64], rotary positions applied, and returns q's shape.
    """
    x = F.linear(_rms_norm(embedded), weights["embed"]) + feature
    normed = _rms_norm(x, weights["norm1"])
    batch, length, _ = x.shape
    q, k, v = (
        F.linear(normed, weights[name]).view(batch, length, -1, HEAD_WIDTH).transpose(1, 2)
        for name in "qkv"
    )
    seen = attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
    x = x + F.linear(seen.transpose(1, 2).reshape(batch, length, -1), weights["o"])
    normed = _rms_norm(x, weights["norm2"])
    inner = F.silu(F.linear(normed, weights["gate"])) * F.linear(normed, weights["up"])
    return _rms_norm(x + F.linear(inner, weights["down"]), weights["norm3"])


def _rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = HEAD_WIDTH // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin
