"""``results.json``: every part named from the start, written whole after each."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Literal

SCHEMA = 1
State = Literal["waiting", "running", "done", "skipped", "failed", "cut off", "not begun"]


class Results:
    """What is known so far; ``record`` and ``finish`` write it to ``out``/results.json."""

    def __init__(self, out: Path, parts: list[str], about: dict[str, Any]) -> None:
        self.path = out / "results.json"
        self.values: dict[str, Any] = {
            "schema": SCHEMA,
            "finished": False,
            **about,
            "parts": {name: {"state": "waiting"} for name in parts},
            "sections": {name: {} for name in parts},
        }
        out.mkdir(parents=True, exist_ok=True)
        self.write()

    def record(self, part: str, state: State, why: str = "", seconds: float | None = None) -> None:
        entry: dict[str, Any] = {"state": state}
        if why:
            entry["why"] = why
        if seconds is not None:
            entry["seconds"] = round(seconds, 2)
        self.values["parts"][part] = entry
        self.write()

    def keep(self, part: str, found: dict[str, Any]) -> None:
        """What a part has found so far; a later answer replaces it."""
        self.values["sections"][part] = found
        self.write()

    def finish(self) -> None:
        self.values["finished"] = True
        self.write()

    def write(self) -> None:
        scratch = self.path.with_name(f".{self.path.name}.writing")
        scratch.write_text(json.dumps(plain(self.values), indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, self.path)


def plain(value: Any) -> Any:
    """``value`` as JSON has it: short figures, and no NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, (str, int, bool)) or value is None:
        return value
    return str(value)
