"""Read a GGUF file with NumPy alone: its metadata, and its tensors as float32."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"
# value types of the metadata; 8 is a string, 9 an array
SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING, ARRAY = 8, 9
# weights in a quantised block
BLOCK = 32


class GgufError(ValueError):
    """A file that cannot be read, with the reason."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a tensor type is stored: ``size`` weights in ``count`` bytes."""

    name: str
    size: int
    count: int
    decode: Callable[[np.ndarray], np.ndarray]


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The half-precision number at byte ``at`` of each block [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(blocks: np.ndarray) -> np.ndarray:
    """4-bit numbers [n, 32]: the low halves of all bytes, then the high halves."""
    return np.concatenate([blocks & 15, blocks >> 4], axis=1)


def _bf16(blocks: np.ndarray) -> np.ndarray:
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


FORMS = {
    0: Form("F32", 1, 4, lambda b: b.view(np.float32)),
    1: Form("F16", 1, 2, lambda b: b.view(np.float16).astype(np.float32)),
    2: Form("Q4_0", BLOCK, 18,
            lambda b: _half(b, 0) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)),
    3: Form("Q4_1", BLOCK, 20,
            lambda b: _half(b, 0) * _nibbles(b[:, 4:]).astype(np.float32) + _half(b, 2)),
    8: Form("Q8_0", BLOCK, 34,
            lambda b: _half(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)),
    30: Form("BF16", 1, 2, _bf16),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies: its shape, outermost dimension first, its form and its first byte."""

    shape: tuple[int, ...]
    form: Form
    offset: int


class GgufFile:
    """``metadata`` and ``tensors`` (names in the file's order) of a GGUF file.

    Raises ``GgufError`` for a file that is not GGUF, is cut short, or holds a tensor type that is
    not supported here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise GgufError(f"{path}: cannot be read ({error})") from error
        self._at = 0
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, KeyError) as error:
            raise GgufError(f"{path}: damaged or cut short ({error})") from error

    def tensor(self, name: str) -> np.ndarray:
        """A tensor in float32."""
        stored = self.tensors[name]
        weights = int(np.prod(stored.shape))
        size = weights // stored.form.size * stored.form.count
        raw = np.array(self._bytes[stored.offset : stored.offset + size])
        return stored.form.decode(raw.reshape(-1, stored.form.count)).reshape(stored.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def _read_header(self) -> None:
        if self._take(4) != MAGIC:
            raise GgufError(f"{self.path}: not a GGUF file")
        version, tensors, values = self._unpack("IQQ")
        if version not in (2, 3):
            raise GgufError(f"{self.path}: GGUF version {version}, 2 and 3 are read here")
        self.metadata: dict[str, Any] = {}
        for _ in range(values):
            name, (kind,) = self._string(), self._unpack("I")
            self.metadata[name] = self._value(kind)
        found = [self._description() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        first = -(-self._at // alignment) * alignment
        self.tensors: dict[str, Stored] = {}
        for name, shape, kind, offset in found:
            if kind not in FORMS:
                known = ", ".join(form.name for form in FORMS.values())
                raise GgufError(f"{self.path}: {name} is of type {kind}; read here are {known}")
            form = FORMS[kind]
            end = first + offset + int(np.prod(shape)) // form.size * form.count
            if end > len(self._bytes):
                raise GgufError(f"{self.path}: cut short, {name} ends at byte {end}")
            self.tensors[name] = Stored(shape, form, first + offset)

    def _description(self) -> tuple[str, tuple[int, ...], int, int]:
        name, (dimensions,) = self._string(), self._unpack("I")
        # the innermost dimension is written first
        shape = self._unpack(f"{dimensions}Q")[::-1]
        kind, offset = self._unpack("IQ")
        return name, shape, kind, offset

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            inner, count = self._unpack("IQ")
            return [self._value(inner) for _ in range(count)]
        return self._unpack(SCALARS[kind])[0]

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        return self._take(length).decode("utf-8")

    def _unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))

    def _take(self, count: int) -> bytes:
        taken = self._bytes[self._at : self._at + count].tobytes()
        self._at += count
        if len(taken) < count:
            raise GgufError(f"{self.path}: cut short at byte {len(self._bytes)}")
        return taken
