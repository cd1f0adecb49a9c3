"""Draft tokens from the text: what followed the latest of the places most like this one.

The text lies in ``history`` [C + 1] by position; the token at ``position`` is the last one.
Numbers come as tensors: a captured launch cannot copy anything from the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# as many tokens before a place are compared as tell places apart
COMPARED = 3


def draft(
    history: Tensor, position: Tensor, ids: Tensor, parents: Tensor, known: Tensor,
    *, branches: tuple[int, ...], first: int,
) -> None:  # fmt: skip
    """``ids`` [T] of draft tokens in rows from ``first`` on, the rows above them ``parents`` [T],
    and whether there are such tokens, ``known`` [T].

    Each of the ``branches`` is a chain of so many tokens after the last one, T together. It is what
    followed the latest of the earlier places where most of the last ``COMPARED`` tokens are the
    same, and where another token followed than begins the branches before it. Where that goes on up
    to now, it goes on from its beginning.
    """
    slots = torch.arange(history.numel(), device=history.device)
    likeness = _likeness(history, position, slots)
    following = F.pad(history[1:], (0, 1))
    places, found, above = [], [], []
    for length in branches:
        best, place = likeness.max(0)
        step = torch.arange(length, device=history.device)
        places.append(place + 1 + step % (position - place).clamp_min(1))
        found.append((best >= 0).expand(length))
        above.append((first + step - 1).masked_fill(step == 0, 0))
        first += length
        likeness = likeness.masked_fill(following == history.gather(0, place[None] + 1), -1)
    ids.copy_(history.gather(0, torch.cat(places)))
    known.copy_(torch.cat(found))
    parents.copy_(torch.cat(above))


def _likeness(history: Tensor, position: Tensor, slots: Tensor) -> Tensor:
    """How like the text's end each place is: longer matches first, then later places; −1 where
    nothing is the same."""
    same = slots < position
    length = torch.zeros_like(slots)
    for back in range(COMPARED):
        token = history.gather(0, (position - back).clamp_min(0))
        same = same & (F.pad(history, (back, 0))[: history.numel()] == token) & (slots >= back)
        length = length + (same & (position >= back)).long()
    return (length * history.numel() + slots).masked_fill(length == 0, -1)
