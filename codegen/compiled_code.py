"""Run code that was compiled ahead of time, without tracing, compiling or Dynamo."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from eepass.codegen.by_structure import Compiled
from eepass.codegen.libraries import path_of
from eepass.private_names import AOTIModelContainerRunnerCpu


def code_key(structure: str, logits: bool) -> str:
    """The name of a structure's code; ``logits`` as for ``ByStructure``."""
    return hashlib.sha256(f"{structure} {logits}".encode()).hexdigest()[:16]


class NoSuchCode(ValueError):
    """A structure was not compiled ahead of time; the message names the folder."""


class CompiledCode:
    """Stands in for a compiler: opens AOTInductor's shared objects when they are first needed.

    Called as ``CpuCompiler`` is, but ignores ``graph`` and ``examples``. The library of kernels
    must be loaded.
    """

    kernels_missing = ""

    def __init__(
        self, folder: Path, files: Mapping[str, str], contents: Mapping[str, bytes] | None = None
    ) -> None:
        """``files``: names within ``folder`` by ``code_key``. ``contents``: what was found in those
        files when they were checked; they are not opened again."""
        self.folder, self.files = folder, dict(files)
        self._contents = contents or {}
        self._opened: dict[str, Compiled] = {}

    def __call__(
        self, graph: object, structure: str, examples: Sequence[Tensor], *, logits: bool = False
    ) -> Compiled:
        """The code for ``structure``; raises ``NoSuchCode`` if there is none."""
        key = code_key(structure, logits)
        if key not in self._opened:
            if key not in self.files:
                raise NoSuchCode(
                    f"{self.folder} holds no code for {structure}: this use was not foreseen when "
                    "the model was transformed; use the original model"
                )
            name = self.files[key]
            file = str(self.folder / name)
            # a library with a description beside it is found by its name alone
            if (
                name in self._contents
                and Path(name).with_suffix(".json").name not in self._contents
            ):
                file = path_of(self._contents[name], file)
            self._opened[key] = AOTIModelContainerRunnerCpu(file, 1).run
        return self._opened[key]
