"""What the backend tells its user."""

from __future__ import annotations

import functools
import logging

log = logging.getLogger("eepass")


@functools.cache
def say_once(message: str) -> None:
    """Warn with ``message``, once in a process."""
    log.warning(message)
