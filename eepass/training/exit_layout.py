"""What a training looks at, and whom it tells how far it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Progress(Protocol):
    """Told how far training is: ``begin`` a stage of so many units, ``advance`` by some."""

    def begin(self, stage: str, total: int) -> None: ...
    def advance(self, amount: int) -> None: ...


@dataclass(frozen=True, slots=True)
class ExitLayout:
    """Which boundaries a model of ``num_layers`` is trained at, as fractions of its depth."""

    num_layers: int

    @property
    def draft_layers(self) -> tuple[int, ...]:
        """Where the draft of the default preset may be taken; the better one is kept."""
        return tuple(sorted({max(1, round(part * self.num_layers)) for part in (0.63, 0.73)}))

    def exits(self, draft_layer: int) -> tuple[int, ...]:
        """Exits of the default preset: from the draft's boundary on every other one, and the last,
        where leaving saves the cold rows of the LM head."""
        return (*range(draft_layer, self.num_layers, 2), self.num_layers)

    @property
    def paper_exits(self) -> tuple[int, ...]:
        """Exits of the preset ``paper``: every layer but the last, from two thirds of the depth
        on; before that a lens rarely answers right."""
        return tuple(range(max(1, round(0.65 * self.num_layers)), self.num_layers))

    @property
    def features(self) -> tuple[int, ...]:
        """Boundaries the draft head sees beside z: none is later than where a token may leave."""
        return tuple(sorted({max(1, round(part * self.num_layers)) for part in (0.4, 0.67)}))

    @property
    def kept(self) -> tuple[int, ...]:
        return tuple(sorted({*self.translated, *self.paper_exits}))

    @property
    def translated(self) -> tuple[int, ...]:
        found = {layer for draft in self.draft_layers for layer in self.exits(draft)}
        return tuple(sorted(found - {self.num_layers}))
