"""Carry a large file in parts: split it, join it again, check the hashes.

    python tools/parts.py split FILE --out DIR [--megabytes 45]
    python tools/parts.py join DIR --out FILE
    python tools/parts.py check DIR

DIR holds FILE.part-01, -02 … and FILE.parts.json, which names the SHA-256 of each and of the whole.
Only the standard library is used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUFFIX = ".parts.json"
MEGABYTES = 45
CHUNK = 1 << 20


class PartsError(ValueError):
    """Parts that cannot be used, with the reason."""


def split(file: Path, out: Path, megabytes: float = MEGABYTES) -> Path:
    """Write ``file`` to ``out`` in parts of at most ``megabytes`` · 10⁶ bytes; the manifest."""
    limit = int(megabytes * 1_000_000)
    if limit < 1:
        raise PartsError(f"{megabytes} MB a part: give more than nothing")
    out.mkdir(parents=True, exist_ok=True)
    whole, parts = hashlib.sha256(), []
    try:
        source = file.open("rb")
    except OSError as error:
        raise PartsError(f"{file}: cannot be read ({error.strerror})") from error
    with source:
        while data := source.read(limit):
            name = f"{file.name}.part-{len(parts) + 1:02d}"
            _write(out / name, iter([data]))
            whole.update(data)
            parts.append(
                {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            )
    if not parts:
        raise PartsError(f"{file}: empty")
    manifest = {"name": file.name, "bytes": sum(part["bytes"] for part in parts),
                "sha256": whole.hexdigest(), "parts": parts}  # fmt: skip
    target = out / (file.name + SUFFIX)
    # last: parts without a manifest are incomplete
    _write(target, iter([(json.dumps(manifest, indent=1) + "\n").encode()]))
    return target


def join(folder: Path, file: Path) -> Path:
    """Join the parts in ``folder`` to ``file``, which is written only if all hashes match.

    A file that has the hash already stays. ``file`` may be a folder to write into.
    """
    manifest = read_manifest(folder)
    if file.is_dir():
        file = file / manifest["name"]
    if file.exists() and _digest(file) == manifest["sha256"]:
        return file
    check(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    _write(file, (data for part in manifest["parts"] for data in _chunks(folder / part["name"])))
    return file


def check(folder: Path) -> dict[str, Any]:
    """The manifest of ``folder``; ``PartsError`` names the first part that is not as it says."""
    manifest = read_manifest(folder)
    whole = hashlib.sha256()
    for part in manifest["parts"]:
        path = folder / part["name"]
        if not path.is_file():
            raise PartsError(f"{path}: missing")
        if path.stat().st_size != part["bytes"]:
            raise PartsError(f"{path}: {path.stat().st_size} bytes, {part['bytes']} expected")
        own = hashlib.sha256()
        for data in _chunks(path):
            own.update(data)
            whole.update(data)
        if own.hexdigest() != part["sha256"]:
            raise PartsError(f"{path}: its hash is not the one in the manifest; carry it again")
    if whole.hexdigest() != manifest["sha256"]:
        raise PartsError(f"{folder}: the parts are not those of {manifest['name']}")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    found = sorted(folder.glob("*" + SUFFIX))
    if len(found) != 1:
        raise PartsError(f"{folder}: {len(found)} manifests (*{SUFFIX}), one expected")
    try:
        manifest: dict[str, Any] = json.loads(found[0].read_text(encoding="utf-8"))
        names = [manifest["name"], *(part["name"] for part in manifest["parts"])]
        manifest["sha256"], [(part["bytes"], part["sha256"]) for part in manifest["parts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PartsError(f"{found[0]}: damaged ({error})") from error
    for name in names:
        if Path(name).name != name:
            raise PartsError(f"{found[0]}: {name!r} is no file name")
    return manifest


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as source:
        while data := source.read(CHUNK):
            yield data


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for data in _chunks(path):
        digest.update(data)
    return digest.hexdigest()


def _write(path: Path, data: Iterator[bytes]) -> None:
    scratch = path.with_name(f".{path.name}.writing")
    with scratch.open("wb") as target:
        for chunk in data:
            target.write(chunk)
    os.replace(scratch, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    splitting = commands.add_parser("split", help="a file to parts")
    splitting.add_argument("file", type=Path)
    splitting.add_argument("--out", type=Path, required=True)
    splitting.add_argument("--megabytes", type=float, default=MEGABYTES)
    joining = commands.add_parser("join", help="parts to the file")
    joining.add_argument("folder", type=Path)
    joining.add_argument("--out", type=Path, required=True)
    checking = commands.add_parser("check", help="are all parts there and whole?")
    checking.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        if options.command == "split":
            print(split(options.file, options.out, options.megabytes))
        elif options.command == "join":
            print(join(options.folder, options.out))
        else:
            manifest = check(options.folder)
            print(f"{manifest['name']}: {len(manifest['parts'])} parts, whole")
    except (PartsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
