"""Run a step with the host in charge: it reads the flags and launches what they ask for.

Flags come with a delay on a GPU. Where a flag was true and mostly still is, its body is launched
first and the flag waited for afterwards, while the body runs: masks keep a body that should not
have run from doing anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from eepass.runtime.step.data import Conditional, Item, Launch, Step, blocks, flag_writers

Block = tuple[Launch, ...]
# a block -> what launches it
Prepare = Callable[[Block], Callable[[], None]]


class Flags(Protocol):
    """What the host knows of flags in a device's memory."""

    synchronisations: int

    def post(self) -> int:
        """Have the flags as they will then stand sent; the number of this sending."""

    def wait(self, number: int) -> None:
        """Until sending ``number`` is there."""

    def known(self, flag: Tensor) -> bool:
        """The flag in the last sending that is there."""


class PlainFlags:
    """Flags in the host's own memory: always there."""

    synchronisations = 0

    def post(self) -> int:
        return 0

    def wait(self, number: int) -> None:
        """Nothing to wait for."""

    def known(self, flag: Tensor) -> bool:
        return bool(flag)


class HostDriven:
    """Executes a step block by block."""

    def __init__(self, step: Step, flags: Flags, prepare: Prepare) -> None:
        self.step_data, self.flags = step, flags
        self._writers = flag_writers(step)
        self._prepared: dict[Block, Callable[[], None]] = {}
        self._order: dict[tuple[Item, ...], list[Block | Conditional]] = {}
        self._prepare(step.items, prepare)
        # sendings: the last one, the last one heard, the last one before this step
        self._sent = self._heard = self._begun = 0

    @property
    def synchronisations(self) -> int:
        """How often the host waited for flags."""
        return self.flags.synchronisations

    def step(self) -> None:
        self._begun = self._sent
        self._run(self.step_data.items)

    def close(self) -> None:
        """Let go of what was prepared."""
        self._prepared.clear()

    def _prepare(self, items: tuple[Item, ...], prepare: Prepare) -> None:
        self._order[items] = blocks(items, self._writers)
        for entry in self._order[items]:
            if isinstance(entry, Conditional):
                self._prepare(entry.body, prepare)
            else:
                self._prepared[entry] = prepare(entry)

    def _run(self, items: tuple[Item, ...]) -> None:
        for entry in self._order[items]:
            if isinstance(entry, Conditional):
                self._conditional(entry)
            else:
                self._prepared[entry]()
                if entry[-1] in self._writers:
                    self._sent = self.flags.post()

    def _conditional(self, conditional: Conditional) -> None:
        flag, sent = self.step_data[conditional.flag], self._sent
        ahead = conditional.ahead and self._heard > self._begun
        if not ahead:
            self._hear(sent)
        if self.flags.known(flag):
            self._run(conditional.body)
            # what was said before this body decides on the next
            self._hear(sent)

    def _hear(self, sent: int) -> None:
        if self._heard < sent:
            self.flags.wait(sent)
            self._heard = sent


def called(step: Step) -> Prepare:
    """Blocks as plain calls."""

    def prepare(block: Sequence[Launch]) -> Callable[[], None]:
        calls = [(launch.run, step.given(launch)) for launch in block]

        def run() -> None:
            for function, buffers in calls:
                function(buffers)

        return run

    return prepare
