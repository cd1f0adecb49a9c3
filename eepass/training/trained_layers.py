"""The layers at which drafts and exits are trained, as fractions of the model's depth."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrainedLayers:
    """Layers of a model with ``num_layers``, counted from 1: its hidden states after them."""

    num_layers: int

    @property
    def draft_layers(self) -> tuple[int, ...]:
        """Candidates for the layer the default preset drafts from; training keeps the better."""
        return self._at(0.63, 0.73)

    def exits(self, draft_layer: int) -> tuple[int, ...]:
        """Exits of the default preset: every other layer from the draft's on, and the last, where
        an exit saves the cold rows of the LM head."""
        return (*range(draft_layer, self.num_layers, 2), self.num_layers)

    @property
    def paper_exits(self) -> tuple[int, ...]:
        """Exits of the preset ``paper``: every layer but the last from two thirds of the depth
        on; before that the logit lens rarely gives the dense answer."""
        return tuple(range(max(1, round(0.65 * self.num_layers)), self.num_layers))

    @property
    def features(self) -> tuple[int, ...]:
        """Layers whose hidden states the draft head sees beside z, none later than an exit."""
        return self._at(0.4, 0.67)

    @property
    def translated(self) -> tuple[int, ...]:
        """Layers that get a translator."""
        exits = {layer for draft in self.draft_layers for layer in self.exits(draft)}
        return tuple(sorted(exits - {self.num_layers}))

    @property
    def stored(self) -> tuple[int, ...]:
        """Layers whose hidden states at answer tokens are stored."""
        return tuple(sorted({*self.translated, *self.paper_exits}))

    def _at(self, *fractions: float) -> tuple[int, ...]:
        return tuple(sorted({max(1, round(part * self.num_layers)) for part in fractions}))
