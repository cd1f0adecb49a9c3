"""The segments at exit points, bound for one row: drafts, predictors, verification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eepass.plan import ExitPlan, ExitSegments, FusedExits
from eepass.runtime.decoder.decoder import Decoder


class ExitPoints:
    """What one row is asked where it may leave.

    ``fused``: exit points as one operator each, in place of predictors and verification.
    ``tensors`` are the artefact's with ``hot.ids``, and the plan's thresholds where they are fused.
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: ExitPlan,
        segments: ExitSegments,
        tensors: Mapping[str, Tensor],
        fused: FusedExits | None = None,
    ) -> None:
        self.plan, self.tensors = plan, tensors
        self._hot = tensors["hot.ids"]
        self._fused = fused is not None
        k = plan.draft_tokens
        device = decoder.device
        hidden = torch.zeros(1, 1, decoder.hidden_size, dtype=decoder.dtype, device=device)
        self._like = hidden
        drafts = torch.zeros(1, k, dtype=torch.long, device=device)
        previous = torch.zeros(1, k, device=device)
        asked = [hidden, drafts, previous]
        source: Any = fused if fused is not None else segments
        self._predict = {
            layer: decoder.bind(segment, tensors, asked)
            for layer, segment in source.predictors.items()
        }
        told = asked[:2] if fused is not None else asked[:1]
        self._verify = decoder.bind(source.verify, tensors, told)
        self._normed = decoder.bind(segments.normed, tensors, asked[:1])
        self._draft = decoder.bind(segments.draft, tensors, asked[:1])
        self._limits = {
            p.layer: torch.tensor([p.threshold], dtype=torch.float64, device=device)
            for p in plan.exits
        }

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(point.layer for point in self.plan.exits)

    def draft(self, hidden: Tensor) -> Tensor:
        """The likeliest hot tokens [1, K] of a boundary [1, 1, H]."""
        (z,) = self._normed(hidden)
        (logits,) = self._draft(z)
        return self._hot[logits[0].topk(self.plan.draft_tokens, -1).indices]

    def predict(
        self, layer: int, hidden: Tensor, drafts: Tensor, previous: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Whether the token wants to leave [1], its drafts' probabilities [1, K], z [1, 1, H]."""
        chance, now, z, *exits = self._predict[layer](hidden, drafts, previous)
        # in float64, as a host compares
        wants = exits[0] if exits else chance.double() > self._limits[layer]
        return wants, now, z

    def verify(self, z: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest token [1] of z [1, 1, H], and whether it is among ``drafts`` (bool [1])."""
        if self._fused:
            token, known = self._verify(z, drafts)
            return token, known
        return self.named(self.logits(z).argmax(-1), drafts)

    def logits(self, z: Tensor) -> Tensor:
        """Logits [1, N] of z [1, 1, H], of the hot vocabulary or the whole; not of fused ones."""
        (logits,) = self._verify(z)
        found: Tensor = logits[0]
        return found

    def named(self, place: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
        """The token [1] at a ``place`` [1] in these logits, and whether it is among ``drafts``."""
        token = self._hot[place] if self.plan.verify == "hot" else place
        return token, (token[:, None] == drafts).any(-1)

    def differ_from(self, other: ExitPoints) -> str:
        """Why these do not say what ``other`` says of a made-up boundary, or nothing.

        Kernels are tried on the device they are to run on before anything depends on them.
        """
        try:
            made = torch.linspace(-1, 1, self._like.numel(), device=self._like.device)
            hidden = made.sin().to(self._like.dtype).view_as(self._like)
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
    """``tensors`` with those that fused predictors read their thresholds from."""
    device = tensors["hot.ids"].device
    return {**tensors, **{n: t.to(device) for n, t in plan.threshold_tensors().items()}}
