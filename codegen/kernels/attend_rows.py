"""Triton kernels for ``eepass::attend_rows`` and ``attend_spans``: attention of a few rows over a
long cache, split.

A program reads keys and values of one group once, for all rows and all query heads that share them.
The cache is divided into tiles of slots that are dealt out among programs in turn, so that a short
text in a long cache keeps as many programs busy as it has tiles. Spans say where a program begins
and ends: the work grows with the text and not with the cache, and a sliding window costs a window.
Of masks, tiles that no row may attend to are not read. A second launch puts the parts together,
always in the same order (flash decoding: Dao et al., 2023). Tiles have one size whatever the number
of rows, and are dealt out by groups and slots alone: a row has the same bits in whatever company.

A row that may attend to nothing gets zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eepass.codegen.kernels.launch import KernelLaunch, Scratch, power_of_two, size

# rows of a tile, each of one query head, and slots that are read at a time; of both half as many
# where a row is longer than so many bytes, for what an SM has of shared memory
TILE, SLOTS, LONG = 64, 64, 256
WARPS = 8
# programs that keep a large GPU's memory busy, and into how many parts slots are divided at most
PROGRAMS, PARTS = 512, 64


@triton.jit
def _attend_kernel(
    q_ptr, q_head, q_row, keys_ptr, keys_group, keys_slot, values_ptr, values_group, values_slot,
    mask_ptr, mask_row, spans_ptr, sums_ptr, weights_ptr, heads, rows, slots, channels, outputs,
    scale, lowest, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One group's rows over every so many tiles of slots: sums of values, and by row its largest
    score and what its sums are to be divided by."""
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    parts = tl.num_programs(2)
    member = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = member < heads * rows
    row = member % rows
    channel, output = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    query = q_ptr + (group * heads + member // rows) * q_head + row * q_row
    known = there[:, None] & (channel < channels)[None, :]
    q = tl.load(query[:, None] + channel[None, :], mask=known, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    begin, end = 0, slots
    if spans_ptr is not None:
        low = tl.load(spans_ptr + row * 3, mask=there, other=0).to(tl.int32)
        until = tl.load(spans_ptr + row * 3 + 1, mask=there, other=0).to(tl.int32)
        path = tl.load(spans_ptr + row * 3 + 2, mask=there, other=0)
        # slots up to the highest bit; rounding can only name one more
        beyond = tl.floor(tl.log2(tl.maximum(path, 1).to(tl.float32)) + 0.01).to(tl.int32) + 1
        reached = until + tl.where(path > 0, beyond, 0)
        begin = tl.min(tl.where(there, tl.minimum(low, until), slots), 0)
        end = tl.minimum(tl.max(reached, 0), slots)
    # the first of this part's tiles that is not before ``begin``
    skipped = (begin // BLOCK_C - part + parts - 1) // parts * parts
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for start in range((part + skipped) * BLOCK_C, end, parts * BLOCK_C):
        slot = start + tl.arange(0, BLOCK_C)
        inside = slot < slots
        if spans_ptr is not None:
            after = slot[None, :] - until[:, None]
            on_path = ((path[:, None] >> tl.minimum(tl.maximum(after, 0), 63)) & 1) > 0
            allowed = ((after < 0) & (slot[None, :] >= low[:, None])) | ((after >= 0) & on_path)
            allowed = allowed & (inside[None, :] & there[:, None])
            bias = 0.0
            wanted = True
        else:
            bias = tl.load(
                mask_ptr + row[:, None] * mask_row + slot[None, :],
                mask=there[:, None] & inside[None, :], other=-float("inf"),
            ).to(tl.float32)  # fmt: skip
            allowed = bias > lowest
            wanted = tl.max(tl.max(allowed.to(tl.int32), 1), 0) > 0
        if wanted:
            # a cache can be longer than 2**31 elements
            far = slot.to(tl.int64)
            key = keys_ptr + group * keys_group + far[None, :] * keys_slot + channel[:, None]
            real = inside[None, :] & (channel < channels)[:, None]
            keys = tl.load(key, mask=real, other=0.0)
            value = values_ptr + group * values_group + far[:, None] * values_slot
            real = inside[:, None] & (output < outputs)[None, :]
            values = tl.load(value + output[None, :], mask=real, other=0.0)
            if WIDEN:
                keys, values = keys.to(tl.float32), values.to(tl.float32)
            scores = tl.dot(q, keys, input_precision="ieee") * scale + bias
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


def divided(groups: int, slots: int, at_once: int = SLOTS) -> int:
    """Among how many programs the slots of each group are dealt out, ``at_once`` in turn: by
    neither rows nor text. A power of two."""
    parts = min(max(PROGRAMS // groups, 1), PARTS)
    return min(power_of_two(parts // 2 + 1), power_of_two(-(-slots // at_once)))


def launches(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, *, scratch: Scratch
) -> tuple[list[KernelLaunch], Tensor]:
    """What ``attend_rows`` launches, and its output."""
    mask = mask if mask.stride(-1) == 1 else scratch.copy(mask)
    return _launches(q, k, v, mask, None, scale, scratch)


def span_launches(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, scale: float, *, scratch: Scratch
) -> tuple[list[KernelLaunch], Tensor]:
    """What ``attend_spans`` launches, and its output."""
    spans = spans if spans.is_contiguous() else scratch.copy(spans)
    return _launches(q, k, v, None, spans, scale, scratch)


def _launches(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spans: Tensor | None, scale: float,
    scratch: Scratch,
) -> tuple[list[KernelLaunch], Tensor]:  # fmt: skip
    q, k, v = (t if t.stride(-1) == 1 else scratch.copy(t) for t in (q, k, v))
    (heads, rows, channels), (groups, slots, outputs) = q.shape, v.shape
    out = torch.empty(heads, rows, outputs, dtype=q.dtype, device=q.device)
    fewer = 1 + (max(channels, outputs) * q.element_size() > LONG)
    tile, at_once = TILE // fewer, SLOTS // fewer
    parts = divided(groups, slots, at_once)
    sums = scratch.empty(parts, heads * rows, outputs)
    weights = scratch.empty(parts, heads * rows, 2)
    arguments = {
        "q_ptr": q, "q_head": q.stride(0), "q_row": q.stride(1),
        "keys_ptr": k, "keys_group": k.stride(0), "keys_slot": k.stride(1),
        "values_ptr": v, "values_group": v.stride(0), "values_slot": v.stride(1),
        "mask_ptr": mask, "mask_row": 0 if mask is None else mask.stride(0), "spans_ptr": spans,
        "sums_ptr": sums, "weights_ptr": weights, "heads": heads // groups, "rows": rows,
        "slots": slots, "channels": channels, "outputs": outputs, "scale": float(scale),
        "lowest": 0.0 if mask is None else float(torch.finfo(mask.dtype).min),
    }  # fmt: skip
    wide = power_of_two(outputs, 16)
    constants = {
        "BLOCK_M": tile, "BLOCK_C": at_once, "BLOCK_D": power_of_two(channels, 16), "BLOCK_E": wide,
        # the interpreter cannot multiply bf16 matrices
        "WIDEN": bool(triton.knobs.runtime.interpret),
    }  # fmt: skip
    tiles = -(-(heads // groups) * rows // tile)
    attend = KernelLaunch(
        _attend_kernel, (groups, tiles, parts), arguments, constants, size(q, k, v, mask, spans),
        warps=WARPS,
    )  # fmt: skip
    combine = KernelLaunch(
        _combine_kernel, (heads * rows,),
        {"sums_ptr": sums, "weights_ptr": weights, "out_ptr": out, "parts": parts,
         "outputs": outputs},
        {"BLOCK_P": power_of_two(parts, 2), "BLOCK_E": wide}, size(sums, weights, out),
    )  # fmt: skip
    return [attend, combine], out
