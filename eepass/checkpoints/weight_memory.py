"""Lay weights out as they are read: one after another, in large pages where the system has them.

A pass reads every weight once. Weights allocated one by one in small pages cost page walks and
interrupt hardware prefetching at each end; in one block the stream continues into the next weight.
"""

import contextlib
import ctypes
import math
import mmap
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

ALIGNMENT = 64
# bytes that are moved before what they took up before goes back to the system
BETWEEN_TRIMS = 64 << 20


class WeightBlock:
    """Room for ``size`` bytes of weights, one after another; what is not used is never touched.
    None where the system knows no large pages (other than Linux)."""

    def __init__(self, size: int) -> None:
        self._size, self._used = size if hasattr(mmap, "MADV_HUGEPAGE") else 0, 0
        if not self._size:
            return
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # a kernel without large pages refuses; small pages do as well
        with contextlib.suppress(OSError):
            self._memory.madvise(mmap.MADV_HUGEPAGE)

    def placed(self, weight: Tensor) -> Tensor:
        """A copy of a CPU tensor behind the last one, contiguous, with a storage of its own; the
        tensor itself where there is no more room."""
        room = self.room(weight.shape, weight.dtype)
        return weight if room is None else room.copy_(weight)

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """A tensor behind the last one, not filled; None where there is no more room."""
        at, count = self._used, math.prod(shape)
        if not count or at + count * dtype.itemsize > self._size:
            return None
        self._used += _aligned(count * dtype.itemsize)
        found = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=at)
        return found.view(tuple(shape))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def settle_weights(weights: Iterable[Tensor]) -> int:
    """Move contiguous CPU ``weights`` in place into one block, in order; returns its bytes.

    The tensors stay the same objects, each with a storage of its own; tied ones stay tied. Those in
    memory shared with other processes stay where they are. Only where the system knows large pages
    (Linux).
    """
    groups: dict[tuple[int, torch.Size, torch.dtype], list[Tensor]] = {}
    for weight in weights:
        movable = weight.device.type == "cpu" and not weight.is_shared()
        if movable and weight.is_contiguous() and weight.numel():
            groups.setdefault((weight.data_ptr(), weight.shape, weight.dtype), []).append(weight)
    sizes = [_aligned(same[0].nbytes) for same in groups.values()]
    if not sizes or not hasattr(mmap, "MADV_HUGEPAGE"):
        return 0
    addresses = accumulate(sizes, initial=next(iter(groups))[0])
    if len(groups) > 1 and all(key[0] == at for key, at in zip(groups, addresses, strict=False)):
        # they are laid out so already
        return sum(sizes)
    block = WeightBlock(sum(sizes))
    freed = 0
    for same, size in zip(groups.values(), sizes, strict=True):
        moved = block.placed(same[0].data)
        for weight in same:
            weight.data = moved
        freed += size
        if freed > BETWEEN_TRIMS:
            _give_back_freed()
            freed = 0
    _give_back_freed()
    return sum(sizes)


def _give_back_freed() -> None:
    """Return what was freed to the system: the C library keeps it otherwise, and the weights would
    take up twice their bytes. Only where that is known (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
