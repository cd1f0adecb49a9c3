"""The files that a manifest lists: each is read once, and what was read is what was hashed.

Between a check and a second opening, a file could be exchanged for another. So nothing is opened
twice, nothing is mapped, and a file that the manifest does not list is not there.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from eepass.bundle.manifest import AGAIN, MANIFEST
from eepass.errors import InputError
from eepass.reading import parse_json

CHUNK = 16 << 20
# safetensors reads no longer header either
MOST_HEADER = 100 << 20
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ListedFiles:
    """The files of ``folder``; ``listed``: [sha256, bytes] by name."""

    folder: Path
    listed: Mapping[str, list[Any]]

    def __post_init__(self) -> None:
        home = self.folder.resolve()
        for name in self.listed:
            if home not in (self.folder / name).resolve().parents:
                raise InputError(
                    f"{self.folder / MANIFEST}: names {name}, which is not in the folder; {AGAIN}"
                )

    def __contains__(self, name: str) -> bool:
        return name in self.listed

    def require(self, *names: str) -> None:
        """Raise ``InputError`` for the first of ``names`` that is not listed."""
        for name in names:
            if name not in self.listed:
                raise InputError(f"{self.folder / MANIFEST}: does not list {name}; {AGAIN}")

    def read(self, name: str) -> bytes:
        """What the manifest says about ``name`` is true of these bytes; else ``InputError``."""
        self.require(name)
        with self._opened(name) as reading:
            data = reading.take(self.listed[name][1])
            reading.finish()
        return bytes(data)

    def check(self, name: str) -> None:
        """Raise ``InputError`` if a file that nobody reads is not as it was written."""
        with self._opened(name) as reading:
            left = self.listed[name][1]
            while left:
                left -= len(reading.take(min(left, CHUNK)))
            reading.finish()

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors file in memory of their own; ``InputError`` as ``read``."""
        tensors: dict[str, Tensor] = {}
        with self._opened(name) as reading:
            try:
                size = int.from_bytes(reading.take(8), "little")
                header = parse_json(bytes(reading.take(min(size, MOST_HEADER))))
                header.pop("__metadata__", None)
                at = 0
                for key, entry in sorted(header.items(), key=lambda e: e[1]["data_offsets"]):
                    shape, (begin, end) = entry["shape"], entry["data_offsets"]
                    dtype = DTYPES[entry["dtype"]]
                    fits = begin == at and end - begin == math.prod(shape) * dtype.itemsize
                    if not fits or end > self.listed[name][1]:
                        raise ValueError(f"{key} is not where it should be")
                    raw = torch.empty(end - begin, dtype=torch.uint8)
                    reading.fill(raw.numpy().data)
                    tensors[key] = raw.view(dtype).view(shape)
                    at = end
            except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
                if isinstance(error, InputError):
                    raise
                raise reading.altered() from error
            reading.finish()
        return tensors

    def _opened(self, name: str) -> _Reading:
        path = self.folder / name
        try:
            # a pipe would be waited for
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(
                f"{path}: missing or unreadable ({error.strerror}); {AGAIN}"
            ) from error
        return _Reading(path, os.fdopen(handle, "rb", buffering=0), *self.listed[name])


class _Reading:
    """A file that is hashed as it is read."""

    def __init__(self, path: Path, file: BinaryIO, digest: str, size: int) -> None:
        self.path, self.file, self.digest, self.size = path, file, digest, size
        self._found = hashlib.sha256()
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            file.close()
            raise InputError(f"{path}: not a plain file; {AGAIN}")
        if found.st_size != size:
            file.close()
            raise InputError(
                f"{path}: {found.st_size} bytes, {size} were written: cut short or altered; {AGAIN}"
            )

    def __enter__(self) -> _Reading:
        return self

    def __exit__(self, *details: object) -> None:
        self.file.close()

    def take(self, size: int) -> bytearray:
        """The next ``size`` bytes, which must be there."""
        data = bytearray(size)
        self.fill(memoryview(data))
        return data

    def fill(self, into: memoryview) -> None:
        """Read as many bytes as ``into`` has, which must be there."""
        done = 0
        while done < len(into):
            part = into[done : done + CHUNK]
            count = self.file.readinto(part)  # type: ignore[attr-defined]
            if not count:
                raise self.altered()
            self._found.update(part[:count])
            done += count

    def finish(self) -> None:
        """Raise ``InputError`` unless this was the whole file, as it was written."""
        if self.file.read(1) or self._found.hexdigest() != self.digest:
            raise self.altered()

    def altered(self) -> InputError:
        return InputError(f"{self.path}: altered since it was written; {AGAIN}")
