"""Triton kernels for ``eepass::draft_topk``: the logits are never written.

Each program keeps the k best keys of its rows of the head and their part of the softmax's sum; a
second launch merges them. No two keys are equal, since they hold the index, so that taking the
largest key below the last one taken is exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eepass.codegen.kernels.head_rows import (
    head_arguments,
    head_blocks,
    head_tile,
    key_index,
    key_logit,
    sort_key,
)
from eepass.codegen.kernels.launch import KernelLaunch, Scratch, power_of_two, size

# rows of the head a program reads where there is one state
TOKENS = 32


@triton.jit
def _finite(x):
    return tl.where((x == float("inf")) | (x == -float("inf")), 0.0, x)


@triton.jit
def _score_kernel(
    z_ptr, lm_head_ptr, head_stride, head_scales_ptr, head_bias_ptr, keys_ptr, moments_ptr, rows,
    vocabulary, hidden_size, keep, LOGIT_SCALE: tl.constexpr, LOGIT_CAP: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The ``keep`` best keys of BLOCK_V rows of the head; their largest logit and sum of
    exponentials."""
    part, parts = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    token = part * BLOCK_V + tl.arange(0, BLOCK_V)
    there = token < vocabulary
    logits = head_tile(
        z_ptr, lm_head_ptr, head_stride, head_scales_ptr, head_bias_ptr, token, there, rows,
        hidden_size, LOGIT_SCALE, LOGIT_CAP, BLOCK_V, BLOCK_R, BLOCK_H, WIDEN,
    )  # fmt: skip
    row = tl.arange(0, BLOCK_R)
    real = row < rows
    logits = tl.where(there[:, None], logits, -float("inf"))
    largest = _finite(tl.max(logits, 0))
    place = moments_ptr + (row * parts + part) * 2
    tl.store(place, largest, mask=real)
    tl.store(place + 1, tl.sum(tl.exp(logits - largest[None, :]), 0), mask=real)
    keys = tl.where(there[:, None], sort_key(logits, token[:, None]), -0x8000000000000000)
    for index in range(0, keep):
        best = tl.max(keys, 0)
        tl.store(keys_ptr + (row * parts + part) * keep + index, best, mask=real)
        keys = tl.where(keys == best[None, :], -0x8000000000000000, keys)


@triton.jit
def _merge_kernel(
    keys_ptr, moments_ptr, hot_ids_ptr, scores_ptr, ids_ptr, parts, keep, k,
    BLOCK_P: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """The k best of one row's keys, with their log-probabilities."""
    row = tl.program_id(0).to(tl.int64)
    largest = -float("inf")
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        place = moments_ptr + (row * parts + part) * 2
        top = tl.load(place, mask=part < parts, other=-float("inf"))
        largest = tl.maximum(largest, tl.max(top, 0))
    total = 0.0
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        place = moments_ptr + (row * parts + part) * 2
        top = tl.load(place, mask=part < parts, other=-float("inf"))
        part_sum = tl.load(place + 1, mask=part < parts, other=0.0)
        # an empty part counts 0, even times an infinite factor
        total += tl.sum(tl.where(part_sum == 0.0, 0.0, part_sum * tl.exp(top - largest)), 0)
    norm = largest + tl.log(total)
    last = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    for index in range(0, k):
        best = tl.full((), -0x8000000000000000, tl.int64)
        for start in range(0, parts * keep, BLOCK_KEYS):
            place = start + tl.arange(0, BLOCK_KEYS)
            keys = tl.load(
                keys_ptr + row * parts * keep + place, mask=place < parts * keep,
                other=-0x8000000000000000,
            )  # fmt: skip
            best = tl.maximum(best, tl.max(tl.where(keys < last, keys, -0x8000000000000000), 0))
        token = key_index(best)
        if hot_ids_ptr is not None:
            token = tl.load(hot_ids_ptr + token).to(tl.int64)
        tl.store(ids_ptr + row * k + index, token)
        tl.store(scores_ptr + row * k + index, key_logit(best) - norm)
        last = best


def launches(
    z: Tensor, lm_head: Tensor, head_scales: Tensor | None, head_bias: Tensor | None,
    hot_ids: Tensor | None, k: int, logit_scale: float, logit_cap: float,
    *, scratch: Scratch,
) -> tuple[list[KernelLaunch], tuple[Tensor, ...]]:  # fmt: skip
    """What ``draft_topk`` launches, and its outputs."""
    rows, vocabulary = len(z), lm_head.shape[0]
    if not 0 < k <= vocabulary:
        raise ValueError(f"k={k}: the vocabulary has {vocabulary} tokens")
    arguments = head_arguments(z, lm_head, head_scales, head_bias, scratch)
    blocks = head_blocks(rows, z.shape[1], arguments["z_ptr"], TOKENS)
    parts, keep = -(-vocabulary // blocks["BLOCK_V"]), min(k, blocks["BLOCK_V"])
    keys = scratch.empty(rows, parts, keep, dtype=torch.long)
    moments = scratch.empty(rows, parts, 2)
    scores = z.new_empty(rows, k, dtype=torch.float32)
    ids = z.new_empty(rows, k, dtype=torch.long)
    form = {"LOGIT_SCALE": logit_scale, "LOGIT_CAP": logit_cap}
    score = KernelLaunch(
        _score_kernel, (parts,),
        {**arguments, "keys_ptr": keys, "moments_ptr": moments, "keep": keep},
        {**blocks, **form}, size(lm_head, head_scales, head_bias, z, keys),
    )  # fmt: skip
    merge = KernelLaunch(
        _merge_kernel, (rows,),
        {"keys_ptr": keys, "moments_ptr": moments, "hot_ids_ptr": scratch.flat(hot_ids),
         "scores_ptr": scores, "ids_ptr": ids, "parts": parts, "keep": keep, "k": k},
        {"BLOCK_P": power_of_two(parts, 16, 1024), "BLOCK_KEYS": power_of_two(parts * keep, 32,
         4096)}, size(keys, moments),
    )  # fmt: skip
    return [score, merge], (scores, ids)
