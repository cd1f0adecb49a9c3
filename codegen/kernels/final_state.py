"""From a hidden state to the normed state the LM head reads: translator and final norm.

A translator at hidden 4096 is 2 MB, too much for one program to read: ``_gate_kernel`` spreads its
``down`` matrix over programs, a second launch its ``up`` matrix over slices of the hidden state.
The last program to finish merges the slices: no program waits for another.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eepass.codegen.kernels.launch import KernelLaunch, Scratch, power_of_two, size

# columns of the state a program makes, with a translator and without
SLICE = 64
WIDE_SLICE = 8192
# rows of the translator's ``down`` matrix a program multiplies
GATES = 2


@triton.jit
def _gate_kernel(
    hidden_ptr, hidden_stride, down_ptr, gate_ptr, arrived_ptr, hidden_size, rank, root,
    BLOCK_RANK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """‖h‖ · silu(A h/‖h‖·√H) for BLOCK_RANK ranks of one row; sets the row's counter to 0."""
    row = tl.program_id(1).to(tl.int64)
    ranks = tl.program_id(0) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    known = ranks < rank
    products = tl.zeros((BLOCK_RANK, BLOCK_H), dtype=tl.float32)
    squares = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        column = start + tl.arange(0, BLOCK_H)
        inside = column < hidden_size
        h = tl.load(hidden_ptr + row * hidden_stride + column, mask=inside, other=0.0)
        h = h.to(tl.float32)
        down = tl.load(
            down_ptr + ranks.to(tl.int64)[:, None] * hidden_size + column[None, :],
            mask=known[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        squares += h * h
        products += down.to(tl.float32) * h[None, :]
    length = tl.sqrt(tl.sum(squares, 0))
    least = tl.where(length < 1e-6, 1e-6, length)
    inner = tl.sum(products, 1) * (root / least)
    gate = length * inner / (1.0 + tl.exp(-inner))
    tl.store(gate_ptr + row * rank + ranks, gate, mask=known)
    if tl.program_id(0) == 0:
        tl.store(arrived_ptr + row, 0)


@triton.jit
def state_slice(
    hidden_ptr, hidden_stride, scale_ptr, up_ptr, gate_ptr, row, column, inside, rank,
    BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """Columns of the (translated) hidden state of ``row``, float32."""
    h = tl.load(hidden_ptr + row * hidden_stride + column, mask=inside, other=0.0).to(tl.float32)
    if up_ptr is not None:
        scale = tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32)
        part = tl.arange(0, BLOCK_RANK)
        h = h * scale
        for start in range(0, rank, BLOCK_RANK):
            known = start + part < rank
            gate = tl.load(gate_ptr + row * rank + start + part, mask=known, other=0.0)
            up = tl.load(
                up_ptr + column.to(tl.int64)[:, None] * rank + (start + part)[None, :],
                mask=inside[:, None] & known[None, :], other=0.0,
            )  # fmt: skip
            h += tl.sum(up.to(tl.float32) * gate[None, :], 1)
    return h


@triton.jit
def slice_moments(x, inside, count, NORM: tl.constexpr):
    """Mean of x, x minus its mean, and the sum of its squares; without LayerNorm the mean is 0."""
    mean = 0.0
    if NORM == "layer":
        mean = tl.sum(x, 0) / count
        x = tl.where(inside, x - mean, 0.0)
    return mean, x, tl.sum(x * x, 0)


@triton.jit
def inverse_deviation(squares, hidden_size, EPS: tl.constexpr, NORM: tl.constexpr):
    if NORM == "none":
        return 1.0
    else:
        return tl.rsqrt(squares / hidden_size + EPS)


@triton.jit
def merged_moments(
    means, squares, slices, hidden_size, SLICES: tl.constexpr, BLOCK_H: tl.constexpr,
    EPS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Mean and 1/deviation of a row from those of its slices (Chan et al., 1983)."""
    counts = tl.minimum(hidden_size - slices * BLOCK_H, BLOCK_H)
    counts = tl.where(slices < SLICES, counts, 0).to(tl.float32)
    mean = tl.sum(counts * means, 0) / hidden_size
    apart = means - mean
    return mean, inverse_deviation(
        tl.sum(squares + counts * apart * apart, 0), hidden_size, EPS, NORM
    )


@triton.jit
def norm_parameters(weight_ptr, bias_ptr, column, inside, WEIGHT_OFFSET: tl.constexpr):
    weight = tl.where(inside, 1.0, 0.0)
    bias = tl.zeros(column.shape, dtype=tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        weight = tl.where(inside, weight + WEIGHT_OFFSET, 0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return weight, bias


@triton.jit
def write_state(
    state_ptr, z_ptr, weight_ptr, bias_ptr, row, hidden_size, mean, deviation,
    WEIGHT_OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The whole normed row, from the slices that all programs have stored in ``state``."""
    for start in range(0, hidden_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < hidden_size
        # another program wrote it, so this one's L1 cache is bypassed
        x = tl.load(
            state_ptr + row * hidden_size + column, mask=inside, other=0.0, cache_modifier=".cg"
        )
        weight, bias = norm_parameters(weight_ptr, bias_ptr, column, inside, WEIGHT_OFFSET)
        z = (x - mean) * deviation * weight + bias
        tl.store(z_ptr + row * hidden_size + column, z.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _state_kernel(
    hidden_ptr, hidden_stride, scale_ptr, up_ptr, gate_ptr, norm_weight_ptr, norm_bias_ptr,
    state_ptr, moments_ptr, arrived_ptr, z_ptr, best_ptr, counted_ptr, hidden_size, rank,
    NORM: tl.constexpr, EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, BLOCK_H: tl.constexpr,
    SLICES: tl.constexpr, BLOCK_SLICES: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """One slice of one row's normed state; resets what the head's kernel after it counts in."""
    segment = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    column = segment * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < hidden_size
    if segment == 0:
        tl.store(best_ptr + row, -0x8000000000000000)
        tl.store(counted_ptr, 0)
    x = state_slice(
        hidden_ptr, hidden_stride, scale_ptr, up_ptr, gate_ptr, row, column, inside, rank,
        BLOCK_RANK,
    )  # fmt: skip
    count = tl.minimum(hidden_size - segment * BLOCK_H, BLOCK_H)
    mean, centred, squares = slice_moments(x, inside, count, NORM)
    if SLICES == 1:
        weight, bias = norm_parameters(
            norm_weight_ptr, norm_bias_ptr, column, inside, WEIGHT_OFFSET
        )
        deviation = inverse_deviation(squares, hidden_size, EPS, NORM)
        z = centred * deviation * weight + bias
        tl.store(z_ptr + row * hidden_size + column, z.to(z_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(state_ptr + row * hidden_size + column, x, mask=inside)
        here = moments_ptr + row * 2 * SLICES
        tl.store(here + segment, mean)
        tl.store(here + SLICES + segment, squares)
        # all threads' stores come before the one thread's count
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel", scope="gpu") == SLICES - 1:
            slices = tl.arange(0, BLOCK_SLICES)
            known = slices < SLICES
            means = tl.load(here + slices, mask=known, other=0.0, cache_modifier=".cg")
            total = tl.load(here + SLICES + slices, mask=known, other=0.0, cache_modifier=".cg")
            mean, deviation = merged_moments(
                means, total, slices, hidden_size, SLICES, BLOCK_H, EPS, NORM
            )
            write_state(
                state_ptr, z_ptr, norm_weight_ptr, norm_bias_ptr, row, hidden_size, mean,
                deviation, WEIGHT_OFFSET, 1024,
            )  # fmt: skip


def slicing(hidden_size: int, translated: bool) -> dict[str, int]:
    """How a row is divided: one program, or as many as read a translator at full speed."""
    block = SLICE if translated else power_of_two(hidden_size, 32, WIDE_SLICE)
    slices = -(-hidden_size // block)
    return {"BLOCK_H": block, "SLICES": slices, "BLOCK_SLICES": power_of_two(slices)}


def warps_for(columns: int) -> int:
    return power_of_two(columns // 256, 4, 16)


def gate_launch(
    hidden: Tensor, down: Tensor, scratch: Scratch
) -> tuple[KernelLaunch, Tensor, Tensor]:
    """The translator's gates [R, rank], and a counter a row, set to 0."""
    rows, hidden_size = hidden.shape
    rank = down.shape[0]
    gate, arrived = scratch.empty(rows, rank), scratch.empty(rows, dtype=torch.int32)
    arguments = {
        "hidden_ptr": hidden, "hidden_stride": hidden.stride(0), "down_ptr": scratch.flat(down),
        "gate_ptr": gate, "arrived_ptr": arrived, "hidden_size": hidden_size, "rank": rank,
        "root": float(hidden_size) ** 0.5,
    }  # fmt: skip
    constants = {"BLOCK_RANK": GATES, "BLOCK_H": power_of_two(hidden_size, 32, 1024)}
    grid = (-(-rank // GATES), rows)
    return KernelLaunch(_gate_kernel, grid, arguments, constants, size(hidden, down)), gate, arrived


def state_arguments(
    hidden: Tensor, scale: Tensor | None, down: Tensor | None, up: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None,
    norm: str, eps: float, weight_offset: float, *, scratch: Scratch,
) -> tuple[list[KernelLaunch], dict[str, Any], dict[str, Any]]:  # fmt: skip
    """What a kernel needs that makes the normed state of hidden [R, H] on its way: the launches
    before it, and its arguments and constants as far as the state goes."""
    flat, hidden = scratch.flat, scratch.rows_of(hidden)
    rows, hidden_size = hidden.shape
    before: list[KernelLaunch] = []
    gate = arrived = None
    if down is not None:
        launch, gate, arrived = gate_launch(hidden, down, scratch)
        before.append(launch)
    slices = slicing(hidden_size, up is not None)
    several = slices["SLICES"] > 1
    if several and arrived is None:
        arrived = scratch.empty(rows, dtype=torch.int32).zero_()
    arguments: dict[str, Any] = {
        "hidden_ptr": hidden, "hidden_stride": hidden.stride(0), "scale_ptr": flat(scale),
        "up_ptr": flat(up), "gate_ptr": gate, "norm_weight_ptr": flat(norm_weight),
        "norm_bias_ptr": flat(norm_bias),
        "state_ptr": scratch.empty(rows, hidden_size) if several else None,
        "moments_ptr": scratch.empty(rows, 2, slices["SLICES"]) if several else None,
        "arrived_ptr": arrived if several else None, "hidden_size": hidden_size,
        "rank": 0 if down is None else down.shape[0],
    }  # fmt: skip
    constants: dict[str, Any] = {
        **slices, "NORM": norm, "EPS": eps, "WEIGHT_OFFSET": weight_offset,
        "BLOCK_RANK": 1 if down is None else power_of_two(down.shape[0], 1, 128),
    }  # fmt: skip
    return before, arguments, constants


def state_launches(
    *to_state: Any, best: Tensor, counted: Tensor, scratch: Scratch
) -> tuple[list[KernelLaunch], Tensor]:
    """The launches for ``state_arguments``' ``to_state``, and their result: z [R, H] in hidden's
    dtype.

    They also set best [R] to the least int64 and counted [1] to 0.
    """
    launches, arguments, constants = state_arguments(*to_state, scratch=scratch)
    hidden, scale, _, up, norm_weight, norm_bias = to_state[:6]
    z = scratch.empty(*hidden.shape, dtype=hidden.dtype)
    arguments |= {"z_ptr": z, "best_ptr": best, "counted_ptr": counted}
    grid = (constants["SLICES"], len(hidden))
    read = size(hidden, scale, up, norm_weight, norm_bias, z)
    warps = warps_for(constants["BLOCK_H"])
    launches.append(KernelLaunch(_state_kernel, grid, arguments, constants, read, warps))
    return launches, z
