"""Build and load the C++ kernels of the ``eepass::`` operators, once per machine and source."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

# the operators must be defined before kernels are added to them
import eepass.ops  # noqa: F401
from eepass.codegen.libraries import path_of
from eepass.errors import RunsSlower

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
FLAGS = (
    "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-std=c++20", "-fPIC",
)  # fmt: skip
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
# what NAME_<target>.cpp is compiled for; `isa.cpp` chooses among them at run time
TARGETS: dict[str, tuple[str, ...]] = {
    "avx2": AVX2,
    "avxvnni": (*AVX2, "-mavxvnni"),
    "avx512": AVX512,
    "avx512bf16": (*AVX512, "-mavx512bf16"),
}


def cache_dir() -> Path:
    """Where eepass caches what it builds: ``$XDG_CACHE_HOME/eepass`` or ``~/.cache/eepass``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eepass"


class KernelsMissing(RuntimeError):
    """The kernels cannot be built on this machine; the message says why."""


_opened: list[str] = []


@functools.cache
def load_kernels() -> str:
    """Load the kernels, building them if necessary; returns why that failed, or ''.

    Without them the operators run their reference implementations: correct, but slower. That is a
    ``RunsSlower`` warning.
    """
    try:
        open_kernels(build_kernels())
    except KernelsMissing as error:
        warnings.warn(f"decoding will be slow: {error}", RunsSlower, stacklevel=2)
        return str(error)
    return ""


def open_kernels(library: Path, contents: bytes | None = None) -> None:
    """Load a library that ``build_kernels`` made, on this or another machine.

    ``contents``: of the file, where it was read already. A process has one set of kernels: raises
    ``KernelsMissing`` if others are loaded.
    """
    data = library.read_bytes() if contents is None else contents
    digest = hashlib.sha256(data).hexdigest()
    if _opened and _opened[0] != digest:
        raise KernelsMissing("this process runs other kernels already: use a process of its own")
    if not _opened:
        # global, since compiled code finds the kernels' C functions by name
        file = str(library) if contents is None else path_of(contents, str(library))
        ctypes.CDLL(file, mode=ctypes.RTLD_GLOBAL)
        _opened.append(digest)


def kernel_isa(name: str | None = None) -> str:
    """The instruction set of the kernels in use: avx512, avxvnni or avx2; "" where there are none.

    ``name`` chooses another from now on, for tests and measurements: one of these, "avx512-widened"
    (AVX-512 without its bf16 products), or "best". Raises ``KernelsMissing`` for one that this
    processor does not have.
    """
    if load_kernels():
        return ""
    choose = ctypes.CDLL(None).eepass_kernel_isa
    choose.restype, choose.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
    found = choose(None if name is None else name.encode())
    if found is None:
        raise KernelsMissing(f"this processor has no kernels for {name!r}")
    return str(found.decode())


def release_threads() -> None:
    """End the OpenMP threads that wait for what the calling thread computes next, so that another
    thread can decode at full speed: libgomp lets threads wait without sleeping only while there are
    no more of them than processors. They come back when they are needed. Does nothing where the
    kernels were not loaded.
    """
    if _opened:
        ctypes.CDLL(None).eepass_release_threads()


def find_compiler() -> str:
    """The C++ compiler that kernels are built with; raises ``KernelsMissing`` if there is none."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise KernelsMissing("no C++ compiler was found (install g++ or set CXX)")
    return compiler


def library_of(compiler: str) -> Path:
    """The path of the kernels that ``compiler`` builds for this machine, built or not."""
    texts = [path.read_text() for path in (*HEADERS, *SOURCES)]
    flags = [*FLAGS, str(TARGETS), *cpu_flags()]
    fingerprint = hashlib.sha256(
        "\0".join([*texts, torch.__version__, compiler, *flags]).encode()
    ).hexdigest()[:16]
    return cache_dir() / f"rows-{fingerprint}.so"


def build_kernels() -> Path:
    """The library of kernels for this machine; raises ``KernelsMissing`` if it does not build."""
    compiler = find_compiler()
    library = library_of(compiler)
    if not library.exists():
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
                built = Path(scratch) / library.name
                compile_kernels(compiler, built)
                os.replace(built, library)
        except OSError as error:
            raise KernelsMissing(
                f"the C++ kernels cannot be kept in {library.parent} ({error.strerror}); set "
                "XDG_CACHE_HOME to a folder with 20 MB of room"
            ) from error
    refuse_foreign(library)
    return library


def refuse_foreign(*files: Path) -> None:
    """Raise ``KernelsMissing`` for native code that someone other than this user or root may have
    written."""
    for path in (*files, *{file.parent for file in files}):
        found = path.stat()
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o002:
            raise KernelsMissing(
                f"others may have written {path}; set XDG_CACHE_HOME to a folder of your own"
            )


def compile_kernels(compiler: str, library: Path, extra: tuple[str, ...] = ()) -> None:
    """Compile and link ``library``, with ``extra`` flags; raises ``KernelsMissing``."""
    torch_root = Path(torch.__file__).parent
    found = sources()
    # reading torch's headers takes most of the time: once for all that are for any processor
    joined = library.parent / "any_processor.cpp"
    joined.write_text("".join(f'#include "{s}"\n' for s in found if not flags_of(s)))
    objects = {s: library.parent / f"{s.stem}.o" for s in (joined, *filter(flags_of, found))}
    commands = [
        [compiler, *FLAGS, *extra, *flags_of(source), f"-I{torch_root / 'include'}",
         "-c", str(source), "-o", str(made)]
        for source, made in objects.items()
    ]  # fmt: skip
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_run, commands))
    _run([
        compiler, "-shared", "-fopenmp", *extra, *map(str, objects.values()), "-o", str(library),
        f"-L{torch_root / 'lib'}", "-lc10", "-ltorch_cpu",
    ])  # fmt: skip


def sources() -> list[Path]:
    """What is compiled here: sources for an instruction set of x86 only where that is known."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    return [source for source in SOURCES if x86 or _target(source) not in TARGETS]


def flags_of(source: Path) -> tuple[str, ...]:
    """The compiler's flags for the processor that ``source`` is written for."""
    return TARGETS.get(_target(source), ())


def _target(source: Path) -> str:
    return source.stem.rpartition("_")[2]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        said = _last_line(result.stderr) or f"{command[0]} ended with {result.returncode}"
        full = "No space left" in result.stderr
        help = "set XDG_CACHE_HOME and TMPDIR to folders with room" if full else (
            "set CXX to another compiler, or install a newer g++"
        )  # fmt: skip
        raise KernelsMissing(f"the C++ kernels do not build ({said}); {help}")


def best_isa(flags: list[str]) -> str:
    """What ``kernel_isa`` names where ``cpu_flags`` gives ``flags``, as `isa.cpp` chooses it."""
    have = set(flags)
    if not {"avx2", "fma", "f16c"} <= have:
        return ""
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"} <= have:
        return "avx512"
    return "avxvnni" if "avx_vnni" in have else "avx2"


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
