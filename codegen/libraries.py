"""Open a library from memory: what was checked is what runs, whatever becomes of the file."""

from __future__ import annotations

import os


def path_of(data: bytes, file: str) -> str:
    """A path to a copy of ``data`` in memory, to open as a library; it lasts as long as this
    process. Where the system has no such files (Linux has), ``file``, which held it.

    The descriptor stays open: the loader takes a library of the same path for the same library.
    """
    try:
        handle = os.memfd_create(os.path.basename(file))
    except (AttributeError, OSError):
        return file
    with os.fdopen(os.dup(handle), "wb") as memory:
        memory.write(data)
    return f"/proc/self/fd/{handle}"
