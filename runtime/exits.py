"""Deciding at a boundary whether the token's answer is already known."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from eepass.plan import ExitPieces, ExitPlan
from eepass.runtime.decoder import Decoder
from eepass.runtime.statistics import Statistics


class Draft(Protocol):
    """Where draft tokens come from, besides an early boundary."""

    def propose(self, token: int, z: Tensor, position: int) -> Tensor:
        """Draft tokens [1, K] to follow ``token`` at ``position``; z [1, 1, H] led to ``token``."""
        ...

    def reset(self) -> None: ...


class Exits:
    """Draft, predictors and verification of one exit plan, for one row at a time.

    ``tensors`` are the artefact's, with ``hot.head`` (rows of the LM head) and ``hot.ids`` added.
    Verification on the hot vocabulary names tokens through ``hot.ids``.
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: ExitPlan,
        pieces: ExitPieces,
        tensors: Mapping[str, Tensor],
        draft: Draft | None = None,
    ) -> None:
        self.plan = plan
        self.thresholds = {point.layer: point.threshold for point in plan.exits}
        self.draft = draft
        self.hot_ids = tensors["hot.ids"]
        dtype = next(iter(decoder.tensors.values())).dtype
        hidden = torch.zeros(1, 1, decoder.hidden_size, dtype=dtype)
        k = plan.draft_tokens
        self._nothing = torch.zeros(1, k)
        examples = [hidden, torch.zeros(1, k, dtype=torch.long), self._nothing]
        self._predict = {
            layer: decoder.bind(piece, tensors, examples)
            for layer, piece in pieces.predictors.items()
        }
        self._verify = decoder.bind(pieces.verify, tensors, [hidden])
        self._draft = decoder.bind(pieces.draft, tensors, [hidden])
        self._normed = decoder.bind(pieces.normed, tensors, [hidden])
        self._final = decoder.bind(pieces.final, tensors, [hidden])
        self.ids: Tensor = examples[1]
        self.previous = self._nothing
        self.z: Tensor = hidden

    def begin(self, token: int, position: int, statistics: Statistics) -> None:
        """A new token starts its way; a draft that needs no boundary speaks now."""
        self.previous = self._nothing
        if self.draft is not None:
            began = perf_counter()
            self.ids = self.draft.propose(token, self.z, position)
            statistics.draft_seconds += perf_counter() - began

    def finish(self, hidden: Tensor) -> None:
        """A token went all the way, to the last boundary [1, 1, H]; a draft may want its state."""
        if self.draft is not None:
            (self.z,) = self._final(hidden)

    def draft_from(self, hidden: Tensor, statistics: Statistics) -> None:
        """Take the draft from a boundary [1, 1, H]: its likeliest hot tokens."""
        began = perf_counter()
        (z,) = self._normed(hidden)
        (logits,) = self._draft(z)
        self.ids = self.hot_ids[logits[0].topk(self.plan.draft_tokens, -1).indices]
        statistics.draft_seconds += perf_counter() - began

    def check(self, layer: int, hidden: Tensor, statistics: Statistics) -> int | None:
        """The token, if it can leave after ``layer`` with hidden [1, 1, H]; else None."""
        began = perf_counter()
        probability, self.previous, z = self._predict[layer](hidden, self.ids, self.previous)
        wanted = probability.item() > self.thresholds[layer]
        statistics.predictors_run += 1
        ended = perf_counter()
        statistics.predictor_seconds += ended - began
        if not wanted:
            return None
        statistics.wanted += 1
        if layer == self.plan.draft_layer and self.plan.verify == "hot":
            # the draft came from these very logits: its first token is their argmax
            token = self.ids[0, :1]
        else:
            (logits,) = self._verify(z)
            best = logits[0].argmax(-1)
            token = self.hot_ids[best] if self.plan.verify == "hot" else best
        right = bool((token == self.ids).any())
        statistics.verify_seconds += perf_counter() - ended
        if not right:
            statistics.refused += 1
            return None
        self.z = z
        return int(token)
