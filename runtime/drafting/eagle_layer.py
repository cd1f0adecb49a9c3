"""The network of the trained draft head, EAGLE-3's (Li et al., 2025): one decoder layer.

    feature = fc · [norm(feature) ...]                         features of token t - 1
    x = [norm(embedding of token t); norm(feature)]
    h = norm(feature) + attention(x);  h += mlp(norm(h));  state = norm(h)
    the next token's log-probabilities = log_softmax(hot rows of the LM head · state)

The features of a confirmed token are the model's normed last hidden state z and its hidden states
after a few earlier layers. A draft token has none: the state of the token before it takes the place
of ``feature`` (EAGLE-3.1's ``norm_output``). Heads, their size and their rotary base are the
model's; draft tokens come from the hot vocabulary alone. So the head travels: z is the hidden state
after the last layer under a ``fc_norm`` that has the final norm's weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# names of the matrices; those that multiply the same rows may be joined to one
JOINED = {
    "fc": ("fc",), "qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"),
    "down": ("down",),
}  # fmt: skip
MATRICES = tuple(name for parts in JOINED.values() for name in parts)
# ``rotary`` are the angles' inverse frequencies
NORMS = ("fc_norm", "token_norm", "hidden_norm", "mlp_norm", "norm")
# how many confirmed tokens a row attends to; answers in training are no longer
WINDOW = 512
EPSILON = 1e-5
# width of the MLP, in widths of the model, and at most
INNER, MOST_INNER = 8 / 3, 2560


@dataclass(frozen=True, slots=True)
class HeadStyle:
    """What a draft head has of its model: width, query and key heads and their width, and the
    inverse frequencies of rotary positions, float32 [head width / 2]; besides, the width of its
    MLP and how many features a token has."""

    hidden: int
    heads: int
    groups: int
    rotary: Tensor
    inner: int
    features: int = 3

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the head's trained tensors."""
        hidden, inner, width = self.hidden, self.inner, 2 * len(self.rotary)
        q, kv = self.heads * width, self.groups * width
        return {
            "fc": (hidden, self.features * hidden),
            "q": (q, 2 * hidden),
            "k": (kv, 2 * hidden),
            "v": (kv, 2 * hidden),
            "o": (hidden, q),
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
            "fc_norm": (self.features * hidden,),
            "token_norm": (hidden,),
            "hidden_norm": (hidden,),
            "mlp_norm": (hidden,),
            "norm": (hidden,),
        }


def style_of(config: Any, features: int = 3) -> HeadStyle:
    """The style of a draft head for the model of a Hugging Face ``config``.

    Positions are not scaled as the model's may be: a draft head sees a window.
    """
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or hidden // heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    found = getattr(config, "rope_parameters", None) or {}
    found = found.get("full_attention", found)
    base = float(found.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
    rotary = base ** -(torch.arange(0, width, 2).float() / width)
    inner = 64 * max(1, round(min(INNER * hidden, MOST_INNER) / 64))
    return HeadStyle(hidden, heads, groups, rotary, inner, features)


def rotary(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [R, head width] of rotary positions [R]."""
    angle = positions.float()[:, None] * frequencies
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


# products of rows with the matrices of a ``JOINED`` name, one after another
Linear = Callable[[Tensor, str], Sequence[Tensor]]


def plain(weights: Mapping[str, Tensor]) -> Linear:
    """Products with ``weights`` as they are."""
    return lambda x, name: [F.linear(x, weights[part]) for part in JOINED[name]]


def mixed(features: Tensor, weights: Mapping[str, Tensor], linear: Linear) -> Tensor:
    """The one feature [..., H] that the features [..., F * H] of a confirmed token make."""
    count = len(weights["fc_norm"]) // len(weights["norm"])
    z, *others = features.chunk(count, -1)
    # z is normed already
    normed = torch.cat([z, *(_rms_norm(x) for x in others)], -1)
    (made,) = linear(normed * weights["fc_norm"], "fc")
    return made


def eagle_layer(
    embedded: Tensor,
    feature: Tensor,
    cos: Tensor,
    sin: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    weights: Mapping[str, Tensor],
    linear: Linear,
) -> Tensor:
    """embedded [B, T, H], feature [B, T, H] (mixed, or the state before) -> state [B, T, H].

    ``attend`` takes q [B, heads, T, D], k and v [B, groups, T, D], rotary positions applied, and
    returns q's shape.
    """
    x, hidden = entered(embedded, feature, weights)
    seen = attend(*projected(x, cos, sin, linear))
    return finished(hidden, seen, weights, linear)


def entered(
    embedded: Tensor, feature: Tensor, weights: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """What attention is computed from [..., 2H], and the hidden state [..., H] it is added to."""
    hidden = _rms_norm(feature, weights["hidden_norm"])
    return torch.cat([_rms_norm(embedded, weights["token_norm"]), hidden], -1), hidden


def projected(x: Tensor, cos: Tensor, sin: Tensor, linear: Linear) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, 2H] -> queries [B, heads, T, D], keys and values [B, groups, T, D]."""
    q, k, v = (_in_heads(part, cos) for part in linear(x, "qkv"))
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def finished(hidden: Tensor, seen: Tensor, weights: Mapping[str, Tensor], linear: Linear) -> Tensor:
    """The state [B, T, H] after attention's result [B, heads, T, D]."""
    (out,) = linear(seen.transpose(1, 2).flatten(2), "o")
    hidden = hidden + out
    gate, up = linear(_rms_norm(hidden, weights["mlp_norm"]), "gate_up")
    (out,) = linear(F.silu(gate) * up, "down")
    return _rms_norm(hidden + out, weights["norm"])


def _in_heads(x: Tensor, cos: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2)


def _rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPSILON)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
