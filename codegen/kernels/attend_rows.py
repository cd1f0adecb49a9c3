"""Triton kernels for ``eepass::attend_rows``: attention of a few rows over a long cache, split.

A program reads the keys and values of one group once, for all rows and all query heads that share
them, over one part of the slots. Slots that no row may attend to are not read, which their masks
say: so the work grows with the text and not with the cache, and a sliding window costs a window.
A second launch puts the parts together, always in the same order (flash decoding: Dao et al.,
2023). Tiles have one size whatever the number of rows, and parts go by slots alone: a row has the
same bits in whatever company.

A row that may attend to nothing gets zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eepass.codegen.kernels.launch import KernelLaunch, Scratch, power_of_two, size

# rows of a tile, each of one query head; slots that are read at a time
TILE, SLOTS = 64, 64
# into how many parts the slots are divided at most
PARTS = 64


@triton.jit
def _attend_kernel(
    q_ptr, q_head, q_row, keys_ptr, keys_group, keys_slot, values_ptr, values_group, values_slot,
    mask_ptr, mask_row, sums_ptr, weights_ptr, heads, rows, slots, span, channels, outputs, scale,
    lowest, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One group's rows over the slots from ``span`` · part on, ``span`` of them: sums of values,
    and by row its largest score and what its sums are to be divided by."""
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    member = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = member < heads * rows
    row = member % rows
    channel, output = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    place = (group * heads + member // rows) * q_head + row * q_row
    known = there[:, None] & (channel < channels)[None, :]
    q = tl.load(q_ptr + place[:, None] + channel[None, :], mask=known, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    first = part * span
    for start in range(first, tl.minimum(first + span, slots), BLOCK_C):
        slot = start + tl.arange(0, BLOCK_C)
        inside = slot < slots
        mask = tl.load(
            mask_ptr + row[:, None] * mask_row + slot[None, :],
            mask=there[:, None] & inside[None, :], other=-float("inf"),
        ).to(tl.float32)  # fmt: skip
        allowed = mask > lowest
        if tl.max(tl.max(allowed.to(tl.int32), 1), 0) > 0:
            # a cache can be longer than 2**31 elements
            begin = keys_ptr + group * keys_group + slot.to(tl.int64)[None, :] * keys_slot
            wanted = inside[None, :] & (channel < channels)[:, None]
            keys = tl.load(begin + channel[:, None], mask=wanted, other=0.0)
            begin = values_ptr + group * values_group + slot.to(tl.int64)[:, None] * values_slot
            wanted = inside[:, None] & (output < outputs)[None, :]
            values = tl.load(begin + output[None, :], mask=wanted, other=0.0)
            if WIDEN:
                keys, values = keys.to(tl.float32), values.to(tl.float32)
            scores = tl.dot(q, keys, input_precision="ieee") * scale + mask
            scores = tl.where(allowed, scores, -float("inf"))
            newest = tl.maximum(top, tl.max(scores, 1))
            # where nothing is allowed yet, the largest is -inf
            base = tl.where(newest == -float("inf"), 0.0, newest)
            factor, weights = tl.exp(top - base), tl.exp(scores - base[:, None])
            total = total * factor + tl.sum(weights, 1)
            sums = tl.dot(
                weights.to(values.dtype), values, sums * factor[:, None], input_precision="ieee"
            )
            top = newest
    each = heads * rows
    place = (part * tl.num_programs(0) + group) * each + member
    tl.store(weights_ptr + place * 2, top, mask=there)
    tl.store(weights_ptr + place * 2 + 1, total, mask=there)
    known = (there & (total > 0))[:, None] & (output < outputs)[None, :]
    tl.store(sums_ptr + place[:, None] * outputs + output[None, :], sums, mask=known)


@triton.jit
def _combine_kernel(
    sums_ptr, weights_ptr, out_ptr, parts, outputs, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr
):
    """One row of one query head: its parts as one."""
    member = tl.program_id(0).to(tl.int64)
    part, output = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_E)
    place = part * tl.num_programs(0) + member
    there = part < parts
    top = tl.load(weights_ptr + place * 2, mask=there, other=-float("inf"))
    total = tl.load(weights_ptr + place * 2 + 1, mask=there, other=0.0)
    largest = tl.max(top, 0)
    factor = tl.exp(top - tl.where(largest == -float("inf"), 0.0, largest))
    known = (there & (total > 0))[:, None] & (output < outputs)[None, :]
    sums = tl.load(sums_ptr + place[:, None] * outputs + output[None, :], mask=known, other=0.0)
    whole = tl.sum(total * factor, 0)
    mixed = tl.sum(sums * factor[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    target = out_ptr + member * outputs + output
    tl.store(target, mixed.to(out_ptr.dtype.element_ty), mask=output < outputs)


def divided(slots: int) -> tuple[int, int]:
    """Into how many parts ``slots`` are divided, and the slots of each, a power of two."""
    span = power_of_two(-(-slots // PARTS), SLOTS)
    return -(-slots // span), span


def launches(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, *, scratch: Scratch
) -> tuple[list[KernelLaunch], Tensor]:
    """What ``attend_rows`` launches, and its output."""
    q, k, v, mask = (t if t.stride(-1) == 1 else scratch.copy(t) for t in (q, k, v, mask))
    (heads, rows, channels), (groups, slots, outputs) = q.shape, v.shape
    out = torch.empty(heads, rows, outputs, dtype=q.dtype, device=q.device)
    parts, span = divided(slots)
    sums = scratch.empty(parts, heads * rows, outputs)
    weights = scratch.empty(parts, heads * rows, 2)
    arguments = {
        "q_ptr": q, "q_head": q.stride(0), "q_row": q.stride(1),
        "keys_ptr": k, "keys_group": k.stride(0), "keys_slot": k.stride(1),
        "values_ptr": v, "values_group": v.stride(0), "values_slot": v.stride(1),
        "mask_ptr": mask, "mask_row": mask.stride(0), "sums_ptr": sums, "weights_ptr": weights,
        "heads": heads // groups, "rows": rows, "slots": slots, "span": span,
        "channels": channels, "outputs": outputs, "scale": float(scale),
        "lowest": float(torch.finfo(mask.dtype).min),
    }  # fmt: skip
    wide = power_of_two(outputs, 16)
    constants = {
        "BLOCK_M": TILE, "BLOCK_C": SLOTS, "BLOCK_D": power_of_two(channels, 16), "BLOCK_E": wide,
        # the interpreter cannot multiply bf16 matrices
        "WIDEN": bool(triton.knobs.runtime.interpret),
    }  # fmt: skip
    tiles = -(-(heads // groups) * rows // TILE)
    attend = KernelLaunch(
        _attend_kernel, (groups, tiles, parts), arguments, constants, size(q, k, v, mask)
    )
    combine = KernelLaunch(
        _combine_kernel, (heads * rows,),
        {"sums_ptr": sums, "weights_ptr": weights, "out_ptr": out, "parts": parts,
         "outputs": outputs},
        {"BLOCK_P": power_of_two(parts, 2), "BLOCK_E": wide}, size(sums, weights, out),
    )  # fmt: skip
    return [attend, combine], out
