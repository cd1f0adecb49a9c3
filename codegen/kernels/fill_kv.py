"""Triton kernel for ``eepass::fill_kv``: all skipped layers at once, from a table of pointers.

A program makes BLOCK_P pairs of channels of one head of one layer, keys or values: pairs, since the
rotary embedding mixes channel i with channel i + half, or with its neighbour. Every program norms
the rows itself: hidden states are in the L2 cache once the first has read them, and no program
waits for another. A projection may be a part of one that makes queries as well: the table holds,
beside each address, the strides between heads and between channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from eepass.codegen.kernels.final_state import inverse_deviation
from eepass.codegen.kernels.launch import KernelLaunch, Scratch, power_of_two, size

# columns of the table: addresses, 0 where a layer has no such tensor, and strides in elements
NORM_WEIGHT = tl.constexpr(0)
NORM_BIAS = tl.constexpr(1)
WEIGHT = tl.constexpr(2)
BIAS = tl.constexpr(3)
HEAD_NORM = tl.constexpr(4)
CACHE = tl.constexpr(5)
WEIGHT_GROUP = tl.constexpr(6)
WEIGHT_CHANNEL = tl.constexpr(7)
BIAS_GROUP = tl.constexpr(8)
BIAS_CHANNEL = tl.constexpr(9)
HEAD_BIAS = tl.constexpr(10)
# between heads in the parameters of their norm, 0 where they share them
HEAD_GROUP = tl.constexpr(11)
FIELDS = tl.constexpr(12)
# bytes of a projection a program holds in registers; with twice as many, some spill
TILE_BYTES = 4096


@triton.jit
def _pointer(table, field, like):
    return tl.load(table + field).to(like.dtype)


@triton.jit
def _row_moments(hidden, hidden_size, NORM: tl.constexpr, EPS: tl.constexpr, BLOCK_H: tl.constexpr):
    """Mean and 1/deviation of one row; without LayerNorm the mean is 0."""
    mean = 0.0
    if NORM == "layer":
        total = tl.zeros((BLOCK_H,), dtype=tl.float32)
        for start in range(0, hidden_size, BLOCK_H):
            column = start + tl.arange(0, BLOCK_H)
            x = tl.load(hidden + column, mask=column < hidden_size, other=0.0)
            total += x.to(tl.float32)
        mean = tl.sum(total, 0) / hidden_size
    squares = tl.zeros((BLOCK_H,), dtype=tl.float32)
    if NORM != "none":
        for start in range(0, hidden_size, BLOCK_H):
            column = start + tl.arange(0, BLOCK_H)
            inside = column < hidden_size
            x = tl.load(hidden + column, mask=inside, other=0.0).to(tl.float32)
            x = tl.where(inside, x - mean, 0.0)
            squares += x * x
    return mean, inverse_deviation(tl.sum(squares, 0), hidden_size, EPS, NORM)


@triton.jit
def _product(
    hidden, table, weight_like, norm_like, group, channel, known, mean, deviation, hidden_size,
    column_stride, HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Channels [BLOCK_P] of one row: its normed form times rows ``channel`` of a projection."""
    weight = _pointer(table, WEIGHT, weight_like) + group * tl.load(table + WEIGHT_GROUP)
    weight += channel.to(tl.int64) * tl.load(table + WEIGHT_CHANNEL)
    norm_weight = _pointer(table, NORM_WEIGHT, norm_like)
    norm_bias = _pointer(table, NORM_BIAS, norm_like)
    products = tl.zeros((BLOCK_P, BLOCK_H), dtype=tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        column = start + tl.arange(0, BLOCK_H)
        inside = column < hidden_size
        h = tl.load(hidden + column, mask=inside, other=0.0)
        x = (h.to(tl.float32) - mean) * deviation
        if HAS_WEIGHT:
            factor = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
            x *= factor + WEIGHT_OFFSET
        if HAS_BIAS:
            x += tl.load(norm_bias + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x, 0.0).to(h.dtype).to(tl.float32)
        w = tl.load(
            weight[:, None] + column.to(tl.int64)[None, :] * column_stride,
            mask=known[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        products += w.to(tl.float32) * x[None, :]
    return tl.sum(products, 1)


@triton.jit
def _fill_kernel(
    hidden_ptr, hidden_stride, table_ptr, weight_like, norm_like, cache_like, cos_ptr, sin_ptr,
    slots_ptr, rows, hidden_size, channels, rotary, group_stride, slot_stride, column_stride,
    NORM: tl.constexpr, EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, HAS_VALUE_BIAS: tl.constexpr,
    HEAD_NORM_KIND: tl.constexpr, HAS_HEAD_WEIGHT: tl.constexpr, HAS_HEAD_BIAS: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    part, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    table = table_ptr + tl.program_id(2).to(tl.int64) * FIELDS
    is_key = tl.program_id(2) % 2 == 0
    # rotary channels in their pairs; those past them pair up as well, first half with second half
    half = tl.where(is_key & (rotary > 0), rotary // 2, channels // 2)
    pair = part * BLOCK_P + tl.arange(0, BLOCK_P)
    rotated = tl.where(is_key & (rotary > 0), rotary, (channels // 2) * 2)
    rest = channels - rotated
    rest_half = (rest + 1) // 2
    in_rotary = pair < half
    if INTERLEAVED:
        first = tl.where(in_rotary, 2 * pair, rotated + pair - half)
        second = tl.where(in_rotary, 2 * pair + 1, rotated + rest_half + pair - half)
    else:
        first = tl.where(in_rotary, pair, rotated + pair - half)
        second = tl.where(in_rotary, pair + half, rotated + rest_half + pair - half)
    first_known = in_rotary | (pair - half < rest_half)
    second_known = in_rotary | (pair - half < rest - rest_half)
    for row in range(0, rows):
        hidden = hidden_ptr + row * hidden_stride
        mean, deviation = _row_moments(hidden, hidden_size, NORM, EPS, BLOCK_H)
        a = _product(
            hidden, table, weight_like, norm_like, group, first, first_known, mean, deviation,
            hidden_size, column_stride, HAS_BIAS, HAS_WEIGHT, WEIGHT_OFFSET, BLOCK_P, BLOCK_H,
        )  # fmt: skip
        b = _product(
            hidden, table, weight_like, norm_like, group, second, second_known, mean, deviation,
            hidden_size, column_stride, HAS_BIAS, HAS_WEIGHT, WEIGHT_OFFSET, BLOCK_P, BLOCK_H,
        )  # fmt: skip
        if (HAS_KEY_BIAS and is_key) or (HAS_VALUE_BIAS and not is_key):
            bias = _pointer(table, BIAS, weight_like) + group * tl.load(table + BIAS_GROUP)
            stride = tl.load(table + BIAS_CHANNEL)
            a += tl.load(bias + first * stride, mask=first_known, other=0.0).to(tl.float32)
            b += tl.load(bias + second * stride, mask=second_known, other=0.0).to(tl.float32)
        if HEAD_NORM_KIND != "none":
            if is_key:
                if HEAD_NORM_KIND == "layer":
                    total = tl.sum(tl.where(first_known, a, 0.0), 0)
                    middle = (total + tl.sum(tl.where(second_known, b, 0.0), 0)) / channels
                    a, b = a - middle, b - middle
                squares = tl.sum(tl.where(first_known, a * a, 0.0), 0)
                squares += tl.sum(tl.where(second_known, b * b, 0.0), 0)
                inverse = tl.rsqrt(squares / channels + EPS)
                a, b = a * inverse, b * inverse
                of_head = group * tl.load(table + HEAD_GROUP)
                if HAS_HEAD_WEIGHT:
                    scale = _pointer(table, HEAD_NORM, norm_like) + of_head
                    by_a = tl.load(scale + first, mask=first_known, other=0.0).to(tl.float32)
                    by_b = tl.load(scale + second, mask=second_known, other=0.0).to(tl.float32)
                    a, b = a * (by_a + WEIGHT_OFFSET), b * (by_b + WEIGHT_OFFSET)
                if HAS_HEAD_BIAS:
                    shift = _pointer(table, HEAD_BIAS, norm_like) + of_head
                    a += tl.load(shift + first, mask=first_known, other=0.0).to(tl.float32)
                    b += tl.load(shift + second, mask=second_known, other=0.0).to(tl.float32)
        if cos_ptr is not None:
            if is_key:
                place = row * rotary
                cos_a = tl.load(cos_ptr + place + first, mask=in_rotary, other=1.0).to(tl.float32)
                sin_a = tl.load(sin_ptr + place + first, mask=in_rotary, other=0.0).to(tl.float32)
                cos_b = tl.load(cos_ptr + place + second, mask=in_rotary, other=1.0).to(tl.float32)
                sin_b = tl.load(sin_ptr + place + second, mask=in_rotary, other=0.0).to(tl.float32)
                a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
        cache = _pointer(table, CACHE, cache_like)
        slot = tl.load(slots_ptr + row).to(tl.int64)
        at = cache + group * group_stride + slot * slot_stride
        tl.store(at + first, a.to(cache.dtype.element_ty), mask=first_known)
        tl.store(at + second, b.to(cache.dtype.element_ty), mask=second_known)


class LayerTensors(NamedTuple):
    """The lists of ``eepass::fill_kv``: one tensor a layer, or empty where no layer has one."""

    norm_weights: Sequence[Tensor]
    norm_biases: Sequence[Tensor]
    key_weights: Sequence[Tensor]
    key_biases: Sequence[Tensor]
    value_weights: Sequence[Tensor]
    value_biases: Sequence[Tensor]
    head_norms: Sequence[Tensor]
    head_biases: Sequence[Tensor]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]


def pointer_table(*tensors: Sequence[Tensor]) -> Tensor:
    """Addresses and strides int64 [layers, 2, 12] of ``LayerTensors``, on the caches' device: of
    keys, then of values.

    Valid as long as no tensor moves; the capture of a ``fill_kv.table`` needs it beforehand.
    """
    layers = LayerTensors(*tensors)
    groups, _, channels = layers.keys[0].shape
    heads = layers.head_norms or layers.head_biases
    # heads have parameters of their own, or share one's
    head_stride = channels if heads and heads[0].ndim == 2 else 0

    def address(tensors: Sequence[Tensor], layer: int) -> int:
        return tensors[layer].data_ptr() if tensors and not tensors[layer].is_meta else 0

    def strides(tensors: Sequence[Tensor], layer: int, by_head: int) -> list[int]:
        if not tensors:
            return [0, 0]
        tensor = tensors[layer]
        split = tensor if tensor.ndim == by_head else tensor.unflatten(0, (groups, -1))
        return list(split.stride()[:2])

    table = [
        [
            [address(layers.norm_weights, i), address(layers.norm_biases, i), address(weights, i),
             address(biases, i), address(layers.head_norms, i), address(caches, i),
             *strides(weights, i, 3), *strides(biases, i, 2), address(layers.head_biases, i),
             head_stride]
            for weights, biases, caches in (
                (layers.key_weights, layers.key_biases, layers.keys),
                (layers.value_weights, layers.value_biases, layers.values),
            )
        ]
        for i in range(len(layers.keys))
    ]  # fmt: skip
    return torch.tensor(table, dtype=torch.int64, device=layers.keys[0].device)


def launches(
    hidden: Tensor, *arguments: Any, scratch: Scratch, table: Tensor | None = None
) -> tuple[list[KernelLaunch], tuple[()]]:
    """What ``fill_kv`` launches, with a ``table`` from ``pointer_table`` if the caller has one."""
    layers = LayerTensors(*arguments[:10])
    cos, sin, slots, norm, eps, weight_offset, interleaved, head_norm = arguments[10:]
    _refuse_unlike_layers(layers)
    if table is None:
        table = pointer_table(*layers)
    hidden = scratch.rows_of(hidden)
    cache, weight = layers.keys[0], layers.key_weights[0]
    groups, _, channels = cache.shape
    norms = (*layers.norm_weights, *layers.norm_biases, *layers.head_norms, *layers.head_biases)
    column_stride = weight.stride(-1)
    # the norm of a head needs the whole head in one program; where columns lie apart, neighbouring
    # channels share cache lines and belong in one program
    most = 1 << 30 if head_norm != "none" else 8 if column_stride == 1 else 16
    pairs = power_of_two((channels + 1) // 2, 2, most)
    tile = TILE_BYTES // weight.element_size()
    of_launch: dict[str, Any] = {
        "hidden_ptr": hidden, "hidden_stride": hidden.stride(0), "table_ptr": table,
        "weight_like": weight, "norm_like": norms[0] if norms else hidden,
        "cache_like": cache, "cos_ptr": scratch.flat(cos), "sin_ptr": scratch.flat(sin),
        "slots_ptr": scratch.flat(slots), "rows": len(hidden), "hidden_size": hidden.shape[1],
        "channels": channels, "rotary": 0 if cos is None else cos.shape[-1],
        "group_stride": cache.stride(0), "slot_stride": cache.stride(1),
        "column_stride": column_stride,
    }  # fmt: skip
    constants = {
        "NORM": norm, "EPS": eps, "WEIGHT_OFFSET": weight_offset,
        "HAS_WEIGHT": bool(layers.norm_weights), "HAS_BIAS": bool(layers.norm_biases),
        "HAS_KEY_BIAS": bool(layers.key_biases), "HAS_VALUE_BIAS": bool(layers.value_biases),
        "HEAD_NORM_KIND": head_norm, "HAS_HEAD_WEIGHT": bool(layers.head_norms),
        "HAS_HEAD_BIAS": bool(layers.head_biases), "INTERLEAVED": interleaved, "BLOCK_P": pairs,
        "BLOCK_H": power_of_two(hidden.shape[1], 32, max(tile // pairs, 32)),
    }  # fmt: skip
    grid = (-(-((channels + 1) // 2) // pairs), groups, 2 * len(layers.keys))
    read = size(hidden, *(tensor for tensors in layers[:8] for tensor in tensors))
    # with a whole head in one program, four warps would need too many registers a thread
    warps = 8 if pairs >= 32 else 4
    return [KernelLaunch(_fill_kernel, grid, of_launch, constants, read, warps)], ()


def _refuse_unlike_layers(layers: LayerTensors) -> None:
    """One launch reads all layers by the strides and dtypes of the first: they must be alike."""
    first = layers.keys[0]
    for cache in (*layers.keys, *layers.values):
        alike = (cache.shape, cache.stride(), cache.dtype) == (
            first.shape, first.stride(), first.dtype,
        )  # fmt: skip
        if not alike or cache.stride(-1) != 1:
            raise ValueError("fill_kv: caches must share shape, strides and dtype, channels last")
    norms = (*layers.norm_weights, *layers.norm_biases, *layers.head_norms, *layers.head_biases)
    if any(t.dtype != norms[0].dtype or not t.is_contiguous() for t in norms):
        raise ValueError("fill_kv: norms must be contiguous and of one dtype")
    weights = (*layers.key_weights, *layers.value_weights)
    if any(t.stride(-1) != weights[0].stride(-1) for t in weights):
        raise ValueError("fill_kv: the columns of all projections must lie equally far apart")
    biases = (*layers.key_biases, *layers.value_biases)
    if any(t.dtype != weights[0].dtype for t in (*weights, *biases)):
        raise ValueError("fill_kv: projections and biases must be of one dtype")
