"""What a launch's code is specialised for: what Triton's just-in-time compiler would choose."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from eepass.codegen.kernels.launch import KernelLaunch

# what Triton takes tensors to be aligned to, in bytes
ALIGNMENT = 16
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8",
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip
# Triton's type -> what PTX declares
PTX_TYPES = {"i32": "u32", "i64": "u64", "fp32": "f32"}
# Triton adds two pointers to scratch memory, null where a kernel uses none
SCRATCH_POINTERS = ("u64", "u64")


def specialisation(launch: KernelLaunch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes for Triton; a meta tensor counts as aligned."""
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = dict(launch.constants)
    aligned: dict[Any, Any] = {}
    for place, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.is_meta or value.data_ptr() % ALIGNMENT == 0:
                aligned[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, aligned


def key_of(launch: KernelLaunch, capability: int) -> str:
    """A hash, equal for launches that need the same code."""
    parts = (launch.kernel.cache_key, capability, launch.warps, *specialisation(launch))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def parameters_of(launch: KernelLaunch) -> tuple[tuple[str, ...], tuple[int | float, ...]]:
    """The kernel's parameters as PTX declares them, and this launch's values for them."""
    types: list[str] = []
    values: list[int | float] = []
    signature, _, _ = specialisation(launch)
    for name, kind in signature.items():
        if kind == "constexpr":
            continue
        value = launch.arguments[name]
        types.append("u64" if kind.startswith("*") else PTX_TYPES[kind])
        if isinstance(value, Tensor):
            value = 0 if value.is_meta else value.data_ptr()
        # a negative integer is passed as its unsigned bit pattern
        values.append(value % 2**32 if kind == "i32" else value % 2**64 if kind == "i64" else value)
    return (*types, *SCRATCH_POINTERS), (*values, 0, 0)
