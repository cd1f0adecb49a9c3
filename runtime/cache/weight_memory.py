"""Lay weights out as they are read: one after another, in large pages where the system has them.

A pass reads every weight once. Weights allocated one by one in small pages cost page walks and
interrupt hardware prefetching at each end; in one block the stream continues into the next weight.
"""

import contextlib
import mmap
from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor

ALIGNMENT = 64


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
    offset = 0
    for same, size in zip(groups.values(), sizes, strict=True):
        old = same[0].data
        moved = torch.frombuffer(block, dtype=old.dtype, count=old.numel(), offset=offset)
        moved = moved.view(old.shape)
        moved.copy_(old)
        for weight in same:
            weight.data = moved
        offset += size
    return sum(sizes)
