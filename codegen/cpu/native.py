"""Build and load the C++ kernels of the ``eepass::`` operators, once per machine and source."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

# the operators must be defined before kernels are added to them
import eepass.ops.fused
import eepass.ops.quantized  # noqa: F401

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
FLAGS = (
    "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp",
    "-std=c++20", "-fPIC", "-shared",
)  # fmt: skip


def cache_dir() -> Path:
    """Where eepass caches what it builds: ``$XDG_CACHE_HOME/eepass`` or ``~/.cache/eepass``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eepass"


class KernelsMissing(RuntimeError):
    """The kernels cannot be built on this machine; the message says why."""


_opened: list[str] = []


@functools.cache
def load_kernels() -> str:
    """Load the kernels, building them if necessary; returns why that failed, or ''.

    Without them the operators run their reference implementations: correct, but slower.
    """
    try:
        open_kernels(build_kernels())
    except KernelsMissing as error:
        return str(error)
    return ""


def open_kernels(library: Path) -> None:
    """Load a library that ``build_kernels`` made, on this or another machine.

    A process has one set of kernels: raises ``KernelsMissing`` if others are loaded.
    """
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    if _opened and _opened[0] != digest:
        raise KernelsMissing("this process runs other kernels already: use a process of its own")
    if not _opened:
        # global, since compiled code finds the kernels' C functions by name
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        _opened.append(digest)


def find_compiler() -> str:
    """The C++ compiler that kernels are built with; raises ``KernelsMissing`` if there is none."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise KernelsMissing("no C++ compiler was found (install g++ or set CXX)")
    return compiler


def library_of(compiler: str) -> Path:
    """The path of the kernels that ``compiler`` builds for this machine, built or not."""
    texts = [path.read_text() for path in (*HEADERS, *SOURCES)]
    fingerprint = hashlib.sha256(
        "\0".join([*texts, torch.__version__, compiler, *FLAGS, *cpu_flags()]).encode()
    ).hexdigest()[:16]
    return cache_dir() / f"rows-{fingerprint}.so"


def build_kernels() -> Path:
    """The library of kernels for this machine; raises ``KernelsMissing`` if it does not build."""
    compiler = find_compiler()
    library, torch_root = library_of(compiler), Path(torch.__file__).parent
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = Path(scratch) / library.name
            command = [
                compiler, *FLAGS, *map(str, SOURCES), "-o", str(built),
                f"-I{torch_root / 'include'}", f"-L{torch_root / 'lib'}", "-lc10", "-ltorch_cpu",
            ]  # fmt: skip
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise KernelsMissing(f"the C++ kernels do not build: {_last_line(result.stderr)}")
            os.replace(built, library)
    return library


def cpu_flags() -> list[str]:
    """This CPU's features by their Linux names; empty where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    line = next((line for line in lines if line.startswith("flags")), "")
    return line.partition(":")[2].split()


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines() or [""]
    return lines[0].strip()
