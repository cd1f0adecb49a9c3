"""The signed manifest of a transformed folder: what it holds, and for which torch and CPU.

A folder holds native code, and hashes do not prove who wrote it. So the manifest, which holds a
hash of every file, is signed with the key of the user who wrote it; another user has to allow
loading it explicitly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from eepass.bundle import signing
from eepass.codegen.cpu.building import cpu_flags
from eepass.errors import InputError
from eepass.reading import from_json, parse_json

SCHEMA = 1
MANIFEST = "transformed.json"
SIGNATURE = "transformed.sig"
GRAPHS = "graphs.json"
AGAIN = "run eepass transform again"
# CPU flags that compiled code may depend on; others come and go with the operating system
EXTENSIONS = (
    "sse", "ssse", "avx", "amx", "fma", "f16c", "bmi", "abm", "popcnt", "movbe", "adx", "gfni",
    "vaes", "vpclmul", "sha_ni", "aes", "pclmul", "rdrnd", "rdseed", "xsave", "clflush", "clwb",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of a transformed folder; ``files``: [sha256, bytes] by name."""

    name: str
    eepass: str
    torch: str
    cpu: list[str]
    threads: int
    fingerprint: dict[str, Any]
    dtype: str
    max_length: int
    rows: list[int]
    stop: list[int]
    artifact: bool
    # the file of compiled code for each structure
    code: dict[str, str]
    # names of the model's tensors, in order
    tensors: list[str]
    files: dict[str, list[Any]]
    schema: int = SCHEMA


def is_transformed(folder: Path) -> bool:
    """Whether ``eepass transform`` wrote ``folder``, even if files are missing."""
    return any((folder / name).is_file() for name in (MANIFEST, SIGNATURE, GRAPHS))


def extensions() -> list[str]:
    """The instruction sets of this CPU that compiled code may use."""
    return sorted(flag for flag in cpu_flags() if flag.startswith(EXTENSIONS))


def write_manifest(folder: Path, needed: Iterable[str], **facts: Any) -> None:
    """Hash every file of ``folder``, and write and sign the manifest with ``facts``.

    Raises ``InputError`` where one of the files ``needed`` is missing or empty: nothing is signed
    that does not load.
    """
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = {name: list(_digest(folder / name)) for name in names}
    lost = [name for name in needed if not files.get(name, ("", 0))[1]]
    if lost:
        raise InputError(
            f"{folder}: {lost[0]} disappeared while the folder was written, so it is not signed; "
            f"{AGAIN}"
        )
    manifest = Manifest(torch=torch.__version__, cpu=extensions(), files=files, **facts)
    data = json.dumps(asdict(manifest), indent=1).encode() + b"\n"
    (folder / MANIFEST).write_bytes(data)
    (folder / SIGNATURE).write_bytes(signing.sign(data))


def read_manifest(folder: Path, trust_native: bool) -> Manifest:
    """The manifest of ``folder``; the files it lists are checked by whoever reads them.

    Raises ``InputError`` naming the file or field that is wrong, and what to do. ``trust_native``:
    also accept a folder that someone else signed, or nobody.
    """
    path = folder / MANIFEST
    data = _read(path)
    _check_origin(folder, data, trust_native)
    manifest = _parse(data, path)
    _check_machine(manifest, path)
    return manifest


def _check_origin(folder: Path, data: bytes, trust_native: bool) -> None:
    path = folder / SIGNATURE
    hint = (
        "The folder holds native code; if you trust its origin, pass --trust-native, or "
        "trust_native=True"
    )
    if not path.exists():
        if trust_native:
            return
        raise InputError(f"{path}: missing, nobody signed this. {hint}")
    signer = signing.signer_of(data, _read(path), path)
    if signer != signing.own_key() and not trust_native:
        raise InputError(f"{path}: signed by another user (key {signer[:16]}). {hint}")


def _parse(data: bytes, path: Path) -> Manifest:
    try:
        values: Mapping[str, Any] = parse_json(data)
        schema = values["schema"]
        if schema == SCHEMA:
            manifest = from_json(Manifest, values)
            for name, entry in manifest.files.items():
                if list(map(type, entry)) != [str, int]:
                    raise ValueError(f"files: {name} of another type")
            return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged, {error} is missing or wrong; {AGAIN}") from error
    raise InputError(f"{path}: schema {schema!r}, this eepass reads {SCHEMA}; {AGAIN}")


def _check_machine(manifest: Manifest, path: Path) -> None:
    if manifest.torch != torch.__version__:
        raise InputError(
            f"{path}: compiled for torch {manifest.torch}, this is {torch.__version__}; "
            f"install torch {manifest.torch}, or {AGAIN}"
        )
    if missing := sorted(set(manifest.cpu) - set(extensions())):
        raise InputError(
            f"{path}: compiled for a CPU with {', '.join(missing[:4])}, which this one lacks; "
            f"{AGAIN} here"
        )


def _digest(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: missing or unreadable ({error.strerror}); {AGAIN}") from error
