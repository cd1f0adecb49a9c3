"""Build the C++ kernels of the ``eepass::`` operators, once per machine and source.

torch is not imported here, so that the compiler can run while it is.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from threading import Lock, Thread

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


# held while the library is built
_building = Lock()


class KernelsMissing(RuntimeError):
    """The kernels cannot be built on this machine; the message says why."""


def find_compiler() -> str:
    """The C++ compiler that kernels are built with; raises ``KernelsMissing`` if there is none."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise KernelsMissing("no C++ compiler was found (install g++ or set CXX)")
    return compiler


def library_of(compiler: str, every: bool = False) -> Path:
    """The path of the kernels that ``compiler`` builds for this machine, built or not; ``every``:
    for all instruction sets, not for the best of this processor alone."""
    texts = [path.read_text() for path in (*HEADERS, *sources(every))]
    flags = [*FLAGS, str(TARGETS), *cpu_flags()]
    fingerprint = hashlib.sha256(
        "\0".join([*texts, version("torch"), compiler, *flags]).encode()
    ).hexdigest()[:16]
    return cache_dir() / f"rows-{fingerprint}.so"


def begin_to_build() -> None:
    """Build the kernels in the background, if they are not built; ``build_kernels`` waits for it,
    and says why where that fails."""

    def work() -> None:
        with suppress(KernelsMissing):
            build_kernels()

    # a command that ends early does not wait for it
    Thread(target=work, name="kernels", daemon=True).start()


def build_kernels(every: bool = False) -> Path:
    """The library of kernels for this machine: for ``every`` instruction set where that is asked
    for or built already, else for the best of this processor, in half the time.

    Raises ``KernelsMissing`` if it does not build.
    """
    compiler = find_compiler()
    with _building:
        library = library_of(compiler, True)
        if not every and not library.exists():
            library = library_of(compiler)
        _build(compiler, library, every)
    refuse_foreign(library)
    return library


def _build(compiler: str, library: Path, every: bool) -> None:
    if not library.exists():
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
                built = Path(scratch) / library.name
                compile_kernels(compiler, built, every)
                os.replace(built, library)
        except OSError as error:
            raise KernelsMissing(
                f"the C++ kernels cannot be kept in {library.parent} ({error.strerror}); set "
                "XDG_CACHE_HOME to a folder with 20 MB of room"
            ) from error


def refuse_foreign(*files: Path) -> None:
    """Raise ``KernelsMissing`` for native code that someone other than this user or root may have
    written."""
    for path in (*files, *{file.parent for file in files}):
        found = path.stat()
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o002:
            raise KernelsMissing(
                f"others may have written {path}; set XDG_CACHE_HOME to a folder of your own"
            )


def compile_kernels(compiler: str, library: Path, every: bool) -> None:
    """Compile and link ``library``, as ``library_of`` has it; raises ``KernelsMissing``."""
    torch_root = _torch_root()
    found = sources(every)
    # reading torch's headers takes most of the time: once for all that are for any processor
    joined = library.parent / "any_processor.cpp"
    joined.write_text("".join(f'#include "{s}"\n' for s in found if not flags_of(s)))
    objects = {s: library.parent / f"{s.stem}.o" for s in (joined, *filter(flags_of, found))}
    commands = [
        [compiler, *FLAGS, *flags_of(source), f"-I{torch_root / 'include'}",
         "-c", str(source), "-o", str(made)]
        for source, made in objects.items()
    ]  # fmt: skip
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_run, commands))
    _run([
        compiler, "-shared", "-fopenmp", *map(str, objects.values()), "-o", str(library),
        f"-L{torch_root / 'lib'}", "-lc10", "-ltorch_cpu",
    ])  # fmt: skip


def sources(every: bool) -> list[Path]:
    """What is compiled here: of sources for one instruction set of x86 those that this processor
    uses, or ``every`` one where they are known."""
    if platform.machine() not in ("x86_64", "AMD64"):
        used: set[str] = set()
    elif every:
        used = {source.stem for source in SOURCES}
    else:
        used = _used(cpu_flags())
    return [s for s in SOURCES if _target(s) not in TARGETS or s.stem in used]


def _used(flags: list[str]) -> set[str]:
    """The sources for one instruction set that a processor of these ``flags`` uses, as `isa.cpp`
    chooses among them."""
    isa = best_isa(flags)
    if isa == "avx512":
        return {"packed_avx512", f"rows_avx512{'bf16' if 'avx512_bf16' in flags else ''}"}
    return {f"packed_{isa}", "rows_avx2"} if isa else set()


def flags_of(source: Path) -> tuple[str, ...]:
    """The compiler's flags for the processor that ``source`` is written for."""
    return TARGETS.get(_target(source), ())


def _torch_root() -> Path:
    found = find_spec("torch")
    if found is None or found.origin is None:
        raise KernelsMissing("torch is not installed")
    return Path(found.origin).parent


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
