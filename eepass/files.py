"""Write files whole or not at all; what is no plain file is written through."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from eepass.errors import InputError

# symbolic links that are followed before they are taken for a loop, as in Linux
MOST_LINKS = 40


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """``InputError`` where the system refuses to write ``target``."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from error


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file that whoever may read other new files may read too.

    Raises ``OSError`` where the system refuses; safetensors has an error of its own for that, and
    writes files that their owner alone can read.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error
    path.chmod(mode)


def write_tensors_atomically(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file whole or not at all."""
    with _replacing(path) as scratch:
        save_tensors(scratch, tensors, metadata)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all; a link's target stays where it is. Where ``path`` is
    no plain file (a device, a pipe, an open stream), write to it."""
    plain = _plain_file(path)
    if plain is None:
        with path.open("a", encoding="utf-8") as through:
            through.write(text)
        return
    with _replacing(plain) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _plain_file(path: Path) -> Path | None:
    """The plain file that ``path`` is, leads to, or will be; None for anything else."""
    if path.exists() and not path.is_file():
        return None
    for _ in range(MOST_LINKS):
        if not path.is_symlink():
            return path
        # /dev/stdout leads there: the file's name, if it has one, is not what was meant
        if path.parent.resolve().is_relative_to("/proc"):
            return None
        path = path.parent / path.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write, which takes its place, owner and mode afterwards."""
    # by process: several may write the same file
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield scratch
        with contextlib.suppress(FileNotFoundError):
            before = path.stat()
            scratch.chmod(before.st_mode & 0o7777)
            # only root may give files away
            with contextlib.suppress(PermissionError):
                os.chown(scratch, before.st_uid, before.st_gid)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
