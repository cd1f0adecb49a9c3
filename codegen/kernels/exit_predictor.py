"""Triton kernel for ``eepass::exit_predictor``: one launch, two where the exit has a translator.

One program holds a slice of the state and computes its part of the K dot products; where the row is
one slice it goes on to the end, otherwise the last program to finish does. What LayerNorm's mean
subtracts is summed separately, so that a large mean does not cost digits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eepass.codegen.kernels.final_state import (
    inverse_deviation,
    merged_moments,
    norm_parameters,
    slice_moments,
    state_arguments,
    state_slice,
    warps_for,
    write_state,
)
from eepass.codegen.kernels.launch import KernelLaunch, Scratch, power_of_two, size


@triton.jit
def scale_and_cap(logits, SCALE: tl.constexpr, CAP: tl.constexpr):
    """logits · SCALE, soft-capped unless CAP is 0."""
    logits = logits * SCALE
    if CAP != 0.0:
        # tanh that neither overflows nor loses NaN
        logits = CAP - 2.0 * CAP / (tl.exp(2.0 * logits / CAP) + 1.0)
    return logits


@triton.jit
def _scatter(into, part, member, index):
    """``into`` with ``part`` added at the indices ``member``; a NaN affects its own index alone."""
    return into + tl.sum(tl.where(index[:, None] == member[None, :], part[None, :], 0.0), 1)


@triton.jit
def _decide(
    logits, draft, valid, row, previous_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, threshold_ptr,
    probability_ptr, probabilities_ptr, exits_ptr, num_drafts, width, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Draft probabilities, features, MLP, threshold: whether the row exits."""
    masked = tl.where(valid, logits, -float("inf"))
    exponentials = tl.where(valid, tl.exp(logits - tl.max(masked, 0)), 0.0)
    probabilities = exponentials / tl.sum(exponentials, 0)
    here = row * num_drafts + draft
    previous = tl.load(previous_ptr + here, mask=valid, other=0.0).to(tl.float32)
    change = tl.where(valid, probabilities - previous, 0.0)
    tl.store(probabilities_ptr + here, probabilities, mask=valid)
    probabilities = tl.where(valid, probabilities, 0.0)
    logits = tl.where(valid, logits, 0.0)
    score = tl.zeros((BLOCK_W,), dtype=tl.float32)
    for start in range(0, width, BLOCK_W):
        unit = start + tl.arange(0, BLOCK_W)
        known = unit < width
        weights = w1_ptr + unit[:, None] * (3 * num_drafts) + draft[None, :]
        both = known[:, None] & valid[None, :]
        inner = tl.load(b1_ptr + unit, mask=known, other=0.0).to(tl.float32)
        w = tl.load(weights, mask=both, other=0.0).to(tl.float32)
        inner += tl.sum(w * logits[None, :], 1)
        w = tl.load(weights + num_drafts, mask=both, other=0.0).to(tl.float32)
        inner += tl.sum(w * probabilities[None, :], 1)
        w = tl.load(weights + 2 * num_drafts, mask=both, other=0.0).to(tl.float32)
        inner += tl.sum(w * change[None, :], 1)
        inner = tl.where(inner < 0.0, 0.0, inner)
        score += inner * tl.load(w2_ptr + unit, mask=known, other=0.0).to(tl.float32)
    total = tl.sum(score, 0) + tl.load(b2_ptr).to(tl.float32)
    probability = 1.0 / (1.0 + tl.exp(-total))
    tl.store(probability_ptr + row, probability)
    exits = probability > tl.load(threshold_ptr).to(tl.float32)
    tl.store(exits_ptr + row, exits.to(tl.uint8))


