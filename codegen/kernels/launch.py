"""A kernel launch as data: run on the device that is here, or compiled for another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KernelLaunch:
    """One launch of ``kernel``: ``arguments`` by name (None for an optional tensor that is absent),
    the ``constants`` it is specialised for, and the bytes it has to read and write at least."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    bytes: int
    warps: int = 4

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.constants, num_warps=self.warps)


def run(launches: Sequence[KernelLaunch]) -> None:
    """Launch in order."""
    for launch in launches:
        launch.run()


class Scratch:
    """Memory for intermediate results of launches, on the device of ``like``."""

    def __init__(self, like: Tensor) -> None:
        self.device = like.device

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def copy(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.empty(*tensor.shape, dtype=dtype or tensor.dtype).copy_(tensor)

    def flat(self, tensor: Tensor | None) -> Tensor | None:
        """``tensor`` if it is contiguous, else a contiguous copy."""
        return tensor if tensor is None or tensor.is_contiguous() else self.copy(tensor)

    def rows_of(self, tensor: Tensor) -> Tensor:
        """``tensor`` [N, M] if each of its rows is contiguous, else a copy."""
        in_rows = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
        return tensor if in_rows else self.copy(tensor)


def power_of_two(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of two that is at least n, kept between ``least`` and ``most``."""
    return int(min(max(triton.next_power_of_2(n), least), most))


def size(*tensors: Tensor | None) -> int:
    """Bytes of the tensors that are not None."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
