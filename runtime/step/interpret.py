"""Run a step on the CPU and check each launch: order, addresses, overlap, declared accesses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eepass.runtime.step.data import Item, Launch, Step, StepError, check_step

# fills integer buffers before they are written: no token, slot or sum of such has this value
POISON = -(2**52) - 12345


class Interpreter:
    """Executes a step launch by launch; raises ``StepError`` where one is not as it is declared.

    ``watch``: also compare every buffer a launch did not declare, before and after.
    """

    synchronisations = 0

    def __init__(self, step: Step, watch: bool = True) -> None:
        check_step(step)
        self.step_data, self.watch = step, watch
        self.addresses = step.addresses()
        self.ran: list[str] = []

    def step(self) -> None:
        """Run one step; ``ran`` then holds the names of its launches."""
        self.step_data.require_addresses(self.addresses)
        self.ran = []
        for buffer in self.step_data.wholes:
            if buffer.life == "step":
                poison(buffer.tensor)
        self._run(self.step_data.items)

    def close(self) -> None:
        """There is nothing to free."""

    def _run(self, items: Sequence[Item]) -> None:
        for item in items:
            if isinstance(item, Launch):
                self._launch(item)
            elif bool(self.step_data[item.flag]):
                self._run(item.body)

    def _launch(self, launch: Launch) -> None:
        step = self.step_data
        for name in launch.reads:
            if poisoned(step[name]):
                raise StepError(f"{launch.name} reads {name}, which this step has not written")
        written_only = [step.buffers[n] for n in launch.writes if n not in launch.reads]
        for buffer in written_only:
            poison(buffer.tensor)
        declared = {step.base(name) for name in launch.writes}
        others = [b for b in step.wholes if b.name not in declared] if self.watch else []
        before = [_bits(buffer.tensor).clone() for buffer in others]
        launch.run(step.given(launch))
        for buffer, was in zip(others, before, strict=True):
            if not torch.equal(_bits(buffer.tensor), was):
                raise StepError(f"{launch.name} writes {buffer.name}, which it does not declare")
        self.ran.append(launch.name)
        step.require_addresses(self.addresses)
        for buffer in written_only:
            if poisoned(buffer.tensor):
                raise StepError(f"{launch.name} leaves {buffer.name} unwritten, or reads it first")


def poison(tensor: Tensor) -> None:
    """Fill with a value no launch writes; flags, which have no such value, with true."""
    if tensor.dtype == torch.bool:
        tensor.fill_(True)
    else:
        tensor.fill_(torch.nan if tensor.is_floating_point() else POISON)


def poisoned(tensor: Tensor) -> bool:
    """Whether any number is still the one ``poison`` wrote."""
    if tensor.dtype == torch.bool:
        return False
    found = tensor.isnan() if tensor.is_floating_point() else tensor == POISON
    return bool(found.any())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor
