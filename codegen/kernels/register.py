"""Make the Triton kernels what the fused operators run on CUDA tensors."""

from __future__ import annotations

import functools

import torch

import eepass.fused_ops  # noqa: F401  the operators must be defined before kernels are added to them
from eepass.codegen.kernels.draft_topk import draft_topk
from eepass.codegen.kernels.exit_predictor import exit_predictor
from eepass.codegen.kernels.fill_kv import fill_kv
from eepass.codegen.kernels.path_predictor import path_predictor
from eepass.codegen.kernels.verify_head import verify_head

KERNELS = {
    "exit_predictor": exit_predictor,
    "verify_head": verify_head,
    "path_predictor": path_predictor,
    "draft_topk": draft_topk,
    "fill_kv": fill_kv,
}


@functools.cache
def register_kernels() -> torch.library.Library:
    """Register once; without it CUDA tensors go through the operators' eager definitions."""
    library = torch.library.Library("eepass", "IMPL", "CUDA")
    for name, kernel in KERNELS.items():
        library.impl(name, kernel)
    return library
