"""Errors meant for the person who made the mistake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input from outside: what it is, where, and what to do about it, in one line."""


class PassError(ValueError):
    """A decoder that a pass cannot rewrite; the message says why."""


class EngineError(ValueError):
    """A request the engine cannot serve; the message says what to change."""


# what transformers says of a checkpoint with Python code of its own
CUSTOM_CODE = "trust_remote_code"


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Any error of the libraries below becomes an ``InputError``: ``what``, and its first line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        line = first_line(error)
        if CUSTOM_CODE in str(error):
            line = "it brings Python code of its own, which eepass does not run"
        raise InputError(f"{what} ({line})") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line: its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
