"""What a head takes from the model it is for, as the engine reads it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eepass.checkpoints.artifact import fingerprint
from eepass.drafts.read_head import Target
from eepass.segments import SplitDecoder

# a power of two whose square makes the epsilon of a norm vanish
LARGE = 1024.0


def target_of(model: Any, split: SplitDecoder) -> Target:
    """Of the Hugging Face ``model``, with its ``split``."""
    known, head = fingerprint(model), split.head
    return Target(
        depth=known["layers"],
        hidden=known["hidden"],
        vocabulary=known["vocabulary"],
        embedding=model.get_input_embeddings().weight.detach(),
        lm_head=head.values(split.tensors, split.hidden_example.dtype),
        final_norm=_final_norm(model, split),
    )


@torch.no_grad()
def _final_norm(model: Any, split: SplitDecoder) -> Tensor | None:
    """The weight [H] of the model's final norm where that is an RMS norm times one of its
    parameters; else None."""
    head, like, tensors = split.head, split.hidden_example, split.tensors
    if head.norm is None:
        return None
    hidden, place = like.shape[-1], tensors[head.weight].device
    ones = torch.full((1, 1, hidden), LARGE, dtype=like.dtype, device=place)
    weight = head.normed(ones, tensors)[0, 0]
    own = (p for p in model.parameters() if p.shape == weight.shape)
    if not any(torch.equal(p, weight) for p in own):
        return None
    x = LARGE * torch.randn(1, 4, hidden, generator=torch.Generator().manual_seed(0))
    x = x.to(place, like.dtype)
    wanted = F.rms_norm(x.float(), (hidden,), weight.float())
    close = torch.allclose(head.normed(x, tensors).float(), wanted, rtol=0.02, atol=1e-4)
    return weight if close else None
