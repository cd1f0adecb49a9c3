"""Triton kernel for ``eepass::path_predictor``: ``exit_predictor`` on nodes, then on to paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eepass.codegen.kernels import exit_predictor
from eepass.codegen.kernels.launch import KernelLaunch, Scratch, outputs_of, power_of_two, size


@triton.jit
def _path_kernel(
    node_ptr, paths_ptr, threshold_ptr, path_ptr, exits_ptr, depth, BLOCK_D: tl.constexpr
):
    """The smallest probability of one path's nodes; NaN if one is."""
    path = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_D)
    node = tl.load(paths_ptr + path * depth + place, mask=place < depth, other=-1).to(tl.int64)
    exists = node >= 0
    probability = tl.load(node_ptr + node, mask=exists, other=1.0)
    undefined = tl.max((probability != probability).to(tl.int32), 0) > 0
    least = tl.min(tl.where(probability != probability, 1.0, probability), 0)
    least = tl.where(undefined, float("nan"), least)
    least = tl.where(tl.max(exists.to(tl.int32), 0) > 0, least, 0.0)
    tl.store(path_ptr + path, least)
    exits = least > tl.load(threshold_ptr).to(tl.float32)
    tl.store(exits_ptr + path, exits.to(tl.uint8))


def launches(
    *arguments: Any, scratch: Scratch, out: Mapping[str, Tensor] | None = None
) -> tuple[list[KernelLaunch], tuple[Tensor, ...]]:
    """What ``path_predictor`` launches, and its outputs (``out``, or new)."""
    *predictor, paths = arguments[:17]
    rows, hidden_size = predictor[0].shape
    path, node, probabilities, z, exits = outputs_of(
        predictor[0], out, path=((len(paths),), torch.float32), node=((rows,), torch.float32),
        probabilities=(tuple(predictor[9].shape), torch.float32),
        z=((rows, hidden_size), predictor[0].dtype), exits=((len(paths),), torch.bool),
    )  # fmt: skip
    nodes = {
        "probability": node, "probabilities": probabilities, "z": z,
        "exits": scratch.empty(rows, dtype=torch.bool),
    }  # fmt: skip
    made, _ = exit_predictor.launches(*predictor, *arguments[17:], scratch=scratch, out=nodes)
    to_path = {
        "node_ptr": node, "paths_ptr": scratch.flat(paths), "threshold_ptr": predictor[15],
        "path_ptr": path, "exits_ptr": exits.view(torch.uint8), "depth": paths.shape[1],
    }  # fmt: skip
    block = {"BLOCK_D": power_of_two(paths.shape[1], 2)}
    made.append(KernelLaunch(_path_kernel, (len(paths),), to_path, block, size(paths, node)))
    return made, (path, node, probabilities, z, exits)
