"""Linear layers whose inputs are divided among programs: who adds the parts, and how programs know.

The last program of a tile to finish adds the parts, always from the first to the last: so sums
depend neither on the order in which programs run nor on who is last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# programs that keep a large GPU's memory busy; with fewer the inputs are divided, into parts of at
# least so many
PROGRAMS, LEAST_INPUTS = 128, 512
# tiles of rows of one launch
ROW_TILES = 64
# by device and stream, how many programs have finished a tile; 0 between launches
_finished: dict[tuple[torch.device, int], Tensor] = {}


@triton.jit
def store_sums(
    sums, out_ptr, bias_ptr, parts_ptr, finished_ptr, output, row, outputs, rows, tile, part,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Store ``sums`` [N, R] of ``output`` [N] and ``row`` [R] over one part of the inputs, with the
    bias; where there are several parts, the program that is the last of its ``tile`` to finish
    stores the sums over all."""
    there = output < outputs
    known = there[:, None] & (row < rows)[None, :]
    place = row[None, :] * outputs + output[:, None]
    last = True
    if PARTS > 1:
        stride = rows * outputs
        tl.store(parts_ptr + place + part * stride, sums, mask=known)
        # all threads' stores come before the one thread's count
        tl.debug_barrier()
        before = tl.atomic_add(finished_ptr + tile, 1, sem="acq_rel", scope="gpu")
        last = before == PARTS - 1
        if last:
            # for the next launch, which may divide its inputs otherwise
            tl.store(finished_ptr + tile, 0)
            sums = tl.zeros_like(sums)
            for index in range(0, PARTS):
                # other programs wrote them, so this one's L1 cache is bypassed
                sums += tl.load(
                    parts_ptr + place + index * stride, mask=known, other=0.0,
                    cache_modifier=".cg",
                )  # fmt: skip
    if last:
        if bias_ptr is not None:
            sums += tl.load(bias_ptr + output, mask=there, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + place, sums.to(out_ptr.dtype.element_ty), mask=known)


def divided(outputs: int, inputs: int, each: int, step: int) -> tuple[int, int]:
    """How many parts the inputs are divided into, a power of two, and the inputs of each, a
    multiple of ``step``: by the weight alone, never by the number of rows. ``each``: outputs of a
    program."""
    parts, tiles = 1, -(-outputs // each)
    while tiles * parts < PROGRAMS and inputs >= 2 * parts * LEAST_INPUTS:
        parts *= 2
    blocks = -(-inputs // step)
    return parts, -(-blocks // parts) * step


def counters(device: torch.device) -> Tensor:
    """A counter for each tile of outputs, of which there are fewer than ``PROGRAMS`` where inputs
    are divided, and of rows.

    Launches in one stream come one after the other, and each leaves its counters at 0: all of them
    share the counters.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = device, stream
    if key not in _finished:
        _finished[key] = torch.zeros(PROGRAMS * ROW_TILES, dtype=torch.int32, device=device)
    return _finished[key]
