"""Errors meant for the person who made the mistake."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Bad input from outside: what it is, where, and what to do about it, in one line."""


class RunsSlower(UserWarning):
    """Something is missing here without which eepass is right, but slow; says what helps."""


class PassError(ValueError):
    """A decoder that a pass cannot rewrite; the message says why."""


class EngineError(ValueError):
    """A request the engine cannot serve; the message says what to change."""


# what transformers says of a checkpoint with Python code of its own
CUSTOM_CODE = "trust_remote_code"


@contextmanager
def explained(what: str, cache: Path | None = None) -> Iterator[None]:
    """Any error of the libraries below becomes an ``InputError``: ``what``, and its first line.

    An ``OSError`` of a full or closed disk, or of a file in the folder ``cache``, is no fault of
    what is read, and raised as it is.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and _is_of_disk(error, cache):
            raise
        line = first_line(error)
        if CUSTOM_CODE in str(error):
            line = "it brings Python code of its own, which eepass does not run"
        raise InputError(f"{what} ({line})") from error


def _is_of_disk(error: OSError, cache: Path | None) -> bool:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return True
    file = error.filename
    if cache is None or not isinstance(file, (str, os.PathLike)):
        return False
    return Path(file).is_relative_to(cache)


def first_line(error: BaseException) -> str:
    """What an error says, in one line: its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
