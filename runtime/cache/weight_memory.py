"""Lay weights out as they are read: one after another, in large pages where the system has them.

A pass reads every weight once. Weights allocated one by one in small pages cost page walks and stop
the memory's stream at each end; in one block the next layer's weights arrive with this one's last.
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
    homes: dict[tuple[int, torch.Size, torch.dtype], list[Tensor]] = {}
    for weight in weights:
        here = weight.device.type == "cpu" and not weight.is_shared()
        if here and weight.is_contiguous() and weight.numel():
            homes.setdefault((weight.data_ptr(), weight.shape, weight.dtype), []).append(weight)
    sizes = [-(-same[0].nbytes // ALIGNMENT) * ALIGNMENT for same in homes.values()]
    if not sizes or not hasattr(mmap, "MADV_HUGEPAGE"):
        return 0
    places = accumulate(sizes, initial=next(iter(homes))[0])
    if len(homes) > 1 and all(home[0] == place for home, place in zip(homes, places, strict=False)):
        # they lie so already
        return sum(sizes)
    block = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # a kernel without large pages refuses, and small ones serve too
    with contextlib.suppress(OSError):
        block.madvise(mmap.MADV_HUGEPAGE)
    offset = 0
    for same, size in zip(homes.values(), sizes, strict=True):
        old = same[0].data
        home = torch.frombuffer(block, dtype=old.dtype, count=old.numel(), offset=offset)
        home = home.view(old.shape)
        home.copy_(old)
        for weight in same:
            weight.data = home
        offset += size
    return sum(sizes)
