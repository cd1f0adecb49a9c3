"""Lay weights out as they are read: one after another, in large pages where the system has them.

A pass reads every weight once. Weights allocated one by one in small pages cost page walks and
interrupt hardware prefetching at each end; in one block the stream continues into the next weight.
"""

import contextlib
import ctypes
import mmap
from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor

ALIGNMENT = 64
# bytes that are moved before what they took up before goes back to the system
BETWEEN_TRIMS = 64 << 20


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
    sizes = [-(-same[0].nbytes // ALIGNMENT) * ALIGNMENT for same in groups.values()]
    if not sizes or not hasattr(mmap, "MADV_HUGEPAGE"):
        return 0
    addresses = accumulate(sizes, initial=next(iter(groups))[0])
    if len(groups) > 1 and all(key[0] == at for key, at in zip(groups, addresses, strict=False)):
        # they are laid out so already
        return sum(sizes)
    block = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # a kernel without large pages refuses; small pages do as well
    with contextlib.suppress(OSError):
        block.madvise(mmap.MADV_HUGEPAGE)
    offset = freed = 0
    for same, size in zip(groups.values(), sizes, strict=True):
        old = same[0].data
        moved = torch.frombuffer(block, dtype=old.dtype, count=old.numel(), offset=offset)
        moved = moved.view(old.shape)
        moved.copy_(old)
        for weight in same:
            weight.data = moved
        del old
        offset += size
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
