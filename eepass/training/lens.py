"""The logit lens: what the final norm and the LM head make of the hidden state after a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from eepass.errors import InputError
from eepass.runtime.decoder.decoder import Decoder


class Lens:
    """Reads hidden states of ``decoder``; ``lm_head`` [V, H] holds plain values."""

    def __init__(self, decoder: Decoder) -> None:
        self.head = decoder.splits[1].head
        if self.head.norm is None:
            raise InputError(f"early exit is not possible here: {self.head.reason}")
        self.tensors = decoder.tensors
        self.lm_head = self.head.values(self.tensors, decoder.dtype)

    def norm(self, hidden: Tensor) -> Tensor:
        """The normed states z [n, H] of hidden states [n, H], differentiable."""
        return self.head.normed(hidden[None], self.tensors)[0]

    def transform(self, logits: Tensor) -> Tensor:
        """What the model does to its logits (a scale, a soft cap)."""
        return logits if self.head.transform is None else self.head.transform.graph(logits)

    def tokens(self, hidden: Tensor) -> Tensor:
        """The likeliest token [n] for each hidden state [n, H]."""
        return torch.cat([best_token(self.norm(h), self.lm_head) for h in hidden.split(512)])


def best_token(z: Tensor, lm_head: Tensor, candidates: int = 8) -> Tensor:
    """The row of ``lm_head`` with the largest logit for each z [n, H]: of the best ``candidates``
    by logits in the model's dtype, the best by logits in float32."""
    best = (z @ lm_head.T).topk(candidates, -1).indices  # [n, candidates]
    exact = torch.einsum("nh,nkh->nk", z.float(), lm_head[best].float())
    return best.gather(1, exact.argmax(-1, keepdim=True))[:, 0]
