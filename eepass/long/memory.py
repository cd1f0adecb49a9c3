"""How many bytes a pass over a long text reads: weights, and keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from eepass.segments import SplitDecoder

# of the bytes of a pass, the share that keys must be before passes that read few of them draft
WORTH = 0.2


@dataclass(frozen=True, slots=True)
class ContextMemory:
    """``weights``: bytes of the layers and the LM head, which each pass reads; ``token``: bytes of
    one token's keys and values in all layers."""

    weights: int
    token: int

    @classmethod
    def of(cls, split: SplitDecoder) -> ContextMemory:
        read = {
            role.name
            for segment in (*split.layers, split.head.whole)
            for role in segment.inputs
            if role.kind == "parameter"
        }
        weights = sum(split.tensors[name].nbytes for name in read)
        cache = [
            like
            for layer in split.layers
            for role, like in layer.examples.items()
            if role.kind in ("keys", "values")
        ]
        token = sum(like.numel() // like.shape[2] * like.element_size() for like in cache)
        return cls(weights, token)

    def read(self, length: int, selected: int | None = None, share: float = 1.0) -> int:
        """Bytes that a pass reads after ``length`` tokens; of which it attends, in a ``share`` of
        its layers, to ``selected``."""
        keys = length * self.token
        if selected is not None and selected < length:
            keys -= round(share * (length - selected) * self.token)
        return self.weights + keys

    def drafting_pays(self, length: int, selected: int) -> bool:
        """Whether passes that read the keys of ``selected`` tokens alone are so much faster, in a
        text of ``length``, that they may draft for others."""
        return self.read(length, selected) <= (1 - WORTH) * self.read(length)
