"""The segments at exit points, bound for some rows: draft tokens, predictors, verification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eepass.exit_rule import among_drafts, wants_exit
from eepass.plan import ExitPlan, ExitSegments, FusedExits
from eepass.runtime.decoder.decoder import Decoder


class ExitPoints:
    """Draft tokens, predictors and verification of R ``rows``, by ``eepass.exit_rule``.

    ``fused``: operators that replace predictors and verification, thresholds included.
    ``tensors`` are the artefact's with ``hot.ids``, and the plan's thresholds for fused operators.
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: ExitPlan,
        segments: ExitSegments,
        tensors: Mapping[str, Tensor],
        fused: FusedExits | None = None,
        rows: int = 1,
    ) -> None:
        self.plan, self.tensors = plan, tensors
        self.layers = tuple(point.layer for point in plan.exits)
        self._hot = tensors["hot.ids"]
        self._fused = fused is not None
        k, device = plan.draft_tokens, decoder.device
        hidden = torch.zeros(1, rows, decoder.hidden_size, dtype=decoder.dtype, device=device)
        self._example = hidden
        drafts = torch.zeros(rows, k, dtype=torch.long, device=device)
        previous = torch.zeros(rows, k, device=device)
        source: Any = segments if fused is None else fused
        self._predict = {
            layer: decoder.bind(segment, tensors, [hidden, drafts, previous])
            for layer, segment in source.predictors.items()
        }
        verified = [hidden] if fused is None else [hidden, drafts]
        self._verify = decoder.bind(source.verify, tensors, verified)
        self._normed = decoder.bind(segments.normed, tensors, [hidden])
        self._draft = decoder.bind(segments.draft, tensors, [hidden])
        self._thresholds = {
            p.layer: torch.tensor([p.threshold], dtype=torch.float64, device=device)
            for p in plan.exits
        }

    def draft(self, hidden: Tensor) -> Tensor:
        """The draft tokens [R, K] of hidden states [1, R, H]: their likeliest hot tokens."""
        (z,) = self._normed(hidden)
        (logits,) = self._draft(z)
        return self._hot[logits[0].topk(self.plan.draft_tokens, -1).indices]

    def predict(
        self, layer: int, hidden: Tensor, drafts: Tensor, previous: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Whether rows want to exit [R], their draft tokens' probabilities [R, K], and their
        normed hidden states z [1, R, H]."""
        probability, now, z, *wants = self._predict[layer](hidden, drafts, previous)
        if wants:
            # fused operators compare with the threshold themselves
            return wants[0], now, z
        # in float64, as a host compares
        return wants_exit(probability.double(), self._thresholds[layer]), now, z

    def verify(self, z: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest tokens [R] of z [1, R, H], and whether they are among ``drafts`` (bool)."""
        if self._fused:
            token, drafted = self._verify(z, drafts)
            return token, drafted
        return self.named(self.logits(z).argmax(-1), drafts)

    def logits(self, z: Tensor) -> Tensor:
        """Logits [R, N] of z [1, R, H], of the hot vocabulary or the whole; fused operators have
        none."""
        (logits,) = self._verify(z)
        rows: Tensor = logits[0]
        return rows

    def named(self, index: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens at ``index`` [R] of these logits, and whether they are among ``drafts``."""
        token = self._hot[index] if self.plan.verify == "hot" else index
        return token, among_drafts(token, drafts)

    def differ_from(self, other: ExitPoints) -> str:
        """How these differ from ``other`` on an invented hidden state, or "" if they do not.

        Kernels are tried on the device they are to run on before anything depends on them.
        """
        try:
            like = self._example
            hidden = torch.linspace(-1, 1, like.numel(), device=like.device)
            hidden = hidden.sin().to(like.dtype).view_as(like)
            drafts = other.draft(hidden)
            previous = torch.zeros_like(drafts, dtype=torch.float32)
            for layer in self.layers:
                _, ours, z = self.predict(layer, hidden, drafts, previous)
                _, theirs, expected = other.predict(layer, hidden, drafts, previous)
                if not torch.allclose(ours, theirs, atol=0.02):
                    return f"other probabilities after layer {layer}"
                if not torch.allclose(z, expected, rtol=0.05, atol=0.05):
                    return f"another state after layer {layer}"
            if not torch.equal(self.verify(expected, drafts)[1], other.verify(expected, drafts)[1]):
                return "another verification"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


def with_thresholds(tensors: Mapping[str, Tensor], plan: ExitPlan) -> dict[str, Tensor]:
    """``tensors``, and those that fused predictors read their thresholds from."""
    device = tensors["hot.ids"].device
    return {**tensors, **{n: t.to(device) for n, t in plan.threshold_tensors().items()}}
