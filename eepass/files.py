"""Write files and folders whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from eepass.errors import InputError


def write_tensors_atomically(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file whole or not at all."""
    with _replacing(path) as scratch:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, scratch, metadata)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with _replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write, which takes its place afterwards."""
    # by process: several may write the same file
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def refuse_other_folder(target: Path, ours: Callable[[Path], bool]) -> None:
    """Raise ``InputError`` if ``target`` is there, and is neither empty nor a folder of ours."""
    if target.exists() and not (target.is_dir() and (ours(target) or not any(target.iterdir()))):
        raise InputError(f"{target}: something else is there; give a new or an empty folder")


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` to fill, which takes its place afterwards."""
    scratch, old = (target.with_name(f".{target.name}.{end}") for end in ("part", "old"))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(scratch, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
