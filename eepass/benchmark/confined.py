"""Run code that nobody has read, with its tests: a script of its own, which imports only Python.

    python -I confined.py SECONDS MEGABYTES < {"word": ..., "code": ..., "tests": [...]}

The process gives up what it could do harm with (namespaces of its own: without network, with every
file system read-only, processes end with it), then runs the code and each test. It prints ``word``
when all tests have passed, and nothing else; ``REFUSED`` is its exit code where Linux does not let
it confine itself, and then nothing was run.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys

REFUSED = 77
# of <sched.h>, <sys/mount.h>, <linux/mount.h> and <sys/prctl.h>
NEW_MOUNTS, NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x20000, 0x10000000, 0x20000000, 0x40000000
RECURSIVE, PRIVATE = 0x4000, 1 << 18
MOUNT_SETATTR, AT_RECURSIVE, READ_ONLY = 442, 0x8000, 1
SIGNAL_AT_PARENTS_DEATH = 1
# bytes of a file it may write: there is none it could open
MOST_WRITTEN = 0


def confine() -> bool:
    """Leave network, other processes and writable files behind; whether Linux allowed it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_USER | NEW_MOUNTS | NEW_PROCESSES | NEW_NETWORK):
        return False
    # what is mounted here must not be seen outside
    if libc.mount(None, b"/", None, ctypes.c_ulong(RECURSIVE | PRIVATE), None):
        return False
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY, 0, 0, 0)
    made = libc.syscall(
        ctypes.c_long(MOUNT_SETATTR), ctypes.c_int(-1), b"/", ctypes.c_uint(AT_RECURSIVE),
        ctypes.byref(attributes), ctypes.c_size_t(ctypes.sizeof(attributes)),
    )  # fmt: skip
    return bool(made == 0)


def limit(seconds: int, megabytes: int) -> None:
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, megabytes << 20),
        (resource.RLIMIT_FSIZE, MOST_WRITTEN),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def run(code: str, tests: list[str]) -> bool:
    """Whether ``code`` and then each of ``tests`` runs to its end."""
    names = {"__name__": "answer"}
    try:
        for number, text in enumerate([code, *tests]):
            exec(compile(text, f"part {number}", "exec"), names)
    except BaseException:
        # SystemExit too: code that ends the process has not passed
        return False
    return True


def main() -> int:
    seconds, megabytes = int(sys.argv[1]), int(sys.argv[2])
    asked = json.load(sys.stdin)
    if not confine():
        return REFUSED
    # only children are in the new namespace of processes; all of it ends with the first of them
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ctypes.CDLL(None).prctl(SIGNAL_AT_PARENTS_DEATH, signal.SIGKILL)
    report, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    limit(seconds, megabytes)
    passed = run(asked["code"], asked["tests"])
    # a pipe is no file whose size is limited
    os.write(report, asked["word"].encode() if passed else b"")
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
