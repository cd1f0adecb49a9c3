"""How a speculative step updates its own state: draft tokens from the text, and the accept walk.

The text lies in ``history`` by position; the token at ``position`` is the last one, and has not
been through the model. A step runs it and its draft tokens, a chain, as rows at the positions from
there on. What a row computes is kept if all draft tokens up to it were right. Rows that are not
kept have written keys and values behind the last token, which the next step overwrites: there is
nothing to roll back.

Numbers come as tensors: a captured launch cannot copy anything from the host.

Shapes: C slots of the cache, R rows. All flags are bool.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eepass.runtime.step.updates import NOT_FINITE, NOTHING

# as many tokens before a place are compared as tell places apart
COMPARED = 3
COUNTED = ("passes", "tokens")


def draft(
    history: Tensor, position: Tensor, last_position: Tensor,
    ids: Tensor, positions: Tensor, rows: Tensor, known: Tensor,
) -> None:  # fmt: skip
    """The last token and its draft tokens as ``ids`` [R], at ``positions`` [R] and slots ``rows``
    [R]; ``known`` [1]: whether there are draft tokens.

    They are what followed the latest of the earlier places where most of the last ``COMPARED``
    tokens are the same; where that goes on up to now, it goes on from its beginning.
    ``last_position`` [1]: the last one the model knows.
    """
    slots = torch.arange(history.numel(), device=history.device)
    same = slots < position
    length = torch.zeros_like(slots)
    for back in range(COMPARED):
        token = history.gather(0, (position - back).clamp_min(0))
        same = same & (F.pad(history, (back, 0))[: history.numel()] == token) & (slots >= back)
        length = length + (same & (position >= back)).long()
    likeness = (length * history.numel() + slots).masked_fill(length == 0, -1)
    best, place = likeness.max(0)
    known.copy_(best[None] >= 0)
    following = torch.arange(ids.numel() - 1, device=history.device)
    at = place + 1 + following % (position - place).clamp_min(1)
    ids.copy_(torch.cat([history.gather(0, position), history.gather(0, at)]))
    row = position + torch.arange(ids.numel(), device=history.device)
    rows.copy_(row)
    # draft tokens past the end are not kept
    positions.copy_(torch.minimum(row, last_position))


def accept(
    ids: Tensor, known: Tensor, tokens: Tensor, best: Tensor, stop: Tensor, limit: Tensor,
    history: Tensor, position: Tensor, stopped: Tensor, counters: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Keep ``tokens`` [R], what follows each row, up to the first wrong draft token, the first end
    token, or position ``limit`` [1]; ``best`` [R]: their logits.

    ``out`` [R + 1]: how many are kept, and the tokens; −1 in place of one from logits that are not
    finite.
    """
    row = torch.arange(tokens.numel(), device=tokens.device)
    right = ((tokens[:-1] == ids[1:]) & known).long().cumprod(0)
    finite = torch.isfinite(best)
    ends = (tokens[:, None] == stop[None]).any(1) | ~finite
    after_an_end = (ends.long().cumsum(0) - ends.long()) > 0
    kept = (row <= right.sum()) & ~after_an_end & (row < limit - position) & ~stopped
    number = kept.sum()[None]
    target = position + 1 + row
    history.index_copy_(0, target, torch.where(kept, tokens, history.gather(0, target)))
    shown = tokens.masked_fill(~finite, NOT_FINITE).masked_fill(~kept, NOTHING)
    out.copy_(torch.cat([number, shown]))
    counters.add_(torch.cat([(~stopped).long(), number]))
    position.copy_(position + number)
    stopped.copy_(stopped | (kept & ends).any() | (position >= limit))
