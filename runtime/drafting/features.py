"""What a draft head learns of tokens: hidden states of the model that it drafts for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    @classmethod
    def of(cls, rows: Tensor) -> Features:
        """``rows`` whose z are normed."""
        return cls(rows, [True] * len(rows))

    def between(self, begin: int, end: int) -> Features:
        return Features(self.rows[begin:end], self.normed[begin:end])

    def value(self, hidden_size: int, norm: Norm) -> Tensor:
        """[n, F * H] with all of z normed; H is ``hidden_size``."""
        if all(self.normed):
            return self.rows
        rows = self.rows.clone()
        if not any(self.normed):
            rows[:, :hidden_size] = norm(rows[None, :, :hidden_size])[0]
            return rows
        raw = [index for index, normed in enumerate(self.normed) if not normed]
        z = norm(rows[None, raw, :hidden_size])[0]
        rows[raw, :hidden_size] = z
        return rows


def joined(parts: Sequence[Features]) -> Features:
    """One after another."""
    if len(parts) == 1:
        return parts[0]
    return Features(
        torch.cat([part.rows for part in parts]), [n for part in parts for n in part.normed]
    )
