"""The parts of the suite in their order, and what each may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.suite.bench import Bench

# results so far, kept if the part is cut off
Notify = Callable[[dict[str, Any]], None]
Run = Callable[["Bench", Notify], dict[str, Any]]


class Missing(Exception):
    """What a part needs is not here; the message says what."""


class Wrong(Exception):
    """A result is wrong; the message says how. Nothing is timed on it."""


@dataclass(frozen=True, slots=True)
class Part:
    """``cost``: seconds it takes on a data-centre GPU; it is not begun where fewer are left.
    ``limit``: seconds after which it is cut off. ``module`` and ``function``: its code, which gets
    ``argument`` if there is one. Without an ``essential`` part no other makes sense; one whose
    result is wrong is there all the same. ``alone``: in a process of its own."""

    name: str
    module: str
    function: str
    cost: float
    limit: float
    argument: str = ""
    essential: bool = False
    alone: bool = False


# the first is what the others are measured against; "engine" goes layer by layer from the host
CUDA_MODES = ("device", "predicated", "host", "engine")
CPU_MODES = ("host", "interpret", "engine")
FORCED = (8, 16, 24)


def modes(device: str) -> tuple[str, ...]:
    """Launch modes that make sense on ``device``."""
    return CUDA_MODES if device == "cuda" else CPU_MODES


def timed_modes(device: str) -> tuple[str, ...]:
    """Launch modes worth timing: not the interpreter, which checks every launch."""
    return tuple(mode for mode in modes(device) if mode != "interpret")


def all_parts(device: str) -> list[Part]:
    """Correctness first, then times; names of launch modes are those of ``device``."""
    timed = timed_modes(device)
    found = [
        Part("environment", "about", "environment", 2, 60, essential=True),
        Part("tests", "correctness", "tests", 60, 150),
        Part("twin", "correctness", "twin", 10, 90, essential=True),
        Part("compiled", "correctness", "compiled", 40, 240),
    ]
    found += [Part(f"equality {m}", "correctness", "equality", 25, 120, m) for m in modes(device)]
    found += [
        Part("bandwidth", "times", "bandwidth", 2, 20),
        Part("side by side", "times", "side_by_side", 60, 240),
    ]
    for mode in timed:
        if mode != "engine":
            found.append(Part(f"exact step {mode}", "times", "exact_step", 20, 120, mode))
        found += [
            Part(f"never exit {mode}", "times", "never_exit", 10, 60, mode),
            Part(f"forced exit {mode}", "times", "forced_exit", 20, 120, mode),
        ]
        if mode == timed[0]:
            found.append(Part("kernels", "kernels", "kernels", 30, 90))
            found.append(Part("prompts", "prompts", "prompts", 60, 180))
    found.append(Part("others", "others", "others", 5, 200))
    # a profiler under graphs with IF nodes can take its process along (PyTorch issue 134308); the
    # process makes the twin again
    steps = [Part(f"step {m}", "step_time", "step_split", 45, 120, m, alone=True) for m in timed]
    return [*found, *steps]
