"""Load the C++ kernels of the ``eepass::`` operators, and choose among their instruction sets."""

import ctypes
import functools
import hashlib
import warnings
from contextlib import suppress
from pathlib import Path

# the operators must be defined before kernels are added to them
import eepass.ops  # noqa: F401
from eepass.codegen.cpu.building import KernelsMissing, build_kernels
from eepass.codegen.libraries import path_of
from eepass.errors import RunsSlower

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
    processor or the library does not have.
    """
    if name not in (None, "best") and not _opened:
        with suppress(KernelsMissing):
            # it is what is loaded then
            build_kernels(every=True)
    if load_kernels():
        return ""
    choose = ctypes.CDLL(None).eepass_kernel_isa
    choose.restype, choose.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
    found = choose(None if name is None else name.encode())
    if found is None:
        raise KernelsMissing(
            f"there are no kernels for {name!r} here: the processor does not have it, or those of "
            "its best instruction set alone were loaded before another was asked for"
        )
    return str(found.decode())


def release_threads() -> None:
    """End the OpenMP threads that wait for what the calling thread computes next, so that another
    thread can decode at full speed: libgomp lets threads wait without sleeping only while there are
    no more of them than processors. They come back when they are needed. Does nothing where the
    kernels were not loaded.
    """
    if _opened:
        ctypes.CDLL(None).eepass_release_threads()
