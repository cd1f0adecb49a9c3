"""What a draft head learns of tokens: hidden states of the model that it drafts for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# hidden states [1, n, H] after the last layer -> normed, as the LM head takes them
Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Features [n, F * H] of tokens: the hidden state z before the LM head, and those after some
    layers.

    z is normed when it is needed, which for most tokens is never: ``normed`` says by token whether
    it is, as where the token exited early; else it is the hidden state after the last layer.
    """

    rows: Tensor
    normed: list[bool]

    def __len__(self) -> int:
        return len(self.rows)

    def value(self, hidden_size: int, norm: Norm) -> Tensor:
        """[n, F * H] with all of z normed; H is ``hidden_size``."""
        if all(self.normed):
            return self.rows
        rows = self.rows.clone()
        raw: slice | list[int] = slice(None)
        if any(self.normed):
            raw = [index for index, normed in enumerate(self.normed) if not normed]
        rows[raw, :hidden_size] = norm(rows[None, raw, :hidden_size])[0]
        return rows


# features of a sequence's tokens, given the position of the first and how many: read when a draft
# is asked for, which for most tokens is never
ReadFeatures = Callable[[int, int], Features]


def before(position: int, count: int, read: ReadFeatures) -> Features:
    """Features of the token before each of ``count`` tokens from ``position`` on; before the first
    of all there is none, and zeros stand for it."""
    if position:
        return read(position - 1, count)
    own = read(0, max(count - 1, 1))
    rows = torch.cat([torch.zeros_like(own.rows[:1]), own.rows[: count - 1]])
    return Features(rows, [True, *own.normed[: count - 1]])
