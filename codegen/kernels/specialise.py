"""What a launch's code is specialised for: what Triton's just-in-time compiler would choose."""

from __future__ import annotations

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