@triton.jit
def _exit_kernel(
    hidden_ptr, hidden_stride, scale_ptr, up_ptr, gate_ptr, norm_weight_ptr, norm_bias_ptr,
    lm_head_ptr, head_stride, head_scales_ptr, head_bias_ptr, draft_ptr, previous_ptr,
    w1_ptr, b1_ptr, w2_ptr, b2_ptr, threshold_ptr, state_ptr, moments_ptr, dots_ptr, arrived_ptr,
    probability_ptr, probabilities_ptr, z_ptr, exits_ptr, hidden_size, rank, num_drafts, width,
    NORM: tl.constexpr, EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr,
    LOGIT_SCALE: tl.constexpr, LOGIT_CAP: tl.constexpr, BLOCK_H: tl.constexpr,
    SLICES: tl.constexpr, BLOCK_SLICES: tl.constexpr, BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    column = segment * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < hidden_size
    x = state_slice(
        hidden_ptr, hidden_stride, scale_ptr, up_ptr, gate_ptr, row, column, inside, rank,
        BLOCK_RANK,
    )  # fmt: skip
    count = tl.minimum(hidden_size - segment * BLOCK_H, BLOCK_H)
    mean, centred, squares = slice_moments(x, inside, count, NORM)
    weight, bias = norm_parameters(norm_weight_ptr, norm_bias_ptr, column, inside, WEIGHT_OFFSET)
    weighted = centred * weight
    draft = tl.arange(0, BLOCK_K)
    valid = draft < num_drafts
    # dot products of each draft's row of the LM head: with the state, the norm's weight, its bias
    by_state = tl.zeros((BLOCK_K,), dtype=tl.float32)
    by_weight = tl.zeros((BLOCK_K,), dtype=tl.float32)
    by_bias = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in range(0, num_drafts, GROUP):
        member = start + tl.arange(0, GROUP)
        drafted = member < num_drafts
        # a row of the LM head can start past 2**31 elements
        token = tl.load(draft_ptr + row * num_drafts + member, mask=drafted, other=0).to(tl.int64)
        head = tl.load(
            lm_head_ptr + token[:, None] * head_stride + column[None, :],
            mask=drafted[:, None] & inside[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        by_state = _scatter(by_state, tl.sum(head * weighted[None, :], 1), member, draft)
        if NORM == "layer" and SLICES > 1:
            by_weight = _scatter(by_weight, tl.sum(head * weight[None, :], 1), member, draft)
        if norm_bias_ptr is not None:
            by_bias = _scatter(by_bias, tl.sum(head * bias[None, :], 1), member, draft)

    token = tl.load(draft_ptr + row * num_drafts + draft, mask=valid, other=0).to(tl.int64)
    if SLICES == 1:
        deviation = inverse_deviation(squares, hidden_size, EPS, NORM)
        z = centred * deviation * weight + bias
        tl.store(z_ptr + row * hidden_size + column, z.to(z_ptr.dtype.element_ty), mask=inside)
        logits = _finished_logits(
            by_state * deviation + by_bias, token, valid, head_scales_ptr, head_bias_ptr,
            LOGIT_SCALE, LOGIT_CAP,
        )  # fmt: skip
        _decide(
            logits, draft, valid, row, previous_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr,
            threshold_ptr, probability_ptr, probabilities_ptr, exits_ptr, num_drafts, width,
            BLOCK_W,
        )  # fmt: skip
    else:
        tl.store(state_ptr + row * hidden_size + column, x, mask=inside)
        here = moments_ptr + row * 2 * SLICES
        tl.store(here + segment, mean)
        tl.store(here + SLICES + segment, squares)
        # [3, K, SLICES] of this row
        dots = dots_ptr + row * 3 * BLOCK_K * SLICES
        tl.store(dots + draft * SLICES + segment, by_state)
        tl.store(dots + (BLOCK_K + draft) * SLICES + segment, by_weight)
        tl.store(dots + (2 * BLOCK_K + draft) * SLICES + segment, by_bias)
        # all threads' stores come before the one thread's count
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel", scope="gpu") == SLICES - 1:
            slices = tl.arange(0, BLOCK_SLICES)
            known = slices < SLICES
            # other programs wrote these, so this one's L1 cache is bypassed
            means = tl.load(here + slices, mask=known, other=0.0, cache_modifier=".cg")
            total = tl.load(here + SLICES + slices, mask=known, other=0.0, cache_modifier=".cg")
            mean, deviation = merged_moments(
                means, total, slices, hidden_size, SLICES, BLOCK_H, EPS, NORM
            )
            place = dots + draft[:, None] * SLICES + slices[None, :]
            some = tl.full((BLOCK_K, 1), True, tl.int1) & known[None, :]
            by_slice = tl.load(place, mask=some, other=0.0, cache_modifier=".cg")
            if NORM == "layer":
                weights = tl.load(
                    place + BLOCK_K * SLICES, mask=some, other=0.0, cache_modifier=".cg"
                )
                by_slice += weights * (means - mean)[None, :]
            raw = tl.sum(by_slice, 1) * deviation
            if norm_bias_ptr is not None:
                raw += tl.sum(
                    tl.load(
                        place + 2 * BLOCK_K * SLICES, mask=some, other=0.0, cache_modifier=".cg"
                    ), 1,
                )  # fmt: skip
            logits = _finished_logits(
                raw, token, valid, head_scales_ptr, head_bias_ptr, LOGIT_SCALE, LOGIT_CAP
            )
            _decide(
                logits, draft, valid, row, previous_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr,
                threshold_ptr, probability_ptr, probabilities_ptr, exits_ptr, num_drafts, width,
                BLOCK_W,
            )  # fmt: skip
            write_state(
                state_ptr, z_ptr, norm_weight_ptr, norm_bias_ptr, row, hidden_size, mean,
                deviation, WEIGHT_OFFSET, 1024,
            )  # fmt: skip


@triton.jit
def _finished_logits(
    raw, token, valid, head_scales_ptr, head_bias_ptr, SCALE: tl.constexpr, CAP: tl.constexpr
):
    if head_scales_ptr is not None:
        raw *= tl.load(head_scales_ptr + token, mask=valid, other=0.0).to(tl.float32)
    if head_bias_ptr is not None:
        raw += tl.load(head_bias_ptr + token, mask=valid, other=0.0).to(tl.float32)
    return scale_and_cap(raw, SCALE, CAP)


def launches(
    hidden: Tensor, scale: Tensor | None, down: Tensor | None, up: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None,
    lm_head: Tensor, head_scales: Tensor | None, head_bias: Tensor | None,
    draft_ids: Tensor, previous: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, threshold: Tensor,
    norm: str, eps: float, weight_offset: float, logit_scale: float, logit_cap: float,
    *, scratch: Scratch,
) -> tuple[list[KernelLaunch], tuple[Tensor, ...]]:  # fmt: skip
    """What ``exit_predictor`` launches, and its outputs."""
    made, arguments, constants = state_arguments(
        hidden, scale, down, up, norm_weight, norm_bias, norm, eps, weight_offset,
        scratch=scratch,
    )  # fmt: skip
    flat, lm_head = scratch.flat, scratch.rows_of(lm_head)
    (rows, hidden_size), (drafts, width) = hidden.shape, (draft_ids.shape[1], w1.shape[0])
    slices, block_h, block_k = constants["SLICES"], constants["BLOCK_H"], power_of_two(drafts)
    probability = hidden.new_empty(rows, dtype=torch.float32)
    probabilities = hidden.new_empty(rows, drafts, dtype=torch.float32)
    z = hidden.new_empty(rows, hidden_size)
    exits = hidden.new_empty(rows, dtype=torch.bool)
    arguments |= {
        "lm_head_ptr": lm_head, "head_stride": lm_head.stride(0),
        "head_scales_ptr": flat(head_scales), "head_bias_ptr": flat(head_bias),
        "draft_ptr": flat(draft_ids), "previous_ptr": flat(previous), "w1_ptr": flat(w1),
        "b1_ptr": flat(b1), "w2_ptr": flat(w2), "b2_ptr": flat(b2), "threshold_ptr": threshold,
        "dots_ptr": scratch.empty(rows, 3, block_k, slices) if slices > 1 else None,
        "probability_ptr": probability, "probabilities_ptr": probabilities, "z_ptr": z,
        "exits_ptr": exits.view(torch.uint8), "num_drafts": drafts, "width": width,
    }  # fmt: skip
    constants |= {
        "LOGIT_SCALE": logit_scale, "LOGIT_CAP": logit_cap, "BLOCK_K": block_k,
        "GROUP": min(power_of_two(4096 // block_h, 4), block_k),
        "BLOCK_W": power_of_two(min(1024 // block_k, width), 16),
    }  # fmt: skip
    read = rows * drafts * hidden_size * lm_head.element_size() + size(
        hidden, scale, up, norm_weight, norm_bias, draft_ids, previous, w1, b1, w2, b2, z
    )
    made.append(
        KernelLaunch(_exit_kernel, (slices, rows), arguments, constants, read, warps_for(block_h))
    )
    return made, (probability, probabilities, z, exits)
