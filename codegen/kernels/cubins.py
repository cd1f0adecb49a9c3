"""Launch kernels from machine code compiled ahead of time: nothing is compiled at start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from eepass.codegen.cuda.driver import Function, load
from eepass.codegen.cuda.stored_kernels import StoredKernel, read_kernels
from eepass.codegen.kernels import draft_topk, exit_predictor, final_state
from eepass.codegen.kernels.launch import KernelLaunch
from eepass.codegen.kernels.specialise import key_of, parameters_of
from eepass.codegen.kernels.verify_head import _verify_kernel

KERNELS: tuple[Any, ...] = (
    exit_predictor._exit_kernel, final_state._gate_kernel, final_state._state_kernel,
    _verify_kernel, draft_topk._score_kernel, draft_topk._merge_kernel,
)  # fmt: skip


def sources() -> dict[str, str]:
    """By kernel name, a hash of its source and of the functions it calls."""
    return {kernel.__name__: kernel.cache_key for kernel in KERNELS}


class Cubins:
    """The kernels of a folder on this machine's GPU, for ``register_kernels``.

    ``missing`` counts, by kernel, launches that the folder holds no code for: Triton compiles
    those. Raises ``KernelsUnfit``.
    """

    def __init__(self, folder: Path, capability: int | None = None) -> None:
        if capability is None:
            major, minor = torch.cuda.get_device_capability()
            capability = 10 * major + minor
        self.capability, self.stored = read_kernels(folder, capability, sources())
        self.missing: dict[str, int] = {}
        # module and function by device and key; a module must live as long as its function
        self._loaded: dict[tuple[int, str], tuple[Any, Function]] = {}

    def find(self, launch: KernelLaunch) -> StoredKernel | None:
        """The code for ``launch``, if the folder has it."""
        return self.stored.get(key_of(launch, self.capability))

    def launch(self, launch: KernelLaunch) -> bool:
        """Enqueue ``launch`` in the current stream; False where there is no code for it."""
        key = key_of(launch, self.capability)
        stored = self.stored.get(key)
        if stored is None:
            self.missing[launch.name] = self.missing.get(launch.name, 0) + 1
            return False
        place = (torch.cuda.current_device(), key)
        if place not in self._loaded:
            self._loaded[place] = load(
                stored.code, stored.name, stored.parameters, stored.shared_bytes
            )
        types, values = parameters_of(launch)
        assert types == stored.parameters
        stream = torch.cuda.current_stream().cuda_stream
        _, function = self._loaded[place]
        function.launch(launch.grid, 32 * stored.warps, stored.shared_bytes, values, stream)
        return True
