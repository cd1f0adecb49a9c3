"""Replace folders whole or not at all, one process at a time."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from eepass.errors import InputError

# names of ours inside a folder begin so
INSIDE = ".eepass"
PART, OLD = ".part", ".old"
# what the system itself puts into a volume
NOT_FILES = {"lost+found"}
# a mount point, a layer of a container, a folder of somebody else's, a system without exchange
CANNOT_MOVE = {
    errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS,
    errno.EOPNOTSUPP,
}  # fmt: skip
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


def refuse_other_folder(target: Path, ours: Callable[[Path], bool]) -> None:
    """Raise ``InputError`` if ``target`` is there, and is neither empty nor a folder of ours."""
    if not target.exists():
        return
    if not (target.is_dir() and (ours(target) or _half_moved(target) or not _entries(target))):
        raise InputError(f"{target}: something else is there; give a new or an empty folder")


@contextmanager
def replacing_folder(target: Path, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``target`` afterwards.

    ``target`` must be new, empty or ``ours``, before and after. The two are exchanged in one step;
    where ``target`` itself cannot be moved, as a container's volume cannot, its contents are, one
    by one. Raises ``InputError`` if another process is replacing ``target``.
    """
    refuse_other_folder(target, ours)
    home, stem = target.parent, f".{target.name}"
    if target.is_dir() and not _can_move(target):
        home, stem = target, INSIDE
    with scratch_folder(home, stem, target) as scratch:
        yield scratch
        refuse_other_folder(target, ours)
        if home == target or not _exchanged(scratch, target):
            _move_contents(scratch, target)
        # what processes left that were killed while they moved
        for old in target.glob(f"{INSIDE}.*{OLD}"):
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def scratch_folder(home: Path, stem: str = INSIDE, target: Path | None = None) -> Iterator[Path]:
    """A new folder in ``home``, removed afterwards; what was left by processes that died is removed
    before. Raises ``InputError`` if another process holds one for the same ``target``."""
    home.mkdir(parents=True, exist_ok=True)
    with locked(home / f"{stem}.lock", target or home):
        mine = re.compile(re.escape(stem) + r"\.[a-z0-9_]{8}" + PART)
        for left in home.iterdir():
            if mine.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)
        scratch = _new_folder(home, stem, PART)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def locked(file: Path, target: Path) -> Iterator[None]:
    """Hold a lock, which ends with the process if not before; ``InputError`` naming ``target`` if
    another process holds it."""
    handle = _lock(file, target)
    try:
        yield
    finally:
        # while it is held: whoever waits for it sees that it is gone
        file.unlink(missing_ok=True)
        os.close(handle)


def _lock(file: Path, target: Path) -> int:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(handle)
                if not isinstance(error, BlockingIOError):
                    raise
                raise InputError(
                    f"{target}: another process is writing it; wait until it is done, or give "
                    "another --out"
                ) from error
        try:
            if os.path.samestat(os.fstat(handle), file.stat()):
                return handle
        except FileNotFoundError:
            pass
        # the one that held it has removed the file
        os.close(handle)


def _exchanged(scratch: Path, target: Path) -> bool:
    """Whether ``target`` could be exchanged for ``scratch``."""
    try:
        if target.exists():
            _exchange(scratch, target)
        else:
            os.rename(scratch, target)
    except OSError as error:
        if error.errno not in CANNOT_MOVE:
            raise
        return False
    return True


def _exchange(one: Path, other: Path) -> None:
    """Exchange two names in one step (Linux)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    here, exchange = -100, 2
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))


def _move_contents(scratch: Path, target: Path) -> None:
    """Put the contents of ``scratch`` in place of those of ``target``; undone if that fails.

    A process that is killed meanwhile leaves a folder that does not load, and that
    ``refuse_other_folder`` knows for ours.
    """
    target.mkdir(exist_ok=True)
    if scratch.parent != target:
        # another file system after all: what takes time comes first
        inside = _new_folder(target, INSIDE, PART)
        try:
            shutil.copytree(scratch, inside, dirs_exist_ok=True)
            _move_contents(inside, target)
        finally:
            shutil.rmtree(inside, ignore_errors=True)
        return
    old, placed = _new_folder(target, INSIDE, OLD), []
    try:
        for entry in _entries(target):
            os.rename(entry, old / entry.name)
        for entry in list(scratch.iterdir()):
            os.rename(entry, target / entry.name)
            placed.append(entry.name)
    except BaseException:
        # also on Ctrl-C: half a folder is neither the old one nor the new one
        for name in placed:
            os.rename(target / name, scratch / name)
        for entry in list(old.iterdir()):
            os.rename(entry, target / entry.name)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _entries(folder: Path) -> list[Path]:
    """What is in ``folder`` besides scratch folders and locks."""
    return [
        entry
        for entry in folder.iterdir()
        if entry.name not in NOT_FILES and not entry.name.startswith(f"{INSIDE}.")
    ]


def _half_moved(folder: Path) -> bool:
    return any(folder.glob(f"{INSIDE}.*{OLD}"))


def _new_folder(home: Path, stem: str, end: str) -> Path:
    """A new folder as ``mkdir`` makes one: ``mkdtemp`` closes it to others."""
    closed = Path(tempfile.mkdtemp(dir=home, prefix=f"{stem}.", suffix=end))
    closed.rmdir()
    closed.mkdir()
    return closed


def _can_move(folder: Path) -> bool:
    """Whether ``folder`` may be renamed: not a mount point, and its parent may be written to."""
    return os.access(folder.parent, os.W_OK | os.X_OK) and not _is_mount_point(folder)


def _is_mount_point(folder: Path) -> bool:
    if os.path.ismount(folder):
        return True
    # a folder of the same file system mounted there looks like any other
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    places = (line.split()[4] for line in lines)
    return os.fsencode(folder) in {
        re.sub(rb"\\(\d{3})", lambda octal: bytes([int(octal[1], 8)]), place) for place in places
    }
