"""Build and load the C++ kernels of the ``eepass::`` operators, once per machine and source."""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

import eepass.fused_ops  # noqa: F401  the operators must be defined before kernels are added to them

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
FLAGS = (
    "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp",
    "-std=c++20", "-fPIC", "-shared",
)  # fmt: skip


def cache_dir() -> Path:
    """Where eepass keeps what it built: ``$XDG_CACHE_HOME/eepass``, mostly ``~/.cache/eepass``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eepass"


@functools.cache
def load_kernels() -> str:
    """Load the kernels, building them if need be; returns why that failed, or ''.

    Without them the operators run by their eager definitions: right, but slower.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler was found (install g++ or set CXX)"
    torch_root = Path(torch.__file__).parent
    texts = [path.read_text() for path in (*HEADERS, *SOURCES)]
    fingerprint = hashlib.sha256(
        "\0".join([*texts, torch.__version__, compiler, *FLAGS, _cpu_flags()]).encode()
    ).hexdigest()[:16]
    library = cache_dir() / f"rows-{fingerprint}.so"
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
                return f"the C++ kernels do not build: {_last_line(result.stderr)}"
            os.replace(built, library)
    torch.ops.load_library(str(library))
    return ""


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("flags")), "")


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines() or [""]
    return lines[0].strip()
