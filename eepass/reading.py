"""Read text that people give: JSON and JSON Lines, whatever they hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from eepass.errors import InputError

Record = TypeVar("Record")


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


def read_records(
    path: Path, form: str, make: Callable[[Any], Record]
) -> Iterator[tuple[str, Record]]:
    """What ``make`` makes of the value of each line of a JSON Lines file that is not blank, after
    the line's place for messages.

    Raises ``InputError``: the file is no text; or, showing the ``form``, a line is no JSON or
    ``make`` raised ``ValueError``, ``KeyError``, ``TypeError``, ``AttributeError`` or
    ``IndexError`` for it.
    """
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = make(parse_json(line))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"{place}: expected {form}") from error
        yield place, record


def is_whole_number(value: Any) -> bool:
    """Whether a value of JSON is an integer, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole_number(value: Any) -> int:
    """An integer of JSON; ``ValueError`` for anything else."""
    if not is_whole_number(value):
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def list_of(value: Any) -> list[Any]:
    """A list of JSON; ``ValueError`` for anything else, texts among it."""
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is no list")
    return value


def number(value: Any) -> float:
    """A number of JSON; ``ValueError`` for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def from_json(kind: type[Record], values: Mapping[str, Any]) -> Record:
    """The dataclass ``kind`` of ``values`` from JSON, lists and mappings of one type among them.

    Raises ``KeyError`` for a field that is missing and ``ValueError`` for one of another type.
    """
    hints, found = get_type_hints(kind), {}
    for field in fields(kind):  # type: ignore[arg-type]
        value = found[field.name] = values[field.name]
        inner = get_args(hints[field.name])
        fits = _is_of(value, hints[field.name])
        if fits and inner:
            held = value.values() if isinstance(value, dict) else value
            fits = all(_is_of(one, inner[-1]) for one in held)
        if not fits:
            raise ValueError(f"{field.name} of another type")
    return kind(**found)


def _is_of(value: Any, kind: Any) -> bool:
    plain = get_origin(kind) or kind
    if plain is float:
        return is_whole_number(value) or isinstance(value, float)
    return plain is Any or type(value) is plain
