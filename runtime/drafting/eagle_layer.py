"""The network of the trained draft head, EAGLE-3's (Li et al., 2025): one decoder layer.

    feature = fc · [norm(feature) ...]                         features of token t - 1
    x = [norm(embedding of token t); norm(feature)]
    h = norm(feature) + attention(x);  h += mlp(norm(h));  state = norm(h)
    the next token's log-probabilities = log_softmax(hot rows of the LM head · state)

The features of a confirmed token are the model's normed last hidden state z and its hidden states
after a few earlier layers. A draft token has none: the state of the token before it takes the place
of ``feature`` (EAGLE-3.1's ``norm_output``). Heads, their size and their rotary base are the
model's; draft tokens come from the hot vocabulary alone. So the head travels: z is the hidden state
after the last layer under a ``fc_norm`` that has the final norm's weight. Where other heads differ
is in ``HeadForm``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eepass.runtime.drafting.eagle_form import HeadForm

# names of the matrices; those that multiply the same rows may be joined to one
JOINED = {
    "fc": ("fc",), "qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"),
    "down": ("down",),
}  # fmt: skip
MATRICES = tuple(name for parts in JOINED.values() for name in parts)
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
    rotary = frequencies(base, width)
    inner = 64 * max(1, round(min(INNER * hidden, MOST_INNER) / 64))
    return HeadStyle(hidden, heads, groups, rotary, inner, features)


def frequencies(base: float, width: int) -> Tensor:
    """Inverse frequencies of rotary positions, float32 [width / 2]."""
    return base ** -(torch.arange(0, width, 2).float() / width)


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


def mixed(
    features: Tensor, weights: Mapping[str, Tensor], linear: Linear, form: HeadForm
) -> Tensor:
    """The one feature [..., H] that the features [..., F * H] of a confirmed token make; z is the
    first of them."""
    width = features.shape[-1] // (form.features + (not form.reads_z))
    if not form.reads_z:
        features = features[..., width:]
    if form.fc_norm == "together":
        features = _rms_norm(features, form, weights["input_norm"])
    elif form.fc_norm == "each":
        z, *others = features.split(width, -1)
        # z is normed already
        first = z if form.reads_z else _rms_norm(z, form)
        normed = torch.cat([first, *(_rms_norm(x, form) for x in others)], -1)
        features = normed * weights["fc_norm"]
    (made,) = linear(features, "fc")
    return made


def eagle_layer(
    embedded: Tensor,
    feature: Tensor,
    cos: Tensor,
    sin: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    weights: Mapping[str, Tensor],
    linear: Linear,
    form: HeadForm,
) -> Tensor:
    """embedded [B, T, H], feature [B, T, H] (mixed, or the state before) -> state [B, T, H].

    ``attend`` takes q [B, heads, T, D], k and v [B, groups, T, D], rotary positions applied, and
    returns q's shape.
    """
    x, hidden = entered(embedded, feature, weights, form)
    seen = attend(*projected(x, cos, sin, linear))
    return finished(hidden, seen, weights, linear, form)


def entered(
    embedded: Tensor, feature: Tensor, weights: Mapping[str, Tensor], form: HeadForm
) -> tuple[Tensor, Tensor]:
    """What attention is computed from [..., 2H], and the hidden state [..., H] it is added to."""
    hidden = _rms_norm(feature, form, weights["hidden_norm"])
    x = torch.cat([_rms_norm(embedded, form, weights["token_norm"]), hidden], -1)
    return x, hidden if form.norm_before_residual else feature


def projected(x: Tensor, cos: Tensor, sin: Tensor, linear: Linear) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, 2H] -> queries [B, heads, T, D], keys and values [B, groups, T, D]."""
    q, k, v = (_in_heads(part, cos) for part in linear(x, "qkv"))
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def finished(
    hidden: Tensor, seen: Tensor, weights: Mapping[str, Tensor], linear: Linear, form: HeadForm
) -> Tensor:
    """The state [B, T, H] after attention's result [B, heads, T, D]."""
    (out,) = linear(seen.transpose(1, 2).flatten(2), "o")
    hidden = hidden + out
    gate, up = linear(_rms_norm(hidden, form, weights["mlp_norm"]), "gate_up")
    (out,) = linear(F.silu(gate) * up, "down")
    hidden = hidden + out
    return _rms_norm(hidden, form, weights["norm"]) if form.norm_output else hidden


def for_head(state: Tensor, weights: Mapping[str, Tensor], form: HeadForm) -> Tensor:
    """What the LM head reads [..., H] of a state [..., H]."""
    return state if form.norm_output else _rms_norm(state, form, weights["norm"])


def _in_heads(x: Tensor, cos: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2)


def _rms_norm(x: Tensor, form: HeadForm, weight: Tensor | None = None) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, form.epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
