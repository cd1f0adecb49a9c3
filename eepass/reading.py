"""Read text that people give: JSON and JSON Lines, whatever they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; ``ValueError`` for what is none, or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text, split at newlines alone: JSON strings may hold U+2028 and U+0085.

    Without a byte-order mark. Raises ``OSError`` or ``UnicodeDecodeError``.
    """
    return path.read_bytes().decode("utf-8-sig").split("\n")


def is_whole_number(value: Any) -> bool:
    """Whether a value of JSON is an integer, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)
