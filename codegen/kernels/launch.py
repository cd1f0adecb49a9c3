"""A kernel with its arguments: run where it stands, or compiled for a machine that is elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of ``kernel``: ``arguments`` by name (None where a tensor is not there),
    ``constants`` it is specialised for, and the bytes it cannot help reading or writing."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    bytes: int
    warps: int = 4

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.constants, num_warps=self.warps)


def run(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch.run()


def power_of_two(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of two that holds n, between ``least`` and ``most``."""
    return int(min(max(triton.next_power_of_2(n), least), most))


def rows_of(tensor: Tensor) -> Tensor:
    """``tensor`` [N, M] such that a row lies in one piece; its rows may lie anywhere."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def size(*tensors: Tensor | None) -> int:
    """Bytes of the tensors that are there."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def float_empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
