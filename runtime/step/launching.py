"""Which way a step is launched here, and why; the executor for it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch

from eepass.errors import EngineError
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.step.build import Fuse, build_step
from eepass.runtime.step.conditional_graph import CudaError, conditional_nodes_missing
from eepass.runtime.step.data import check_step, launches
from eepass.runtime.step.engine import Executor, StepEngine
from eepass.runtime.step.exit_points import ExitPoints
from eepass.runtime.step.host import HostDriven, PlainFlags, called
from eepass.runtime.step.interpret import Interpreter
from eepass.runtime.step.layout import StepOptions
from eepass.runtime.step.tokens import Outbox, PlainOutbox

Mode = Literal["device", "predicated", "host", "interpret"]
MODES: tuple[str, ...] = ("auto", "device", "predicated", "host", "interpret")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOWER = "lower max_length or pending (fewer rows a segment), or free memory on the device"


@dataclass(frozen=True, slots=True)
class Launching:
    """How steps are launched, and why so; ``missing``: what another way would have needed."""

    mode: Mode
    reason: str
    missing: tuple[str, ...] = ()
    # nobody asked for this one: another will do
    auto: bool = False


@dataclass
class LaunchReport:
    """How a model's steps are launched. ``rows``: row counts segments were made for; ``bytes``:
    memory beyond weights, cache and artefact; ``host_synchronisations``: how often a step waited
    for the host so far, per step; ``launches``: names of what a step may launch."""

    mode: str
    reason: str
    missing: tuple[str, ...]
    rows: tuple[int, ...]
    bytes: int
    host_synchronisations: float
    launches: tuple[str, ...]


def require_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ``EngineError`` where nothing can be decoded on ``device``."""
    if dtype not in DTYPES:
        raise EngineError(f"{dtype} is not supported: use float32, bfloat16 or float16")
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise EngineError(f"device={str(device)!r}: must be cpu or cuda")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch {torch.__version__} is built without CUDA" if built is None else (
            f"torch {torch.__version__} (CUDA {built}) finds no device, or a driver too old for it"
        )  # fmt: skip
        raise EngineError(f"device='cuda': {why}; use device='cpu'")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise EngineError(f"device={str(device)!r}: there are {torch.cuda.device_count()} devices")
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        raise EngineError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16: load the model in float16"
        )


def require_room(device: torch.device, needed: int) -> None:
    """Raise ``EngineError`` if ``needed`` bytes are not free on a CUDA ``device``."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if needed > free:
            raise EngineError(
                f"weights and cache need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on "
                f"{torch.cuda.get_device_name(device)}: lower max_length, or use a smaller dtype"
            )


@contextmanager
def running_out(when: str) -> Iterator[None]:
    """Memory that runs out as an ``EngineError`` that says what to lower, the rest given back."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        failed = EngineError(f"out of memory while {when}: {LOWER}")
        # a traceback holds what was allocated on the way
        error.__traceback__ = None
        gc.collect()
        torch.cuda.empty_cache()
        raise failed from error


def choose(launch: str, device: torch.device) -> Launching:
    """The way ``launch`` asks for, or the best there is; ``EngineError`` where there is no such."""
    if launch not in MODES:
        raise EngineError(f"launch={launch!r}: must be one of {', '.join(MODES)}")
    asked = f"launch={launch!r} was asked for"
    if device.type == "cpu":
        if launch in ("device", "predicated"):
            raise EngineError(f"launch={launch!r}: needs a CUDA device; on a CPU use host")
        if launch == "interpret":
            return Launching("interpret", asked)
        return Launching("host", asked if launch == "host" else "on a CPU flags are plain loads")
    if launch == "interpret":
        raise EngineError("launch='interpret': runs on a CPU only; use device='cpu'")
    missing = _missing(device)
    if launch == "device" and missing:
        raise EngineError(f"launch='device': {missing}; use launch='host'")
    if launch != "auto":
        return Launching(cast(Mode, launch), asked)
    if missing:
        return Launching("host", f"no conditional graph nodes: {missing}", (missing,))
    return Launching("device", "conditional graph nodes are there", auto=True)


def _missing(device: torch.device) -> str:
    if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"):
        return f"torch {torch.__version__} does not hand out captured graphs: use 2.11 or later"
    return conditional_nodes_missing(torch.cuda.get_device_capability(device))


def make_engine(
    decoder: Decoder,
    exits: ExitPoints | None,
    options: StepOptions,
    launching: Launching,
    fuse: Fuse | None = None,
    debug: bool = False,
) -> tuple[StepEngine, Callable[[], LaunchReport]]:
    """An engine that launches its steps so, and what reports on it.

    Raises ``EngineError`` if memory runs out on the way; the process can go on.
    """
    before = _reserved(decoder.device)
    if launching.mode == "predicated":
        # all bodies run: one for each number of rows would do the same work several times
        options = replace(options, one_size=True)
    if decoder.device.type == "cuda" and launching.mode == "host":
        # asking costs the host's attention, more than the verification costs the device
        options = replace(options, verify="always")
    try:
        with torch.no_grad(), running_out("capturing a step"):
            engine = _engine(decoder, exits, options, launching.mode, fuse, debug)
    except CudaError as error:
        if launching.auto:
            why = f"a graph with IF nodes could not be made: {error}"
            launching = Launching("host", why, (why,))
            return make_engine(decoder, exits, options, launching, fuse, debug)
        raise EngineError(f"a step could not be captured ({error}): use launch='host'") from error
    taken = max(_reserved(decoder.device) - before, engine.step.nbytes)

    def report() -> LaunchReport:
        step = engine.step
        return LaunchReport(
            launching.mode,
            launching.reason,
            launching.missing,
            tuple(step["buckets"][1].tolist()),
            taken,
            engine.executor.synchronisations / max(engine.steps, 1),
            tuple(launch.name for launch in launches(step.items)),
        )

    return engine, report


def _engine(
    decoder: Decoder,
    exits: ExitPoints | None,
    options: StepOptions,
    mode: Mode,
    fuse: Fuse | None,
    debug: bool,
) -> StepEngine:
    step = build_step(decoder, exits, options, fuse)
    check_step(step)
    executor: Executor
    outbox: Outbox = PlainOutbox(step["out"])
    if mode == "interpret":
        executor = Interpreter(step)
    elif decoder.device.type == "cpu":
        executor = HostDriven(step, PlainFlags(), called(step))
    else:
        from eepass.runtime.step import cuda

        captures = cuda.Captures(step, debug)
        try:
            if mode == "device":
                executor = cuda.DeviceGraph(captures)
            elif mode == "predicated":
                executor = cuda.PredicatedGraph(captures)
            else:
                executor = cuda.HostSegments(captures)
        except BaseException:
            # the memory of what was captured goes back, whatever ended it
            captures.close()
            raise
        outbox = cuda.CudaOutbox(step["out"])
        # what warming up counted
        step["counters"].zero_()
        # prompts of all lengths through one code, made now and not when the first one comes
        decoder.prepare(decoder.buckets[-1])
        return StepEngine(decoder, step, executor, outbox, prompt_rows=decoder.buckets[-1])
    return StepEngine(decoder, step, executor, outbox)


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
