"""Choose how steps are launched on a device, and make the engine that launches them so."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, cast

import torch

from eepass.errors import EngineError, first_line
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.step import cuda
from eepass.runtime.step.build import Fuse, build_step
from eepass.runtime.step.build_exiting import build_exiting_step
from eepass.runtime.step.build_speculative import build_speculative_step
from eepass.runtime.step.conditional_graph import conditional_nodes_missing
from eepass.runtime.step.data import Step, StepError, check_step, launches
from eepass.runtime.step.engine import Executor, StepEngine
from eepass.runtime.step.exit_points import ExitPoints
from eepass.runtime.step.exiting_engine import ExitingEngine
from eepass.runtime.step.head_drafts import HeadDrafts
from eepass.runtime.step.host import Flags, HostDriven, ResultQueue, called
from eepass.runtime.step.interpret import Interpreter
from eepass.runtime.step.layout import StepOptions
from eepass.runtime.step.speculative_engine import SpeculativeEngine

Mode = Literal["device", "predicated", "host", "calls", "interpret"]
MODES: tuple[str, ...] = ("auto", "device", "predicated", "host", "calls", "interpret")
# a mode that cannot capture -> the one to try then
SIMPLER: Mapping[Mode, Mode] = {"device": "host", "predicated": "host", "host": "calls"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Launching:
    """How steps are launched, and why; ``missing``: what a faster mode would have needed; ``auto``:
    nobody asked for this mode, so another may replace it."""

    mode: Mode
    reason: str
    missing: tuple[str, ...] = ()
    auto: bool = False


@dataclass
class LaunchReport:
    """How a model's steps are launched. ``rows``: row counts of the segments; ``bytes``: memory
    beyond weights, cache and artefact; ``host_synchronisations``: how often the host waited so far,
    per step; ``launches``: names of all launches of a step."""

    mode: str
    reason: str
    missing: tuple[str, ...]
    rows: tuple[int, ...]
    bytes: int
    host_synchronisations: float
    launches: tuple[str, ...]


def require_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ``EngineError`` where ``device`` cannot decode in ``dtype``."""
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
    """Turn running out of memory into an ``EngineError`` that says what to lower, and free what was
    allocated until then."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        failed = EngineError(
            f"out of memory while {when}: lower max_length or pending (fewer rows a segment), or "
            "free memory on the device"
        )
        # the traceback keeps alive what was allocated
        error.__traceback__ = None
        gc.collect()
        torch.cuda.empty_cache()
        raise failed from error


def choose(launch: str, device: torch.device) -> Launching:
    """The mode named ``launch``, or for "auto" the best there is here; raises ``EngineError`` where
    the mode cannot run."""
    if launch not in MODES:
        raise EngineError(f"launch={launch!r}: must be one of {', '.join(MODES)}")
    if device.type == "cpu" and launch in ("device", "predicated"):
        raise EngineError(f"launch={launch!r}: needs a CUDA device; on a CPU use host")
    if device.type != "cpu" and launch == "interpret":
        raise EngineError("launch='interpret': runs on a CPU only; use device='cpu'")
    missing = "" if device.type == "cpu" else _missing(device)
    if launch == "device" and missing:
        raise EngineError(f"launch='device': {missing}; use launch='host'")
    if launch != "auto":
        return Launching(cast(Mode, launch), f"launch={launch!r} was asked for")
    if device.type == "cpu":
        return Launching("host", "on a CPU flags are plain loads")
    if missing:
        return Launching("host", f"no conditional graph nodes: {missing}", (missing,), auto=True)
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
    head: HeadDrafts | None = None,
) -> tuple[StepEngine, Callable[[], LaunchReport]]:
    """An engine that launches its steps as ``launching`` says, and a function that reports on it.

    ``head``: the trained draft head, where the rows of ``options.tree`` are its.
    Where that cannot be, and nobody asked for it, steps are launched in the next simpler mode.
    Raises ``EngineError`` where somebody did, and if memory runs out; the process can go on.
    """
    before, mode, why, tree = _reserved(decoder.device), launching.mode, "", options.tree
    fitting = options
    if mode == "predicated":
        # all bodies run: several row counts would do the same work several times
        fitting = replace(options, one_size=True)
    if decoder.device.type == "cuda" and mode in ("host", "calls"):
        # waiting for the flag takes longer than the verification it would save
        fitting = replace(options, verify="always")
    with torch.no_grad(), running_out("capturing a step"):
        if tree is not None:
            if exits is None and options.force is None:
                step = build_speculative_step(
                    decoder, tree, options.stop, options.draws, fuse, head
                )
            else:
                step = build_exiting_step(decoder, exits, options, fuse, head)
            if decoder.device.type == "cuda" and mode in ("host", "calls"):
                # waiting for the flag takes longer than what it would save
                step = step.flattened()
        else:
            step = build_step(decoder, exits, fitting, fuse)
        check_step(step)
        try:
            engine = _engine(decoder, step, mode, debug, head)
        except (torch.OutOfMemoryError, StepError):
            raise
        except RuntimeError as error:
            # of the driver, or of torch, which names its own in several lines
            why = f"mode {mode} cannot launch steps here: {first_line(error)}"
            if not launching.auto or mode not in SIMPLER:
                hint = f": use launch={SIMPLER[mode]!r}" if mode in SIMPLER else ""
                raise EngineError(f"{why}{hint}") from error
    if why:
        # the step that could not be captured is freed before another is built
        del step
        simpler = Launching(SIMPLER[mode], why, (*launching.missing, why), auto=True)
        return make_engine(decoder, exits, options, simpler, fuse, debug, head)
    taken = max(_reserved(decoder.device) - before, step.nbytes)

    def report() -> LaunchReport:
        return LaunchReport(
            launching.mode,
            launching.reason,
            launching.missing,
            (tree.rows,) if tree is not None else tuple(step["buckets"][1].tolist()),
            taken,
            engine.executor.synchronisations / max(engine.steps, 1),
            tuple(launch.name for launch in launches(step.items)),
        )

    return engine, report


def _engine(
    decoder: Decoder, step: Step, mode: Mode, debug: bool, head: HeadDrafts | None
) -> StepEngine:
    executor: Executor
    engine: Callable[..., StepEngine] = StepEngine
    if "history" in step.buffers:
        leaves = "exit_layer" in step.buffers
        engine = partial(ExitingEngine if leaves else SpeculativeEngine, head=head)
    if decoder.device.type == "cpu":
        interprets = mode == "interpret"
        executor = Interpreter(step) if interprets else HostDriven(step, Flags(), called(step))
        return engine(decoder, step, executor, ResultQueue(step["out"]))
    results = cuda.CudaResultQueue(step["out"])
    # prompts of all lengths use few row counts, compiled before the first one comes
    chunks = decoder.chunks or decoder.buckets[-1:]
    for count in chunks:
        decoder.prepare(count)
    rows = chunks[0]
    if mode == "calls":
        executor = HostDriven(step, cuda.CudaFlags(step.flags), called(step))
        return engine(decoder, step, executor, results, prompt_rows=rows)
    captures = cuda.Captures(step, debug)
    try:
        if mode == "device":
            executor = cuda.DeviceGraph(captures)
        else:
            # without conditionals all launches are one block
            driven = step.flattened() if mode == "predicated" else step
            flags = cuda.CudaFlags(step.flags)
            executor = HostDriven(driven, flags, captures.prepare, captures.close)
    except BaseException:
        # whatever ended it, the captured memory is freed
        captures.close()
        raise
    # warm-up has counted too
    step["counters"].zero_()
    return engine(decoder, step, executor, results, prompt_rows=rows)


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
