"""Load and launch machine code or PTX through the CUDA driver.

It uses ``cuda-bindings``, which the runtime needs for conditional graph nodes anyway. Triton's own
launcher takes Triton kernels only, and compiles a C stub for each signature on its first run; this
one packs arguments as that stub does: each in its own width, then two scratch pointers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# how PTX declares a kernel's parameter -> the C type of its value
C_TYPES: dict[str, Any] = {
    "u64": ctypes.c_uint64, "s64": ctypes.c_int64, "b64": ctypes.c_uint64,
    "u32": ctypes.c_uint32, "s32": ctypes.c_int32, "b32": ctypes.c_uint32,
    "f32": ctypes.c_float, "f64": ctypes.c_double,
}  # fmt: skip
# a kernel that takes more shared memory has to set an attribute first
SHARED_BYTES = 48 * 1024


class CudaMissing(RuntimeError):
    """The bindings to the CUDA driver are missing; the message says what to install."""


class CudaFailed(RuntimeError):
    """A call of the driver failed; the message names the call and the error."""


class Parameters:
    """Arguments of one launch as the driver takes them: an array of pointers to values.

    Must live until the launch call returns; the driver copies the values.
    """

    def __init__(self, types: Sequence[str], values: Sequence[int | float]) -> None:
        if len(types) != len(values):
            raise ValueError(f"{len(values)} arguments for {len(types)} parameters")
        self._cells = [C_TYPES[kind](value) for kind, value in zip(types, values, strict=True)]
        self._table = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, self._cells))

    @property
    def address(self) -> int:
        return ctypes.addressof(self._table)

    def packed(self) -> list[bytes]:
        """The bytes the driver reads for each parameter."""
        return [bytes(cell) for cell in self._cells]


@dataclass(frozen=True, slots=True)
class Function:
    """A kernel loaded in a CUDA context; ``parameters`` as PTX declares them."""

    handle: Any
    name: str
    parameters: tuple[str, ...]

    def launch(
        self,
        grid: Sequence[int],
        threads: int,
        shared_bytes: int,
        values: Sequence[int | float],
        stream: int,
    ) -> None:
        """Launch in ``stream``, which may be capturing."""
        parameters = Parameters(self.parameters, values)
        x, y, z = (*grid, 1, 1, 1)[:3]
        checked(
            f"launch of {self.name}",
            bindings().cuLaunchKernel(
                self.handle, x, y, z, threads, 1, 1, shared_bytes, stream, parameters.address, 0
            ),
        )


def load(
    code: bytes, name: str, parameters: Sequence[str], shared_bytes: int = 0
) -> tuple[Any, Function]:
    """The module of ``code`` (a cubin, or PTX that the driver assembles) and its entry ``name``, in
    the current context. The module must live as long as the function."""
    driver = bindings()
    module = checked(f"loading {name}", driver.cuModuleLoadData(code))
    handle = checked(f"finding {name}", driver.cuModuleGetFunction(module, name.encode()))
    if shared_bytes > SHARED_BYTES:
        dynamic = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(
            f"{shared_bytes} bytes of shared memory for {name}",
            driver.cuFuncSetAttribute(handle, dynamic, shared_bytes),
        )
    return module, Function(handle, name, tuple(parameters))


def bindings() -> Any:
    """The driver's functions; raises ``CudaMissing``."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise CudaMissing("no bindings to the CUDA driver: pip install 'eepass[gpu]'") from error
    return driver


def checked(what: str, result: tuple[Any, ...]) -> Any:
    """What a driver call returned besides its error code; ``CudaFailed`` if that is not success."""
    error, *values = result
    if int(error) != 0:
        raise CudaFailed(f"{what}: the CUDA driver reports {getattr(error, 'name', error)}")
    return values[0] if len(values) == 1 else tuple(values)
