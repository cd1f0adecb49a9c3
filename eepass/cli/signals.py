"""Stop when the system or a closing terminal says so, as a person's Ctrl-C does: by an exception,
so that the cursor comes back and what was half written is removed."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from eepass.cli.console import console, errors

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal that ends the process; ``number`` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def stopping_cleanly() -> Iterator[None]:
    """Within, a signal unwinds what is running, and then ends the process as it always would."""
    for number in SIGNALS:
        # ignored by those who started it with nohup
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        yield
    except Stopped as stopped:
        _show_cursors()
        os.kill(os.getpid(), stopped.number)
    finally:
        _show_cursors()


def _stop(number: int, frame: Any) -> None:
    # the second one ends it at once
    signal.signal(number, signal.SIG_DFL)
    raise Stopped(number)


def _show_cursors() -> None:
    for stream in (console, errors):
        # the terminal may be gone
        with contextlib.suppress(OSError):
            if stream.is_terminal:
                stream.show_cursor()
