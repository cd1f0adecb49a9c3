"""One decode step as data: buffers, launches that read and write them, conditionals over launches.

Every executor runs the same data: the interpreter, host-driven segments, one CUDA graph. A launch
may touch the buffers it names and constants (weights), nothing else. **A launch in a body changes
nothing if its flag is false, provided that the flag has been true since the step began or that no
other body does the same work**: masks decide what is written, conditionals only save time. So a
body may be launched before its flag is known, or always.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

Buffers = Mapping[str, Tensor]
Life = Literal["kept", "step"]
Owner = Literal["step", "cache"]


class StepError(RuntimeError):
    """The step's data contradict themselves, or a launch did something it did not declare."""


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """Memory at a fixed address. ``life``: ``kept`` from step to step, or written anew in each
    ``step`` before it is read. ``owner``: who allocated it. ``base``: the buffer it is part of."""

    name: str
    tensor: Tensor
    life: Life
    owner: Owner = "step"
    base: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """``run`` gets the buffers it ``reads`` and ``writes``, by name. A buffer it only writes it
    writes whole."""

    name: str
    run: Callable[[Buffers], None]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Conditional:
    """``body`` runs where ``flag``, a bool [1], is true when it is reached.

    ``ahead``: within a step the flag can only become false, and mostly it stays true: a host that
    has read it as true launches the body without waiting for its newest value.
    """

    flag: str
    body: tuple[Item, ...]
    ahead: bool = False


Item = Launch | Conditional


@dataclass(slots=True)
class Step:
    """What one decode step launches, in order. ``constants``: weights by name, only read.
    ``flags``: the memory all flags lie in, bool [F]."""

    buffers: dict[str, Buffer]
    items: tuple[Item, ...]
    flags: Tensor
    constants: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.buffers[name].tensor

    def given(self, launch: Launch) -> dict[str, Tensor]:
        """The buffers a launch may touch."""
        return {name: self[name] for name in (*launch.reads, *launch.writes)}

    def base(self, name: str) -> str:
        return self.buffers[name].base or name

    @property
    def wholes(self) -> list[Buffer]:
        """Buffers that are no part of another."""
        return [buffer for buffer in self.buffers.values() if not buffer.base]

    @property
    def nbytes(self) -> int:
        """Memory of the step's own buffers, in bytes."""
        return sum(b.tensor.nbytes for b in self.wholes if b.owner == "step")

    def flattened(self) -> Step:
        """The same step without conditionals: every launch runs, and masks keep those whose flag
        is false from changing anything."""
        return replace(self, items=tuple(launches(self.items)))

    def addresses(self) -> dict[str, int]:
        """The addresses of buffers and constants."""
        found = {name: buffer.tensor.data_ptr() for name, buffer in self.buffers.items()}
        return found | {f"constant {n}": t.data_ptr() for n, t in self.constants.items()}

    def require_addresses(self, known: Mapping[str, int]) -> None:
        """Raise ``StepError`` naming what has moved."""
        moved = [name for name, at in self.addresses().items() if known.get(name) != at]
        if moved:
            raise StepError(f"{', '.join(moved[:3])}: no longer at the address of the capture")


def walk(items: Sequence[Item]) -> Iterator[Item]:
    """All items, those in bodies too, in order."""
    for item in items:
        yield item
        if isinstance(item, Conditional):
            yield from walk(item.body)


def launches(items: Sequence[Item]) -> list[Launch]:
    """All launches, those in bodies too, in order."""
    return [item for item in walk(items) if isinstance(item, Launch)]


def blocks(
    items: Sequence[Item], ends: Collection[Launch] = ()
) -> list[tuple[Launch, ...] | Conditional]:
    """``items`` with consecutive launches grouped into blocks; a launch in ``ends`` ends one."""
    found: list[tuple[Launch, ...] | Conditional] = []
    together: list[Launch] = []
    for item in items:
        if isinstance(item, Launch):
            together.append(item)
        if together and (isinstance(item, Conditional) or item in ends):
            found.append(tuple(together))
            together = []
        if isinstance(item, Conditional):
            found.append(item)
    return [*found, tuple(together)] if together else found


def flag_writers(step: Step) -> frozenset[Launch]:
    """The launches that write the flag of a conditional."""
    flags = {step.base(item.flag) for item in walk(step.items) if isinstance(item, Conditional)}
    return frozenset(
        launch for launch in launches(step.items) if flags & set(map(step.base, launch.writes))
    )


def check_step(step: Step) -> None:
    """Raise ``StepError`` where a name is unknown, a flag is not a bool [1], buffers overlap, or a
    buffer is read that was not written on every path there."""
    _check_overlap(step)
    _check_order(step, step.items, {b.name for b in step.wholes if b.life == "kept"})


def _check_order(step: Step, items: Sequence[Item], written: set[str]) -> None:
    for item in items:
        who = item.name if isinstance(item, Launch) else f"the conditional on {item.flag}"
        for name in item.reads if isinstance(item, Launch) else [item.flag]:
            if name not in step.buffers:
                raise StepError(f"{who} reads {name}, which is no buffer")
            if step.base(name) not in written:
                raise StepError(f"{who} reads {name} before anything wrote it")
        if isinstance(item, Conditional):
            flag = step[item.flag]
            if flag.dtype != torch.bool or flag.numel() != 1:
                raise StepError(f"{item.flag} is no flag: {flag.dtype} {list(flag.shape)}")
            # what a body writes counts as written within that body alone
            _check_order(step, item.body, set(written))
        else:
            for name in item.writes:
                if name not in step.buffers:
                    raise StepError(f"{item.name} writes {name}, which is no buffer")
                written.add(step.base(name))


def _check_overlap(step: Step) -> None:
    spans = {buffer.name: _span(buffer.tensor) for buffer in step.wholes}
    for buffer in step.buffers.values():
        if buffer.base:
            begin, end = _span(buffer.tensor)
            whole = spans.get(buffer.base)
            if whole is None or begin < whole[0] or end > whole[1]:
                raise StepError(f"{buffer.name} does not lie within {buffer.base}")
    fixed = {f"constant {name}": _span(tensor) for name, tensor in step.constants.items()}
    last, reached = "", -1
    for name, (begin, end) in sorted({**spans, **fixed}.items(), key=lambda item: item[1]):
        # tied weights overlap, and are only read
        if begin < reached and not (name in fixed and last in fixed):
            raise StepError(f"{name} and {last} overlap")
        if end > reached:
            last, reached = name, end


def _span(tensor: Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    if not tensor.numel():
        return begin, begin
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (reach + 1) * tensor.element_size()
