"""Parts of a decoder as data: what fused kernels are specialised for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadChain:
    """A final norm and LM head as data:

        x = norm(hidden) · (norm_weight + weight_offset) + norm_bias
        logits = (lm_head · x + head_bias) · logit_scale, then cap · tanh(logits / cap)

    Tensors by name, "" where there is none; ``logit_cap`` 0 means no cap.
    """

    norm: Literal["none", "rms", "layer"]
    eps: float
    norm_weight: str
    norm_bias: str
    weight_offset: float
    lm_head: str
    head_bias: str
    logit_scale: float = 1.0
    logit_cap: float = 0.0


@dataclass(frozen=True, slots=True)
class Channels:
    """Which outputs of a projection are the channels [G, D] of keys or values: ``first + g · head +
    d · step``. One projection may compute queries, keys and values, in any of the usual orders."""

    first: int
    head: int
    step: int


@dataclass(frozen=True, slots=True)
class KvForm:
    """How a layer computes keys and values of a hidden state, as ``eepass::fill_kv`` takes it.

    Tensors by name, "" where there is none; ``rotary`` channels are rotated by ``cos`` and ``sin``,
    side inputs of the layer, the first half with the second or, where ``interleaved``, each with
    the next. Projections are [O, H], or [H, O] where ``transposed``.
    """

    norm: Literal["none", "rms", "layer"]
    eps: float
    weight_offset: float
    norm_weight: str
    norm_bias: str
    key_weight: str
    key_bias: str
    value_weight: str
    value_bias: str
    head_norm: str
    head_bias: str
    head_form: Literal["none", "rms", "layer"]
    cos: str
    sin: str
    rotary: int
    interleaved: bool
    groups: int
    channels: int
    key_channels: Channels
    value_channels: Channels
    transposed: bool

    def projection(self, weight: Tensor, of: Channels) -> Tensor:
        """The rows of a projection that compute ``of``, as a view [G, D, H]."""
        rows, columns = weight.stride()[::-1] if self.transposed else weight.stride()
        hidden = weight.shape[0 if self.transposed else 1]
        return weight.as_strided(
            (self.groups, self.channels, hidden), (of.head * rows, of.step * rows, columns),
            weight.storage_offset() + of.first * rows,
        )  # fmt: skip

    def bias(self, bias: Tensor, of: Channels) -> Tensor:
        """The part of a projection's bias that belongs to ``of``, as a view [G, D]."""
        (step,) = bias.stride()
        return bias.as_strided(
            (self.groups, self.channels), (of.head * step, of.step * step),
            bias.storage_offset() + of.first * step,
        )  # fmt: skip
