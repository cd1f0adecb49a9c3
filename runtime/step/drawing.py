"""Sample tokens on the device, with random numbers made from seed and position.

Options apply as in ``runtime.sampling`` and in its order: temperature, top-k (all tokens that equal
the last one stay), top-p, min-p. The token depends on logits, options, seed and position alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eepass.errors import EngineError
from eepass.runtime.sampling import Sampling

# buffers of a step that draws, in the order ``draw`` takes them
OPTIONS = ("temperature", "top_k", "top_p", "min_p", "seed")
# exit points and the LM head of one step use different random numbers
SALTS = 1 << 10


def draw(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor,
    position: Tensor, salt: Tensor, drawn: Tensor,
) -> None:  # fmt: skip
    """Sample an index of each row of ``logits`` [R, V] into ``drawn`` [R]; the argmax where
    ``temperature`` is 0. ``position`` [R]: of the rows' tokens; options are [1]."""
    heat = torch.where(temperature > 0, temperature, torch.ones_like(temperature))
    ordered, ids = (logits.double() / heat).sort(dim=-1, descending=True, stable=True)
    last = ordered.gather(-1, (top_k - 1).clamp_min(0).expand(len(ordered), 1))
    p = ordered.masked_fill((ordered < last) & (top_k > 0), -torch.inf).softmax(-1)
    # the likeliest always stays
    first = torch.arange(p.shape[-1], device=p.device)[None] == 0
    p = p.masked_fill((p.cumsum(-1) - p >= top_p) & ~first, 0)
    p = p.masked_fill(p < min_p * p[:, :1], 0)
    ends = p.cumsum(-1)
    number = uniform(seed, position * SALTS + salt)
    passed = (ends <= number[:, None] * ends[:, -1:]).sum(-1, keepdim=True)
    # rounding must not lead past the last token with a probability above zero
    place = torch.minimum(passed, (p > 0).sum(-1, keepdim=True) - 1)
    token = ids.gather(-1, place)[:, 0]
    drawn.copy_(torch.where(temperature > 0, token, logits.argmax(-1)))


def uniform(seed: Tensor, number: Tensor) -> Tensor:
    """A float64 from 0 to below 1 for each ``number`` [R] of a ``seed`` [1] (both int64)."""
    # a counter through the finaliser of splitmix64 (Steele, Lea, Flood 2014), in wrapping int64
    x = seed + (number + 1) * -7046029254386353131
    x = (x ^ _right(x, 30)) * -4658895280553007687
    x = (x ^ _right(x, 27)) * -7723592293110705685
    x = x ^ _right(x, 31)
    return _right(x, 11).double() * 2.0**-53


def _right(x: Tensor, bits: int) -> Tensor:
    """``x`` shifted right as an unsigned number."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def option_values(sampling: Sampling) -> dict[str, float]:
    """What a step's buffers hold for ``sampling``; ``EngineError`` for what a step cannot do."""
    if sampling.repetition_penalty != 1 or sampling.process is not None:
        raise EngineError(
            "a captured step has no repetition_penalty and no process: leave launch= out"
        )
    seed = torch.Generator().seed() % 2**62 if sampling.seed is None else sampling.seed
    values = {name: getattr(sampling, name) for name in OPTIONS[:-1]}
    return {**values, "seed": seed}
