"""What a source of draft tokens offers. A wrong draft token costs time, never correctness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from eepass.runtime.drafting.acceptance import EAGLE, MODEL, TEXT
from eepass.runtime.drafting.budget import Budget
from eepass.runtime.drafting.features import ReadFeatures
from eepass.runtime.drafting.tree import Tree

__all__ = ["EAGLE", "MODEL", "TEXT", "Draft"]


class Draft(Protocol):
    """A source of draft tokens for one sequence.

    ``feature_layers``: the layers whose hidden states it takes as features of each token, after the
    hidden state z before the LM head; None if it takes no features at all.
    """

    feature_layers: tuple[int, ...] | None
    # tokens a pass gives with it, and calls of its model for that, as long as nothing is measured
    expected: float
    calls: float

    def follow(self, tokens: Sequence[int]) -> None:
        """The sequence grows by ``tokens``."""
        ...

    def propose(self, root: int, budget: Budget, read: ReadFeatures) -> Tree:
        """Draft tokens after ``root``, the last token of the sequence; ``read``: features of the
        tokens before it."""
        ...

    def truncate(self, length: int) -> None:
        """The sequence is rolled back to its first ``length`` tokens."""
        ...

    def fresh(self) -> Draft:
        """The same source for another sequence."""
        ...

    def call_seconds(self) -> float:
        """Measured seconds of one call of its model."""
        ...
