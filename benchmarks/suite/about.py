"""The first part: what all the others run on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import subprocess
from typing import Any

import torch

from benchmarks.suite.bench import ROOT, Bench
from benchmarks.suite.parts import Notify

PACKAGES = ("torch", "transformers", "triton", "cuda-bindings", "safetensors", "numpy", "gguf")
QUERY = "name,driver_version,power.limit,clocks.sm,clocks.mem,temperature.gpu"


def environment(bench: Bench, notify: Notify) -> dict[str, Any]:
    bench.require_device()
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _said("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "threads": torch.get_num_threads(),
        "device": platform.processor() or platform.machine(),
    }
    if bench.on_cuda:
        properties = torch.cuda.get_device_properties(bench.device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "nvidia_smi": _said("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"),
        }
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _said(*command: str) -> str:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "not known"
    return ran.stdout.strip() or "not known"
