"""Whether code passes its tests, found out in a process that is confined (``confined``)."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from eepass.benchmark.confined import REFUSED
from eepass.errors import InputError

SCRIPT = Path(__file__).with_name("confined.py")
# for one problem with all its tests
SECONDS, MEGABYTES = 5, 1024


def passes(
    code: str, tests: Sequence[str], seconds: int = SECONDS, megabytes: int = MEGABYTES
) -> bool:
    """Whether ``code``, and after it each of ``tests``, runs without an exception.

    In ``seconds`` at most and ``megabytes`` of memory, without network and without a file it could
    write. Raises ``InputError`` where the system does not let a process confine itself so.
    """
    word = secrets.token_hex(16)
    asked = json.dumps({"word": word, "code": code, "tests": list(tests)})
    process = subprocess.Popen(
        [sys.executable, "-I", str(SCRIPT), str(seconds), str(megabytes)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        cwd="/", env={}, start_new_session=True, text=True,
    )  # fmt: skip
    try:
        # the clock runs on where code sleeps; Python itself starts in a fraction of a second
        said, _ = process.communicate(asked, timeout=seconds + 2)
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode == REFUSED:
        raise InputError(
            "this system lets no process confine itself (unprivileged user namespaces, Linux 5.12 "
            "or newer): code of a model is run nowhere else"
        )
    return said == word
