"""Run code that was compiled ahead of time: nothing is traced, nothing compiled, no Dynamo."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

Compiled = Callable[[list[Tensor]], Sequence[Tensor]]


def code_key(structure: str, logits: bool) -> str:
    """Names the code of a structure, with its linear layers' sums in float32 or not."""
    return hashlib.sha256(f"{structure} {logits}".encode()).hexdigest()[:16]


class NoSuchCode(ValueError):
    """Something is asked for that was not compiled ahead of time; the message says where."""


class CompiledCode:
    """A compiler that has compiled already: shared objects of AOTInductor, opened when needed.

    Called as ``CpuCompiler`` is, but ``graph`` and ``examples`` are of no use to it. The kernels
    must be open.
    """

    kernels_missing = ""

    def __init__(self, folder: Path, files: Mapping[str, str]) -> None:
        """``files``: names within ``folder`` by ``code_key``."""
        self.folder, self.files = folder, dict(files)
        self._opened: dict[str, Compiled] = {}

    def __call__(
        self, graph: object, structure: str, examples: Sequence[Tensor], *, logits: bool = False
    ) -> Compiled:
        """The function for ``structure``; raises ``NoSuchCode`` if there is none."""
        key = code_key(structure, logits)
        if key not in self._opened:
            if key not in self.files:
                raise NoSuchCode(
                    f"{self.folder} holds no code for {structure}: what is asked for was not "
                    "foreseen when the model was transformed; use the original model"
                )
            file = str(self.folder / self.files[key])
            self._opened[key] = torch._C._aoti.AOTIModelContainerRunnerCpu(file, 1).run
        return self._opened[key]
