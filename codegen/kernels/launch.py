"""A kernel with its arguments: run where it stands, or compiled for a machine that is elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

# what Triton takes tensors to be aligned to, in bytes
ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class KernelLaunch:
    """One launch of ``kernel``: ``arguments`` by name (None where a tensor is not there),
    ``constants`` it is specialised for, and the bytes it cannot help reading or writing."""

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


class Ready(Protocol):
    """Kernels that are compiled already; ``launch`` says whether it had this one."""

    def launch(self, launch: KernelLaunch) -> bool: ...


def run(launches: Sequence[KernelLaunch], ready: Ready | None = None) -> None:
    """Launch in order: what ``ready`` holds from there, the rest through Triton's compiler."""
    for launch in launches:
        if ready is None or not ready.launch(launch):
            launch.run()


class Scratch:
    """Memory that launches need on the way, on the device of ``like``.

    With a ``workspace`` (uint8 [N]) it is cut from there: nothing is allocated, as a step that is
    captured wants it. ``bytes`` counts what was asked for; ``ValueError`` where it is too small.
    """

    def __init__(self, like: Tensor, workspace: Tensor | None = None) -> None:
        self.device, self.workspace, self.bytes = like.device, workspace, 0
        if workspace is not None and (
            workspace.dtype != torch.uint8 or not workspace.is_contiguous()
        ):
            raise ValueError(f"workspace: {workspace.dtype} in strides, expected plain torch.uint8")

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        begin, length = self.bytes, math.prod(shape) * dtype.itemsize
        self.bytes += -(-length // ALIGNMENT) * ALIGNMENT
        if self.workspace is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        if self.bytes > len(self.workspace):
            raise ValueError(
                f"workspace: {len(self.workspace)} bytes are too few; ask workspace_bytes"
            )
        return self.workspace[begin : begin + length].view(dtype).view(shape)

    def copy(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.empty(*tensor.shape, dtype=dtype or tensor.dtype).copy_(tensor)

    def flat(self, tensor: Tensor | None) -> Tensor | None:
        """``tensor``, contiguous."""
        return tensor if tensor is None or tensor.is_contiguous() else self.copy(tensor)

    def rows_of(self, tensor: Tensor) -> Tensor:
        """``tensor`` [N, M] such that each row is contiguous; its rows may lie anywhere."""
        in_rows = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
        return tensor if in_rows else self.copy(tensor)


def outputs_of(
    like: Tensor,
    given: Mapping[str, Tensor] | None,
    **expected: tuple[tuple[int, ...], torch.dtype],
) -> list[Tensor]:
    """New tensors on the device of ``like``, or the ``given`` ones where the caller brings them
    (pinned host memory among them); ``ValueError`` for one of another shape or dtype."""
    if given is None:
        return [torch.empty(s, dtype=d, device=like.device) for s, d in expected.values()]
    for name, (shape, dtype) in expected.items():
        out = given[name]
        if tuple(out.shape) != shape or out.dtype != dtype or not out.is_contiguous():
            raise ValueError(
                f"{name}: {out.dtype} {list(out.shape)}, expected {dtype} {list(shape)} contiguous"
            )
    return [given[name] for name in expected]


def power_of_two(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of two that holds n, between ``least`` and ``most``."""
    return int(min(max(triton.next_power_of_2(n), least), most))


def size(*tensors: Tensor | None) -> int:
    """Bytes of the tensors that are there."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
