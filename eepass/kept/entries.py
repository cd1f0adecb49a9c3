"""A folder of cache entries: written whole or not at all, checked when read, bounded in size.

An entry is a folder of files, named by its key, with a list of their hashes. Several processes may
read and write at a time: an entry appears by one rename, and the first writer wins. Nothing here
raises where the cache cannot be used: it is then as if it were empty.

Entries may hold native code, so only what this user alone can have written is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eepass.reading import parse_json

LIMIT = 2 << 30
LISTING = "entry.json"
# what a process that died left half written is removed after so many seconds
ABANDONED = 3600.0
PART = ".part"


@dataclass(frozen=True, slots=True)
class Entries:
    """The entries in ``folder``, of at most ``limit`` bytes; the ones used last stay."""

    folder: Path
    limit: int = LIMIT

    def find(self, key: str) -> Path | None:
        """The folder of an entry, its files as they were written; None if there is none.

        A damaged entry, or one that others could have written, is removed where it can be.
        """
        entry = self.folder / key
        try:
            if not entry.exists():
                return None
            _refuse_foreign(self.folder)
            names = self._checked(entry)
            now = time.time()
            os.utime(entry, (now, now))
        except (OSError, ValueError, KeyError, TypeError):
            self.drop(key)
            return None
        return entry if names else None

    def write(self, key: str, files: Mapping[str, bytes]) -> None:
        """Add an entry, unless it is there, and remove others until all fit."""
        self._add(key, files)
        with contextlib.suppress(OSError):
            self._make_room(key)

    def replace(self, key: str, files: Mapping[str, bytes]) -> None:
        """Write a small entry anew. Nothing is removed for it: looking at all entries takes longer
        than some answers."""
        self.drop(key)
        # another process may have been faster; then its files stay
        self._add(key, files)

    def _add(self, key: str, files: Mapping[str, bytes]) -> None:
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _refuse_foreign(self.folder)
            # made with mode 0700
            scratch = Path(tempfile.mkdtemp(dir=self.folder, suffix=PART))
            try:
                for name, data in files.items():
                    (scratch / name).write_bytes(data)
                    (scratch / name).chmod(0o600)
                listing = {name: _digest(data) for name, data in files.items()}
                (scratch / LISTING).write_text(json.dumps(listing), encoding="utf-8")
                (scratch / LISTING).chmod(0o600)
                os.rename(scratch, self.folder / key)
            finally:
                # the rename fails where another process was first
                shutil.rmtree(scratch, ignore_errors=True)

    def drop(self, key: str) -> None:
        """Remove an entry."""
        with contextlib.suppress(OSError):
            # renamed first: nobody sees half an entry
            scratch = Path(tempfile.mkdtemp(dir=self.folder, suffix=PART))
            with contextlib.suppress(OSError):
                os.rename(self.folder / key, scratch / key)
            shutil.rmtree(scratch, ignore_errors=True)

    def _checked(self, entry: Path) -> list[str]:
        _refuse_foreign(entry)
        _refuse_foreign(entry / LISTING)
        listing = parse_json((entry / LISTING).read_bytes())
        for name, digest in listing.items():
            file = entry / name
            if file.parent != entry:
                raise ValueError(f"{name} is not in the entry")
            _refuse_foreign(file)
            if _digest(file.read_bytes()) != digest:
                raise ValueError(f"{file} is damaged")
        return list(listing)

    def _make_room(self, newest: str) -> None:
        """Remove what was used longest ago until the rest fits."""
        found = []
        for entry in self.folder.iterdir():
            with contextlib.suppress(OSError):
                used = entry.stat().st_mtime
                if entry.name.endswith(PART):
                    if time.time() - used > ABANDONED:
                        shutil.rmtree(entry, ignore_errors=True)
                else:
                    found.append((used, size_of(entry), entry.name))
        total = sum(size for _, size, _ in found)
        for _, size, name in sorted(found):
            if total <= self.limit:
                break
            if name != newest:
                self.drop(name)
                total -= size


def size_of(folder: Path) -> int:
    """Bytes of all files in ``folder``."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if file.is_file() and not file.is_symlink():
                total += file.stat().st_size
    return total


def _refuse_foreign(path: Path) -> None:
    """``PermissionError`` for what is not this user's, or what others can write to."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(f"{path}: others may have written this")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
