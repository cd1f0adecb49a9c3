"""The exit plan: where tokens may exit, how that is decided, what runs there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from eepass.kernel_forms import HeadChain
from eepass.segments import Segment


@dataclass(slots=True)
class ExitSegments:
    """What runs at exit points besides layers, for R rows.

    ``predictors[layer]``: hidden, draft, previous -> probability [R], draft probabilities [R, K],
    normed state z [1, R, H] (fused ones return more after these). ``verify`` and ``draft``: z ->
    logits over the hot (or the whole) vocabulary, float32 [1, R, N]. ``normed``: hidden -> z after
    the draft layer.
    """

    predictors: Mapping[int, Segment]
    verify: Segment
    draft: Segment
    normed: Segment


@dataclass(slots=True)
class FusedExits:
    """Exit points as one operator each, for R rows; ``chain`` is what they are specialised for.

    ``predictors[layer]``: hidden [1, R, H], draft, previous -> probability [R], draft probabilities
    [R, K], z [1, R, H], exits bool [R]. ``verify``: z, draft -> token [R], whether it is in the
    draft [R]; ``final``: the same from the last hidden state. Both over the plan's vocabulary.
    ``draft``: z -> the draft tokens' log-probabilities and ids [R, K], most likely first.
    """

    chain: HeadChain
    predictors: Mapping[int, Segment]
    verify: Segment
    final: Segment
    draft: Segment


@dataclass(frozen=True, slots=True)
class ExitPoint:
    """A layer after which a token may exit, counted from 1."""

    layer: int
    translated: bool
    threshold: float


@dataclass(frozen=True, slots=True)
class ExitPlan:
    """Where tokens may exit and how that is decided; what the passes and the engine share."""

    num_layers: int
    draft_layer: int
    draft_tokens: int
    exits: tuple[ExitPoint, ...]
    verify: Literal["hot", "full"]
    kv_policy: Literal["defer", "propagate", "drop"]
    ranking: tuple[int, ...] = field(default=())

    def threshold_tensors(self) -> dict[str, Tensor]:
        """The tensors fused predictors read their thresholds from, float32 [1]."""
        return {f"predictor.{p.layer}.threshold": torch.tensor([p.threshold]) for p in self.exits}

    def at(self, layer: int) -> ExitPoint | None:
        return next((point for point in self.exits if point.layer == layer), None)
