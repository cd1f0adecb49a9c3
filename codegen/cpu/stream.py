"""How fast this machine reads memory: the bound of a pass that reads every weight once."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from time import perf_counter

import torch

from eepass.codegen.cpu.building import KernelsMissing
from eepass.codegen.cpu.native import load_kernels

# larger than most last-level caches; one that is larger is exceeded by CACHES times
BYTES, CACHES = 512 << 20, 4
READINGS = 20


class StreamBuffer:
    """Memory that fits no cache, to be read from one end to the other by all of torch's threads.

    Raises ``KernelsMissing`` where the kernels cannot be built.
    """

    def __init__(self, size: int | None = None) -> None:
        """``size`` in bytes; by default enough to exceed the caches."""
        self.size = size or max(BYTES, CACHES * _last_cache_bytes())
        if missing := load_kernels():
            raise KernelsMissing(missing)
        # the kernels' functions are global
        self._sum = ctypes.CDLL(None).eepass_stream_sum
        self._sum.argtypes = (ctypes.c_void_p, ctypes.c_int64)
        self._sum.restype = ctypes.c_uint64
        # pages that were never written are all one page of zeros
        self.words = torch.frombuffer(_pages(self.size), dtype=torch.int64).fill_(1)

    def sum(self) -> int:
        """Read everything once; the sum of its 64-bit words modulo 2**64."""
        return int(self._sum(self.words.data_ptr(), self.words.numel()))

    def gb_s(self, readings: int = READINGS) -> float:
        """The best of some readings, in 10⁹ bytes a second: the others were disturbed."""
        best = float("inf")
        for _ in range(readings):
            began = perf_counter()
            self.sum()
            best = min(best, perf_counter() - began)
        return self.size / best / 1e9


def stream_gb_s() -> float:
    """10⁹ bytes a second that this process's threads read from memory; takes about 0.3 s.

    Machines that share their memory with others differ by a half from one second to the next: to
    be set beside other figures it is measured in turns with them (``StreamBuffer.gb_s``). Raises
    ``KernelsMissing`` where the kernels cannot be built.
    """
    return StreamBuffer().gb_s()


def _pages(size: int) -> mmap.mmap:
    """Memory in large pages, as weights lie in, where the system has them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # a kernel without large pages refuses
    with contextlib.suppress(OSError):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _last_cache_bytes() -> int:
    """Bytes of the last-level cache; 0 where the system does not say."""
    for name in ("SC_LEVEL4_CACHE_SIZE", "SC_LEVEL3_CACHE_SIZE"):
        with contextlib.suppress(ValueError, OSError):
            if (size := os.sysconf(name)) > 0:
                return size
    return 0
