"""Compile launches for a GPU that is not here, and say what they need there."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eepass.codegen.kernels.launch import Launch

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8",
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cubin:
    """A compiled kernel: ``spills`` and ``shared_bytes`` in bytes, ``key`` the same for launches
    that share it."""

    key: str
    name: str
    code: bytes
    registers: int
    spills: int
    shared_bytes: int
    warps: int


def specialisation(launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes, as the just-in-time compiler would choose them for
    tensors that begin at a multiple of 16 bytes."""
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
            aligned[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, aligned


def key_of(launch: Launch, capability: int) -> str:
    """The same for launches that need the same code."""
    parts = (launch.kernel.cache_key, capability, launch.warps, *specialisation(launch))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def compile_launch(launch: Launch, capability: int) -> Cubin:
    """``launch`` as machine code for compute capability ``capability`` (90 is an H200).

    Needs no GPU: Triton brings its own assembler.
    """
    source = ASTSource(launch.kernel, *specialisation(launch))
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.warps}
    )
    registers, spills = _registers(compiled.asm["ptx"])
    return Cubin(
        key_of(launch, capability), compiled.metadata.name, compiled.asm["cubin"], registers,
        spills, compiled.metadata.shared, launch.warps,
    )  # fmt: skip


def _registers(ptx: str) -> tuple[int, int]:
    """Registers a thread and bytes spilled, as the assembler reports them."""
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "kernel.ptx"
        file.write_text(ptx)
        command = [_assembler(), "-v", f"-arch={target[1]}", str(file), "-o", f"{file}.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", said)
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", said)]
    if used is None or not spilled:
        raise RuntimeError(f"ptxas said nothing of registers: {said[-400:]}")
    return int(used[1]), sum(spilled)


def _assembler() -> str:
    return str(triton.knobs.nvidia.ptxas.path)
