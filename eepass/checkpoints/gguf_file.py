"""The header of a GGUF file: its metadata, and where its tensors lie.

Read here and not by the ``gguf`` package, which takes ten seconds for a vocabulary of 150,000. The
format: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eepass.errors import InputError

# value types of the metadata; 8 is a string, 9 an array
SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING, ARRAY, UINT32 = 8, 9, 4
# lists in lists, at most
DEPTH = 4
ALIGNMENT = "general.alignment"
TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a file: ``kind`` as the ``gguf`` package numbers types, ``shape`` rows first."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def values(self) -> int:
        """How many values it has."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


@dataclass(frozen=True, slots=True)
class GgufFile:
    """``fields``: the metadata by key, arrays as their lengths; ``spans``: where each key's bytes
    lie; ``tensor_span``: where the list of tensors does; ``digest``: a hash of all before the
    tensors."""

    path: Path
    version: int
    fields: dict[str, Any]
    spans: dict[str, tuple[int, int]]
    tensors: tuple[GgufTensor, ...]
    tensor_span: tuple[int, int]
    digest: str

    def read(self, tensor: GgufTensor, into: np.ndarray | None = None) -> np.ndarray:
        """The bytes of a tensor, uint8 [rows, bytes of a row]; ``into``: uint8 of any size, used
        for them if it is large enough. Raises ``InputError`` where the file has become shorter."""
        if into is None or len(into) < tensor.size:
            into = np.empty(tensor.size, np.uint8)
        data = into[: tensor.size]
        rest = data.data
        with self.path.open("rb", buffering=0) as file:
            file.seek(tensor.offset)
            while rest and (count := file.readinto(rest)):
                rest = rest[count:]
        if rest:
            raise InputError(f"{self.path}: it has become shorter while it was read")
        rows = int(np.prod(tensor.shape[:-1])) if len(tensor.shape) > 1 else 1
        return data.reshape(rows, -1)

    def without_vocabulary(self, target: Path) -> None:
        """Write the header alone, and of the tokenizer only what is no list: what a configuration
        is read from. The tensors are a hole in the file."""
        architecture = self.fields["general.architecture"]
        size_key = f"{architecture}.vocab_size"
        with self.path.open("rb") as file:
            kept = [self._piece(file, *self.spans[key]) for key in self.spans if not _listed(key)]
            if size_key not in self.fields and TOKENS in self.fields:
                kept.append(_text(size_key) + struct.pack("<II", UINT32, self.fields[TOKENS]))
            infos = self._piece(file, *self.tensor_span)
        head = b"GGUF" + struct.pack("<IQQ", self.version, len(self.tensors), len(kept))
        with target.open("wb") as out:
            out.write(head + b"".join(kept) + infos)
            out.truncate(self.path.stat().st_size)

    def whole_header(self, target: Path) -> None:
        """Write all of the header; the tensors are a hole in the file."""
        with self.path.open("rb") as file, target.open("wb") as out:
            out.write(self._piece(file, 0, self.tensor_span[1]))
            out.truncate(self.path.stat().st_size)

    @staticmethod
    def _piece(file: Any, begin: int, end: int) -> bytes:
        file.seek(begin)
        piece: bytes = file.read(end - begin)
        return piece


def _listed(key: str) -> bool:
    return key.startswith("tokenizer.") and key.rpartition(".")[2] in (
        "tokens", "merges", "scores", "token_type",
    )  # fmt: skip


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def read_header(path: Path) -> GgufFile:
    """The header of ``path``; raises ``InputError`` where it is none, or lies about its sizes."""
    with path.open("rb") as file:
        if path.stat().st_size < 24 or file.read(4) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(path, data).header()
            except (struct.error, OverflowError, UnicodeDecodeError, MemoryError) as error:
                raise InputError(f"{path}: its header is damaged or cut short ({error})") from error


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 4

    def header(self) -> GgufFile:
        version, count, keys = self.take("IQQ")
        if version not in (2, 3):
            raise InputError(f"{self.path}: GGUF version {version}; known are 2 and 3")
        fields: dict[str, Any] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(keys):
            begin = self.at
            key = self.string()
            fields[key] = self.value(*self.take("I"))
            spans[key] = (begin, self.at)
        if not isinstance(fields.get("general.architecture"), str):
            raise InputError(f"{self.path}: it does not say what architecture it is of")
        if not count:
            raise InputError(f"{self.path}: it has no tensors")
        begin = self.at
        infos = list(self.infos(count))
        end = self.at
        alignment = fields.get(ALIGNMENT, 32)
        if not isinstance(alignment, int) or not 0 < alignment <= len(self.data):
            raise InputError(f"{self.path}: {ALIGNMENT} is {alignment!r}")
        start = -(-end // alignment) * alignment
        tensors = tuple(self.placed(*info, start) for info in infos)
        if twice := [n for n, count in Counter(t.name for t in tensors).items() if count > 1]:
            raise InputError(f"{self.path}: {twice[0]} is there twice")
        digest = hashlib.sha256(memoryview(self.data)[:end]).hexdigest()
        return GgufFile(self.path, version, fields, spans, tensors, (begin, end), digest)

    def take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return found

    def string(self) -> str:
        (size,) = self.take("Q")
        if size > len(self.data) - self.at:
            raise struct.error(f"a string of {size} bytes at byte {self.at}")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def strings(self, count: int) -> None:
        """Pass over strings: hundreds of thousands in a vocabulary."""
        data, at, end = self.data, self.at, len(self.data)
        for _ in range(count):
            begin = at + 8
            at = begin + int.from_bytes(data[at:begin], "little")
            if at > end:
                raise struct.error(f"a string of {at - begin} bytes at byte {begin}")
            data[begin:at].decode()
        self.at = at

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.take(SCALARS[kind])[0]
        if kind != ARRAY or depth > DEPTH:
            raise struct.error(f"a value of type {kind}")
        inner, count = self.take("IQ")
        if count > len(self.data):
            raise struct.error(f"a list of {count} values")
        if inner in SCALARS:
            self.at += count * struct.calcsize(f"<{SCALARS[inner]}")
        elif inner == STRING:
            self.strings(count)
        else:
            for _ in range(count):
                self.value(inner, depth + 1)
        return count

    def infos(self, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        for _ in range(count):
            name = self.string()
            (dimensions,) = self.take("I")
            if dimensions > 8:
                raise struct.error(f"{name} has {dimensions} dimensions")
            shape = tuple(reversed(self.take(f"{dimensions}Q")))
            kind, offset = self.take("IQ")
            yield name, shape, kind, offset

    def placed(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int
    ) -> GgufTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block, stored = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise InputError(f"{self.path}: {name} is of type {kind}, which is unknown") from None
        width = shape[-1] if shape else 1
        if width % block:
            raise InputError(
                f"{self.path}: rows of {name} are {width} wide, not in blocks of {block}"
            )
        tensor = GgufTensor(name, kind, shape, start + offset, 0)
        size = tensor.values // block * stored
        if start + offset + size > len(self.data):
            raise InputError(
                f"{self.path}: {name} ends at byte {start + offset + size} of {len(self.data)}: "
                "the file is cut short or lies about its sizes"
            )
        return replace(tensor, size=size)
