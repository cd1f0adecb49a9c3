"""Triton kernel for ``eepass::linear_rows``: a linear layer over 1 to 32 rows, read once.

Each program multiplies some outputs of the weight, over one part of the inputs, with 16 rows, of
which those that are not there are zero; with 32 where there are more. So a row is added up in the
same order, and has the same bits, among 1 to 16 rows, and among 17 to 32. Where the inputs are
divided, the last program to finish adds the parts, always from the first to the last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from eepass.codegen.kernels.launch import KernelLaunch, Scratch, power_of_two, size
from eepass.codegen.kernels.split_inputs import counters, divided, store_sums

# rows of a tile, and of one for more rows than that
ROWS, MOST_ROWS = 16, 32
# outputs of a program, and the inputs it loads at a time: 256 contiguous bytes of bf16
OUTPUTS, INPUTS = 32, 128


@triton.jit
def _rows_kernel(
    x_ptr, weight_ptr, weight_stride, bias_ptr, parts_ptr, finished_ptr, out_ptr, rows, outputs,
    inputs, span, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of all rows over inputs ``span`` · part onwards, ``span`` of them."""
    tile, part = tl.program_id(0), tl.program_id(1)
    output = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_R)
    there, real = output < outputs, row < rows
    # a row of a weight can start past 2**31 elements
    begin = weight_ptr + output.to(tl.int64)[:, None] * weight_stride
    sums = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    first = part * span
    for start in range(first, tl.minimum(first + span, inputs), BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = column < inputs
        weight = tl.load(begin + column[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        x = tl.load(
            x_ptr + row[None, :] * inputs + column[:, None],
            mask=inside[:, None] & real[None, :], other=0.0,
        )  # fmt: skip
        if WIDEN:
            weight, x = weight.to(tl.float32), x.to(tl.float32)
        sums = tl.dot(weight, x, sums, input_precision="ieee")
    store_sums(
        sums, out_ptr, bias_ptr, parts_ptr, finished_ptr, output, row, outputs, rows, tile, part,
        PARTS,
    )  # fmt: skip


def launches(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, scratch: Scratch
) -> tuple[list[KernelLaunch], list[Tensor]]:
    """What ``linear_rows`` launches, and its outputs; ``ValueError`` for more than 32 rows."""
    if len(x) > MOST_ROWS:
        raise ValueError(f"x: {len(x)} rows, the kernel takes {MOST_ROWS} at most")
    x = x if x.is_contiguous() else scratch.copy(x)
    made, outputs = [], []
    for weight, bias in zip(weights, biases, strict=True):
        outputs.append(torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device))
        made.append(_launch(x, scratch.rows_of(weight), scratch.flat(bias), outputs[-1], scratch))
    return made, outputs


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, scratch: Scratch
) -> KernelLaunch:
    (rows, inputs), outputs = x.shape, len(weight)
    parts, span = divided(outputs, inputs, OUTPUTS, INPUTS)
    tiles = -(-outputs // OUTPUTS)
    arguments = {
        "x_ptr": x, "weight_ptr": weight, "weight_stride": weight.stride(0), "bias_ptr": bias,
        "parts_ptr": scratch.empty(parts, rows, outputs) if parts > 1 else None,
        "finished_ptr": counters(x.device) if parts > 1 else None, "out_ptr": out,
        "rows": rows, "outputs": outputs, "inputs": inputs, "span": span,
    }  # fmt: skip
    constants = {
        "BLOCK_N": OUTPUTS, "BLOCK_R": ROWS if rows <= ROWS else MOST_ROWS,
        "BLOCK_K": power_of_two(inputs, 16, INPUTS),
        # the interpreter cannot multiply bf16 matrices; in float32 the products are the same
        "PARTS": parts, "WIDEN": bool(triton.knobs.runtime.interpret),
    }  # fmt: skip
    return KernelLaunch(
        _rows_kernel, (tiles, parts), arguments, constants, size(x, weight, bias, out)
    )
