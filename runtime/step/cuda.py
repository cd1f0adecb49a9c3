"""Executors for a CUDA device: a step captured by torch, run as one graph or block by block."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from eepass.runtime.step.conditional_graph import Chain, ConditionalGraph
from eepass.runtime.step.data import Conditional, Item, Launch, Step, blocks, launches
from eepass.runtime.step.host import Block, Flags, ResultQueue

# runs before capture, in which compilers tune and libraries allocate their workspaces
WARM_UP = 2


class Captures:
    """Blocks of a step captured into CUDA graphs that share one pool and one stream."""

    def __init__(self, step: Step, debug: bool = False) -> None:
        """``debug``: check at each replay that all buffers have the addresses of the capture."""
        self.step_data, self.debug = step, debug
        self.device = step.flags.device
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.addresses = step.addresses()
        with torch.cuda.device(self.device), torch.no_grad():
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    self._run(launches(step.items))
            current.wait_stream(self._stream)
            torch.cuda.synchronize()
        # what nobody holds any more, older graphs among it, goes before anything is captured
        gc.collect()

    def capture(self, block: Sequence[Launch]) -> torch.cuda.CUDAGraph:
        """``block`` as a graph, neither instantiated nor run."""
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with (
            torch.cuda.device(self.device), torch.cuda.stream(self._stream), torch.no_grad(),
            _undisturbed(),
        ):  # fmt: skip
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._run(block)
            except BaseException:
                # the stream must leave capture mode, even if the capture is already invalid
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        self.graphs.append(graph)
        return graph

    def prepare(self, block: Block) -> Callable[[], None]:
        """``block`` captured, as a call."""
        graph = self.capture(block)
        graph.instantiate()

        def replay() -> None:
            self.check()
            graph.replay()

        return replay

    def check(self) -> None:
        """In debug mode, raise ``StepError`` if a buffer has moved since capture."""
        if self.debug:
            self.step_data.require_addresses(self.addresses)

    def close(self) -> None:
        """Free the graphs' memory, once nothing runs any more."""
        with suppress(RuntimeError):
            torch.cuda.synchronize(self.device)
        for graph in self.graphs:
            with suppress(RuntimeError):
                graph.reset()
        self.graphs.clear()

    def _run(self, block: Sequence[Launch]) -> None:
        for launch in block:
            launch.run(self.step_data.given(launch))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Within, a capture can begin and end.

    A captured product keeps the address of cuBLAS's workspace, which torch allocates once and frees
    when it likes; cleared beforehand, it is allocated by the capture, in the graph's own pool, and
    cleared afterwards nothing outside the graph uses it. The garbage collector waits: it could
    destroy an older graph, which a capture does not survive.
    """
    # a torch without CUDA has none
    from eepass.private_names import clear_cublas_workspaces

    collects = gc.isenabled()
    gc.disable()
    clear_cublas_workspaces()
    try:
        yield
    finally:
        clear_cublas_workspaces()
        if collects:
            gc.enable()


class DeviceGraph:
    """The whole step as one graph whose conditionals are IF nodes: the host launches it and never
    waits."""

    synchronisations = 0

    def __init__(self, captures: Captures) -> None:
        self._captures = captures
        with torch.cuda.device(captures.device):
            self._graph = ConditionalGraph()
            try:
                self._add(captures.step_data.items, self._graph.chain)
                self._graph.instantiate(torch.cuda.current_stream().cuda_stream)
            except BaseException:
                # nothing else frees a half-built graph of the driver's; Ctrl-C may come here too
                self._graph.close()
                raise

    def step(self) -> None:
        self._captures.check()
        with torch.cuda.device(self._captures.device):
            self._graph.launch(torch.cuda.current_stream().cuda_stream)

    def close(self) -> None:
        with suppress(RuntimeError):
            torch.cuda.synchronize(self._captures.device)
        self._graph.close()
        self._captures.close()

    def __del__(self) -> None:
        # nothing else frees a graph of the driver's
        if hasattr(self, "_graph"):
            with suppress(Exception):
                self.close()

    def _add(self, items: Sequence[Item], chain: Chain) -> None:
        for entry in blocks(items):
            if isinstance(entry, Conditional):
                flag = self._captures.step_data[entry.flag]
                self._add(entry.body, chain.branch(flag.data_ptr()))
            else:
                chain.child(self._captures.capture(entry).raw_cuda_graph())


class PinnedCopies:
    """Copies of a tensor in the host's pinned memory, numbered from 1, the last ``slots`` of them.

    They are enqueued behind what was launched before, an event after each.
    """

    def __init__(self, tensor: Tensor, slots: int) -> None:
        self._tensor = tensor
        self._pinned = torch.zeros(slots, tensor.numel(), dtype=tensor.dtype, pin_memory=True)
        self._events = [torch.cuda.Event() for _ in range(slots)]
        self.posted = 0

    def post(self) -> int:
        self.posted += 1
        slot = self.posted % len(self._events)
        self._pinned[slot].copy_(self._tensor, non_blocking=True)
        self._events[slot].record()
        return self.posted

    def wait(self, number: int) -> None:
        self._events[number % len(self._events)].synchronize()

    def __getitem__(self, number: int) -> Tensor:
        return self._pinned[number % len(self._events)]


class CudaFlags(Flags):
    """Flags copied to the host."""

    def __init__(self, flags: Tensor) -> None:
        self._flags, self._copies = flags, PinnedCopies(flags, slots=16)
        self._arrived = 0

    def post(self) -> int:
        return self._copies.post()

    def wait(self, number: int) -> None:
        self._copies.wait(number)
        self._arrived = number
        self.synchronisations += 1

    def known(self, flag: Tensor) -> bool:
        offset = flag.data_ptr() - self._flags.data_ptr()
        return bool(self._copies[self._arrived][offset])


class CudaResultQueue(ResultQueue):
    """Results copied to the host."""

    def __init__(self, out: Tensor) -> None:
        self._copies = PinnedCopies(out, slots=8)
        self._taken = 0

    def post(self) -> None:
        self._copies.post()

    def take(self) -> list[int]:
        self._taken += 1
        self._copies.wait(self._taken)
        found: list[int] = self._copies[self._taken].tolist()
        return found

    def clear(self) -> None:
        self._taken = self._copies.posted
