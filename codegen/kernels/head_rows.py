"""A tile of the LM head times a few states, and logits as int64 keys that sort by value."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eepass.codegen.kernels.exit_predictor import scale_and_cap
from eepass.codegen.kernels.launch import Scratch, power_of_two


@triton.jit
def head_tile(
    z_ptr, lm_head_ptr, head_stride, head_scales_ptr, head_bias_ptr, token, known, rows,
    hidden_size, LOGIT_SCALE: tl.constexpr, LOGIT_CAP: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Logits [BLOCK_V, BLOCK_R] of rows ``token`` (int64) of the head: with one state by sums of
    products, with several on the tensor cores."""
    row = tl.arange(0, BLOCK_R)
    # a row of the LM head can start past 2**31 elements
    begin = lm_head_ptr + token[:, None] * head_stride
    products = tl.zeros((BLOCK_V, BLOCK_H if BLOCK_R == 1 else BLOCK_R), dtype=tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        column = start + tl.arange(0, BLOCK_H)
        inside = column < hidden_size
        head = tl.load(begin + column[None, :], mask=known[:, None] & inside[None, :], other=0.0)
        if BLOCK_R == 1:
            z = tl.load(z_ptr + column, mask=inside, other=0.0).to(tl.float32)
            products += head.to(tl.float32) * z[None, :]
        else:
            z = tl.load(
                z_ptr + row.to(tl.int64)[None, :] * hidden_size + column[:, None],
                mask=inside[:, None] & (row < rows)[None, :], other=0.0,
            )  # fmt: skip
            if WIDEN:
                z = z.to(tl.float32)
            products = tl.dot(head.to(z.dtype), z, products, input_precision="ieee")
    logits = tl.sum(products, 1)[:, None] if BLOCK_R == 1 else products
    if head_scales_ptr is not None:
        logits *= tl.load(head_scales_ptr + token, mask=known, other=0.0).to(tl.float32)[:, None]
    if head_bias_ptr is not None:
        logits += tl.load(head_bias_ptr + token, mask=known, other=0.0).to(tl.float32)[:, None]
    return scale_and_cap(logits, LOGIT_SCALE, LOGIT_CAP)


@triton.jit
def sort_key(logit, index):
    """An int64 that is larger for a larger logit, then for a smaller index; NaN is largest."""
    logit = tl.where(logit == 0.0, 0.0, logit)  # 0 and -0 are equal
    bits = logit.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(logit != logit, 0x7FFFFFFF, ordered)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFE - index.to(tl.int64))


@triton.jit
def key_index(key):
    return 0xFFFFFFFE - (key & 0xFFFFFFFF)


@triton.jit
def key_logit(key):
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


def head_arguments(
    z: Tensor,
    lm_head: Tensor,
    head_scales: Tensor | None,
    head_bias: Tensor | None,
    scratch: Scratch,
) -> dict[str, Any]:
    """Arguments of ``head_tile`` for z [R, H] and the head."""
    if lm_head.dtype == torch.float32 and z.dtype != torch.float32:
        z = scratch.copy(z, torch.float32)
    lm_head, flat = scratch.rows_of(lm_head), scratch.flat
    return {
        "z_ptr": flat(z), "lm_head_ptr": lm_head, "head_stride": lm_head.stride(0),
        "head_scales_ptr": flat(head_scales), "head_bias_ptr": flat(head_bias),
        "rows": z.shape[0], "vocabulary": lm_head.shape[0], "hidden_size": z.shape[1],
    }  # fmt: skip


def head_blocks(rows: int, hidden_size: int, z: Tensor, tokens: int) -> dict[str, Any]:
    """Block sizes of ``head_tile``: ``tokens`` rows of the head for one state, more for several.

    Triton's interpreter cannot multiply bf16 matrices; in float32 the products are the same.
    """
    widen = bool(triton.knobs.runtime.interpret)
    if rows == 1:
        width = power_of_two(hidden_size, 32, max(8192 // tokens, 32))
        return {"BLOCK_V": tokens, "BLOCK_R": 1, "BLOCK_H": width, "WIDEN": widen}
    width = power_of_two(hidden_size, 32, 64 if z.dtype == torch.float32 else 128)
    return {
        "BLOCK_V": max(tokens, 32), "BLOCK_R": power_of_two(rows, 16), "BLOCK_H": width,
        "WIDEN": widen,
    }  # fmt: skip
