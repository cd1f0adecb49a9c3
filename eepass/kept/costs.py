"""Keep what passes cost and whether row counts agree, measured when a model first started."""

from __future__ import annotations

import json
from collections.abc import Callable

from eepass.kept.splits import kept_entries
from eepass.reading import parse_json

COSTS = "costs.json"


class KeptCosts:
    """The costs of the model whose splits are kept under ``key``; "" for one of which none are."""

    def __init__(self, key: str) -> None:
        self._entries, self._key = kept_entries(), key and f"costs-{key}"

    def pass_seconds(self, measure: Callable[[], dict[int, float]]) -> dict[int, float]:
        """Seconds of a pass by row count, as kept or as ``measure`` finds them."""
        found = self._read().get("pass_seconds")
        if isinstance(found, dict):
            try:
                return {int(rows): float(seconds) for rows, seconds in found.items()}
            except (TypeError, ValueError):
                pass
        measured = measure()
        self._write(pass_seconds=measured)
        return measured

    def noise(self, measure: Callable[[], float]) -> float:
        """How far logits differ between row counts, as ``measure`` finds it, or as kept where they
        do not: the order of sums is the code's, and the same for all weights; by how much they
        differ is not."""
        if self._read().get("noise") == 0.0:
            return 0.0
        found = measure()
        if found == 0.0:
            self._write(noise=found)
        return found

    def _read(self) -> dict[str, object]:
        entry = self._entries.find(self._key) if self._key else None
        if entry is None:
            return {}
        try:
            found = parse_json((entry / COSTS).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, **new: object) -> None:
        if self._key:
            text = json.dumps(self._read() | new)
            self._entries.drop(self._key)
            self._entries.write(self._key, {COSTS: text.encode()})
