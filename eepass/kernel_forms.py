"""Parts of a decoder as data: what fused kernels are specialised for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
