"""Compile launches for a GPU without having it, and report the resources they take."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eepass.codegen.kernels.launch import KernelLaunch
from eepass.codegen.kernels.specialise import specialisation


@dataclass(frozen=True, slots=True)
class Resources:
    """What a launch's machine code takes: ``registers`` a thread, and bytes: spilled, and of shared
    memory a program."""

    registers: int
    spills: int
    shared_bytes: int


def compile_launch(launch: KernelLaunch, capability: int) -> Resources:
    """Compile ``launch`` for compute capability ``capability`` (90 is an H200).

    Needs no GPU: Triton comes with an assembler.
    """
    source = ASTSource(launch.kernel, *specialisation(launch))
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.warps}
    )
    ptx, about = compiled.asm["ptx"], compiled.metadata
    if about.global_scratch_size or about.profile_scratch_size:
        raise RuntimeError(f"{about.name}: needs scratch memory of its own")
    return Resources(*_registers(ptx), about.shared)


def _registers(ptx: str) -> tuple[int, int]:
    """Registers a thread and bytes spilled, as the assembler reports them."""
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "kernel.ptx"
        file.write_text(ptx)
        knobs = triton.knobs.nvidia
        # Triton brings an assembler of its own for what its usual one does not know
        later = int(re.findall(r"\d+", target[1])[0]) >= 100
        ptxas = str((getattr(knobs, "ptxas_blackwell", knobs.ptxas) if later else knobs.ptxas).path)
        command = [ptxas, "-v", f"-arch={target[1]}", str(file), "-o", f"{file}.cubin"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", output)
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", output)]
    if used is None or not spilled:
        raise RuntimeError(f"ptxas reported no registers: {output[-400:]}")
    return int(used[1]), sum(spilled)
