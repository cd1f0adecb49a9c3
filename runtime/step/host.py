"""Run a step from the host, which reads the flags and launches the bodies whose flag is true.

On a GPU flags arrive with a delay. Where a flag was true and mostly still is, the host launches the
body first and waits for the flag while the body runs: masks keep a body that should not have run
from changing anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from eepass.runtime.step.data import Conditional, Item, Launch, Step, blocks, flag_writers

Block = tuple[Launch, ...]
# a block -> the function that launches it
Prepare = Callable[[Block], Callable[[], None]]


class Flags(Protocol):
    """Copies on the host of flags in a device's memory."""

    synchronisations: int

    def post(self) -> int:
        """Enqueue a copy of the flags behind what was launched; returns the copy's number."""

    def wait(self, number: int) -> None:
        """Wait until copy ``number`` has arrived."""

    def known(self, flag: Tensor) -> bool:
        """The flag's value in the last copy waited for."""


class HostFlags:
    """Flags in the host's own memory, which needs no copies."""

    synchronisations = 0

    def post(self) -> int:
        return 0

    def wait(self, number: int) -> None:
        """Return at once."""

    def known(self, flag: Tensor) -> bool:
        return bool(flag)


class HostDriven:
    """Executes a step block by block; ``close`` frees what ``prepare`` has made."""

    def __init__(
        self, step: Step, flags: Flags, prepare: Prepare, close: Callable[[], None] | None = None
    ) -> None:
        self.step_data, self.flags, self._close = step, flags, close
        self._writers = flag_writers(step)
        self._prepared: dict[Block, Callable[[], None]] = {}
        self._order: dict[tuple[Item, ...], list[Block | Conditional]] = {}
        self._prepare(step.items, prepare)
        # numbers of copies: the last posted, the last waited for, the last before this step
        self._posted = self._arrived = self._begun = 0

    @property
    def synchronisations(self) -> int:
        """How often the host has waited for flags."""
        return self.flags.synchronisations

    def step(self) -> None:
        self._begun = self._posted
        self._run(self.step_data.items)

    def close(self) -> None:
        """Drop what was prepared."""
        self._prepared.clear()
        if self._close is not None:
            self._close()

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
                    self._posted = self.flags.post()

    def _conditional(self, conditional: Conditional) -> None:
        flag, posted = self.step_data[conditional.flag], self._posted
        ahead = conditional.ahead and self._arrived > self._begun
        if not ahead:
            self._wait(posted)
        if self.flags.known(flag):
            self._run(conditional.body)
            # the flags as they were before this body decide on the next one
            self._wait(posted)

    def _wait(self, number: int) -> None:
        if self._arrived < number:
            self.flags.wait(number)
            self._arrived = number


def called(step: Step) -> Prepare:
    """Blocks as plain calls."""

    def prepare(block: Sequence[Launch]) -> Callable[[], None]:
        calls = [(launch.run, step.given(launch)) for launch in block]

        def run() -> None:
            for function, buffers in calls:
                function(buffers)

        return run

    return prepare
