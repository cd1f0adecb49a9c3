"""``torch.cuda`` as far as capturing a step needs it, without a device.

A capture keeps the block it is given instead of running it, as a device does; a replay runs it on
the CPU. ``events`` tells the order: (what, detail, whether the garbage collector is on).
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import ClassVar

import torch

from eepass.runtime.step import cuda, launching


class FakeGraph:
    """A ``torch.cuda.CUDAGraph``; ``failing``: a capture raises as torch does."""

    made: ClassVar[dict[int, FakeGraph]] = {}
    capturing: ClassVar[FakeGraph | None] = None
    events: ClassVar[list[tuple[str, object, bool]]] = []
    failing: ClassVar[bool] = False

    def __init__(self, keep_graph: bool = False) -> None:
        self.number, self.block = 4096 + len(self.made), ()
        self.made[self.number] = self

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        note("begin", (self.number, pool, capture_error_mode))
        FakeGraph.capturing = self

    def capture_end(self) -> None:
        FakeGraph.capturing = None
        note("end", self.number)

    def raw_cuda_graph(self) -> int:
        return self.number

    def instantiate(self) -> None:
        note("instantiate", self.number)

    def replay(self) -> None:
        for run, buffers in self.block:
            run(buffers)

    def reset(self) -> None:
        self.block = ()


class Stream:
    cuda_stream = 7

    def wait_stream(self, other: Stream) -> None: ...


class Event:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Elsewhere:
    """A decoder that says it is on a device; all of it stays on the CPU."""

    device = torch.device("cuda")

    def __init__(self, decoder) -> None:
        self._decoder = decoder

    def __getattr__(self, name):
        return getattr(self._decoder, name)


def note(what: str, detail: object = None) -> None:
    FakeGraph.events.append((what, detail, gc.isenabled()))


def install(patch) -> None:
    """Replace what captures call, with ``patch(object, name, value)``."""
    stream = Stream()
    for name, value in {
        "CUDAGraph": FakeGraph, "Stream": lambda: stream, "current_stream": lambda: stream,
        "graph_pool_handle": lambda: "pool", "Event": Event,
        "device": lambda device: nullcontext(), "stream": lambda stream: nullcontext(),
        "synchronize": lambda device=None: None,
    }.items():  # fmt: skip
        patch(torch.cuda, name, value)
    patch(torch._C, "_cuda_clearCublasWorkspaces", lambda: note("clear"))
    zeros, engine, collect = torch.zeros, launching._engine, gc.collect

    def collected(*given):
        note("collect")
        return collect(*given)

    def pageable(*shape, pin_memory=False, **options):
        return zeros(*shape, **options)

    def run(self, block):
        graph = FakeGraph.capturing
        if graph is None:
            for launch in block:
                launch.run(self.step_data.given(launch))
            return
        if FakeGraph.failing:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\n...")
        note("capture", tuple(launch.name for launch in block))
        graph.block = tuple((launch.run, self.step_data.given(launch)) for launch in block)

    patch(gc, "collect", collected)
    patch(torch, "zeros", pageable)
    patch(cuda.Captures, "_run", run)
    patch(launching, "_engine", lambda decoder, *given: engine(Elsewhere(decoder), *given))
