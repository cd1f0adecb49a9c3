"""What of this machine made a command fail, in a line that names the variable that helps."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT}
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
# what the loader says of a library whose writing a machine that went off has cut short
CUT_SHORT = re.compile(
    r"(?P<file>/.+\.so): (file too short|invalid ELF header|cannot read file data)"
)


def machine_cause(error: BaseException) -> str | None:
    """Why ``error`` came about, where a full or closed folder or the C++ compiler is the reason,
    or compiled code that cannot be loaded; None for anything else."""
    chain = list(_chain(error))
    # a compiler that fails may be said to fail for want of space
    for one in chain:
        if isinstance(one, OSError) and one.filename and one.errno in FULL | CLOSED:
            return _of_folder(one)
    for one in chain:
        if "No space left on device" in str(one):
            return f"no space left on the device; make room, or set {_variables()}"
    for one in chain:
        if cut := CUT_SHORT.search(str(one)):
            return f"{cut[0]}: its writing was cut short; delete it, and it is compiled again"
    for one in chain:
        # PyTorch's, which are not imported for this
        name = type(one).__name__
        if name == "InvalidCxxCompiler":
            return "no C++ compiler works here: install g++, or set CXX to one that does"
        if name in ("CppCompileError", "CppWrapperCompileError", "CUDACompileError"):
            return (
                f"the C++ compiler failed ({_reason(one)}): set CXX to another, or install a "
                "newer g++"
            )
    return None


def _of_folder(error: OSError) -> str:
    # what was copied to a full disk has two names, and the other is full
    file = error.filename2 if error.errno in FULL and error.filename2 else error.filename
    said = f"{file}: {error.strerror}"
    variable = variable_of(Path(os.fsdecode(file)))
    first = "make room" if error.errno in FULL else ""
    second = f"set {variable} to a folder elsewhere" if variable else ""
    help = " or ".join(filter(None, (first, second)))
    return f"{said}; {help}" if help else said


def variable_of(path: Path) -> str | None:
    """The environment variable that says where ``path`` lies, if one does."""
    home = Path(os.path.expanduser("~"))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    temporary = Path(tempfile.gettempdir())
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    places = {
        "TORCHINDUCTOR_CACHE_DIR": Path(inductor) if inductor else temporary / "torchinductor_",
        "HF_HOME": Path(os.environ.get("HF_HOME") or cache / "huggingface"),
        "XDG_CACHE_HOME": cache,
        "XDG_CONFIG_HOME": Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config"),
        "TMPDIR": temporary,
    }
    absolute = os.path.abspath(path)
    for name, place in places.items():
        if absolute.startswith(str(place)):
            return name
    return None


def _variables() -> str:
    return "TMPDIR, TORCHINDUCTOR_CACHE_DIR or XDG_CACHE_HOME to a folder elsewhere"


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if "error" in line.lower() and "command" not in line.lower()]
    return (said or lines or [type(error).__name__])[0][:200]


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop(0)
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [one.__cause__, one.__context__]
