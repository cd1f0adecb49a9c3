"""How training reports how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """``begin`` starts a stage of ``total`` units; ``advance`` counts units that are done."""

    def begin(self, stage: str, total: int) -> None: ...
    def advance(self, amount: int) -> None: ...


class NoProgress:
    """A progress that shows nothing."""

    def begin(self, stage: str, total: int) -> None: ...
    def advance(self, amount: int) -> None: ...
