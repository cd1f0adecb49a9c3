"""Triton kernel for ``eepass::packed_rows`` and ``packed_logits``: int4 and int8 weights.

Each program multiplies some blocks of 16 outputs, over one part of the inputs, with a tile of 16
rows. It reads the codes of 32 inputs at a time, 16 bytes a thread: codes and rounded rows are small
integers, which bf16 holds, so their products and the sums of 32 are exact. Scales and mins are
applied to these sums, group after group. Tiles have one size whatever the number of rows, and parts
of inputs are added in one order: a row has the same bits in whatever company.

For those kinds of ``eepass.ops.packing`` that hold one scale for 32 inputs or a multiple.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from eepass.codegen.kernels.launch import KernelLaunch, Scratch, size
from eepass.codegen.kernels.split_inputs import ROW_TILES, counters, divided, store_sums
from eepass.ops.packed import INT8, ROW, row_steps
from eepass.ops.packing import BITS, GROUP, KINDS, OUTPUTS, ZEROS, layout_of

KERNEL_KINDS = ("q4_0", "q4_1", "q8_0", "u4", "u8")
ROWS, MOST_ROWS = 16, 16 * ROW_TILES
# bytes of codes that a program loads at a time, 16 a thread
BYTES = 2048


@triton.jit
def _packed_kernel(
    x_ptr, steps_ptr, packed_ptr, numbers_ptr, pitch, bias_ptr, parts_ptr, finished_ptr, out_ptr,
    rows, outputs, inputs, span, every, BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr,
    CODE_BITS: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, ZERO: tl.constexpr,
    ROUND: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of outputs of a tile of rows, over inputs ``span`` · part onwards, ``span`` of
    them; ``every``: groups of 32 inputs that share a scale, WIDTH bytes of the HEAD before them."""
    above, tile, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    CODES: tl.constexpr = 64 * CODE_BITS
    N: tl.constexpr = BLOCKS * 16
    row = above * BLOCK_R + tl.arange(0, BLOCK_R)
    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    output = tile * N + tl.arange(0, N)
    real, there = row < rows, output < outputs
    # a weight can be longer than 2**31 bytes
    begin = packed_ptr + block.to(tl.int64)[:, None] * pitch
    number = numbers_ptr + (output // 16).to(tl.int64) * (pitch // WIDTH) + output % 16
    column = tl.arange(0, 32)
    if CODE_BITS == 4:
        # a byte holds inputs 8 i + j and 8 i + 4 + j, side by side once they are apart
        column = column // 8 * 8 + column % 2 * 4 + column // 2 % 4
    x_at = x_ptr + row.to(tl.int64)[None, :] * inputs + column[:, None]
    step = tl.full((BLOCK_R,), 1.0, tl.float32)
    if steps_ptr is not None:
        step = tl.load(steps_ptr + row, mask=real, other=1.0)
    sums = tl.zeros((N, BLOCK_R), dtype=tl.float32)
    first = part * span
    for start in range(first, tl.minimum(first + span, inputs), 32):
        group = start // 32
        head = group // every * (HEAD + every * CODES)
        at = head + HEAD + group % every * CODES + tl.arange(0, CODES)
        codes = tl.load(begin + at[None, :], mask=(block * 16 < outputs)[:, None], other=0)
        x = tl.load(x_at + start, mask=real[None, :], other=0.0)
        scale = tl.load(number + head // WIDTH, mask=there, other=0.0).to(tl.float32)
        if CODE_BITS == 4:
            codes = tl.reshape(tl.join(codes & 15, codes >> 4), (BLOCKS, 4, 16, 8))
        else:
            codes = tl.reshape(codes, (BLOCKS, 8, 16, 4))
        codes = tl.reshape(tl.permute(codes, (0, 2, 1, 3)), (N, 32))
        if ROUND:
            x = x.to(tl.float32)
            if steps_ptr is None:
                step = tl.div_rn(tl.max(tl.abs(x), 0), 127.0)
            by = tl.where(step > 0, tl.div_rn(1.0, tl.where(step > 0, step, 1.0)), 0.0)
            # to the nearest integer, ties to even
            x = (x * by[None, :] + 12582912.0) - 12582912.0
            x = tl.minimum(tl.maximum(x, -128.0), 127.0).to(tl.bfloat16)
        total = tl.sum(x.to(tl.float32), 0)
        if WIDEN:
            x = x.to(tl.float32)
        products = tl.dot(codes.to(x.dtype), x, input_precision="ieee")
        if ZERO > 0:
            products = (products - ZERO * total[None, :]) * scale[:, None]
        else:
            least = tl.load(number + (head + HEAD // 2) // WIDTH, mask=there, other=0.0)
            products = products * scale[:, None] + least.to(tl.float32)[:, None] * total[None, :]
        sums += products * step[None, :]
    counter = tile * tl.num_programs(0) + above
    store_sums(
        sums, out_ptr, bias_ptr, parts_ptr, finished_ptr, output, row, outputs, rows, counter, part,
        PARTS,
    )  # fmt: skip


def fits(form: int, rows: int) -> bool:
    """Whether the kernel multiplies ``rows`` rows with weights of ``form``."""
    return KINDS[form % 256] in KERNEL_KINDS and rows <= MOST_ROWS


def launches(
    x: Tensor, packed: Sequence[Tensor], forms: Sequence[int], outputs: Sequence[int],
    biases: Sequence[Tensor | None], activations: int, *, scratch: Scratch,
    dtype: torch.dtype | None = None,
) -> tuple[list[KernelLaunch], list[Tensor]]:  # fmt: skip
    """What ``packed_rows`` launches, and its outputs, in ``dtype`` or that of x; ``ValueError`` for
    what does not fit (``fits``)."""
    x = x if x.is_contiguous() else scratch.copy(x)
    steps = scratch.copy(row_steps(x)) if activations == ROW else None
    made, found = [], []
    for weight, form, count, bias in zip(packed, forms, outputs, biases, strict=True):
        if not fits(form, len(x)):
            raise ValueError(f"{KINDS[form % 256]}, {len(x)} rows: the kernel takes neither")
        out = torch.empty(len(x), count, dtype=dtype or x.dtype, device=x.device)
        weight, bias = weight.contiguous(), scratch.flat(bias)
        made.append(_launch(x, steps, weight, form, bias, out, activations, scratch))
        found.append(out)
    return made, found


def logit_launches(
    x: Tensor, packed: Tensor, form: int, outputs: int, bias: Tensor | None, activations: int,
    *, scratch: Scratch,
) -> tuple[list[KernelLaunch], Tensor]:  # fmt: skip
    """What ``packed_logits`` launches, and its output, float32."""
    made, (out,) = launches(
        x, [packed], [form], [outputs], [bias], activations, scratch=scratch, dtype=torch.float32
    )
    return made, out


def _launch(
    x: Tensor, steps: Tensor | None, packed: Tensor, form: int, bias: Tensor | None, out: Tensor,
    activations: int, scratch: Scratch,
) -> KernelLaunch:  # fmt: skip
    (rows, inputs), outputs, pitch = x.shape, out.shape[1], packed.shape[1]
    kind, every, head, codes = layout_of(form, pitch)
    blocks = BYTES // codes
    parts, span = divided(outputs, inputs, blocks * OUTPUTS, GROUP)
    numbers = torch.float16 if kind[0] == "q" else torch.float32
    tiles = -(-rows // ROWS), -(-outputs // (blocks * OUTPUTS))
    arguments = {
        "x_ptr": x, "steps_ptr": steps, "packed_ptr": packed, "numbers_ptr": packed.view(numbers),
        "pitch": pitch, "bias_ptr": bias,
        "parts_ptr": scratch.empty(parts, rows, outputs) if parts > 1 else None,
        "finished_ptr": counters(x.device) if parts > 1 else None, "out_ptr": out,
        "rows": rows, "outputs": outputs, "inputs": inputs, "span": span, "every": every // GROUP,
    }  # fmt: skip
    constants = {
        "BLOCKS": blocks, "BLOCK_R": ROWS, "CODE_BITS": BITS.get(kind, 4), "HEAD": head,
        "WIDTH": numbers.itemsize, "ZERO": ZEROS.get(kind, 0),
        "ROUND": activations in (INT8, ROW), "PARTS": parts,
        # the interpreter cannot multiply bf16 matrices; in float32 the products are the same
        "WIDEN": bool(triton.knobs.runtime.interpret),
    }  # fmt: skip
    return KernelLaunch(
        _packed_kernel, (*tiles, parts), arguments, constants, size(x, packed, bias, out)
    )
