"""Triton kernels for ``eepass::verify_head``: the normed state, then one pass over the LM head.

Each program multiplies a few rows of the head and updates each state's best key; the last to finish
turns keys into tokens and looks for them among the draft tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eepass.codegen.kernels.final_state import state_launches
from eepass.codegen.kernels.head_rows import (
    head_arguments,
    head_blocks,
    head_tile,
    key_index,
    sort_key,
)
from eepass.codegen.kernels.launch import KernelLaunch, Scratch, power_of_two, size

# rows of the head a program reads where there is one state
TOKENS = 16


@triton.jit
def _verify_kernel(
    z_ptr, lm_head_ptr, head_stride, head_scales_ptr, head_bias_ptr, hot_ids_ptr, draft_ptr,
    best_ptr, counted_ptr, token_ptr, known_ptr, logits_ptr, rows, vocabulary, hidden_size,
    num_drafts, LOGIT_SCALE: tl.constexpr, LOGIT_CAP: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, WIDEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    there = token < vocabulary
    logits = head_tile(
        z_ptr, lm_head_ptr, head_stride, head_scales_ptr, head_bias_ptr, token, there, rows,
        hidden_size, LOGIT_SCALE, LOGIT_CAP, BLOCK_V, BLOCK_R, BLOCK_H, WIDEN,
    )  # fmt: skip
    row = tl.arange(0, BLOCK_R)
    real = row < rows
    if logits_ptr is not None:
        place = logits_ptr + row.to(tl.int64)[None, :] * vocabulary + token[:, None]
        tl.store(place, logits, mask=there[:, None] & real[None, :])
    keys = tl.where(there[:, None], sort_key(logits, token[:, None]), -0x8000000000000000)
    tl.atomic_max(best_ptr + row, tl.max(keys, 0), mask=real, sem="relaxed")
    # all threads' maxima come before the one thread's count
    tl.debug_barrier()
    if tl.atomic_add(counted_ptr, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        best = tl.load(best_ptr + row, mask=real, other=0, cache_modifier=".cg")
        found = key_index(best)
        if hot_ids_ptr is not None:
            found = tl.load(hot_ids_ptr + found, mask=real, other=0).to(tl.int64)
        draft = tl.arange(0, BLOCK_K)
        both = real[:, None] & (draft < num_drafts)[None, :]
        drafted = tl.load(
            draft_ptr + row.to(tl.int64)[:, None] * num_drafts + draft[None, :], mask=both, other=-1
        )
        same = both & (drafted.to(tl.int64) == found[:, None])
        tl.store(token_ptr + row, found, mask=real)
        tl.store(known_ptr + row, tl.max(same.to(tl.int32), 1).to(tl.uint8), mask=real)


def launches(
    hidden: Tensor, scale: Tensor | None, down: Tensor | None, up: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None,
    lm_head: Tensor, head_scales: Tensor | None, head_bias: Tensor | None,
    hot_ids: Tensor | None, draft_ids: Tensor,
    norm: str, eps: float, weight_offset: float, logit_scale: float, logit_cap: float,
    want_logits: bool, *, scratch: Scratch,
) -> tuple[list[KernelLaunch], tuple[Tensor, ...]]:  # fmt: skip
    """What ``verify_head`` launches, and its outputs."""
    rows, vocabulary, drafts = len(hidden), lm_head.shape[0], draft_ids.shape[1]
    best, counted = scratch.empty(rows, dtype=torch.long), scratch.empty(1, dtype=torch.int32)
    made, z = state_launches(
        hidden, scale, down, up, norm_weight, norm_bias, norm, eps, weight_offset,
        best=best, counted=counted, scratch=scratch,
    )  # fmt: skip
    token = hidden.new_empty(rows, dtype=torch.long)
    known = hidden.new_empty(rows, dtype=torch.bool)
    logits = hidden.new_empty(rows, vocabulary if want_logits else 0, dtype=torch.float32)
    arguments: dict[str, Any] = {
        **head_arguments(z, lm_head, head_scales, head_bias, scratch),
        "hot_ids_ptr": scratch.flat(hot_ids), "draft_ptr": scratch.flat(draft_ids),
        "best_ptr": best, "counted_ptr": counted, "token_ptr": token,
        "known_ptr": known.view(torch.uint8),
        "logits_ptr": logits if want_logits else None, "num_drafts": drafts,
    }  # fmt: skip
    blocks = head_blocks(rows, z.shape[1], arguments["z_ptr"], TOKENS)
    constants = {
        **blocks, "LOGIT_SCALE": logit_scale, "LOGIT_CAP": logit_cap,
        "BLOCK_K": power_of_two(drafts),
    }  # fmt: skip
    grid = (-(-vocabulary // blocks["BLOCK_V"]),)
    read = size(lm_head, head_scales, head_bias, z, draft_ids, logits)
    made.append(KernelLaunch(_verify_kernel, grid, arguments, constants, read))
    return made, (token, known, logits)
