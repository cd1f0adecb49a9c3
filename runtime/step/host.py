"""Run a step from the host, which reads the flags and launches the bodies whose flag is true.

On a GPU flags arrive with a delay. Where a flag was true and mostly still is, the host launches the
body first and waits for the flag while the body runs: masks keep a body that should not have run
from changing anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from eepass.runtime.step.data import Conditional, Item, Launch, Step, blocks, flag_writers

Block = tuple[Launch, ...]
# a block -> the function that launches it
Prepare = Callable[[Block], Callable[[], None]]
# a block's function and whether the block writes flags, or a conditional and its prepared body
Prepared = list[tuple[Callable[[], None] | Conditional, Any]]


class Flags:
    """Flags as the host knows them: here in its own memory, which needs no copies."""

    synchronisations = 0

    def post(self) -> int:
        """Enqueue a copy of the flags behind what was launched; returns the copy's number."""
        return 0

    def wait(self, number: int) -> None:
        """Wait until copy ``number`` has arrived."""

    def known(self, flag: Tensor) -> bool:
        """The flag's value in the last copy waited for."""
        return bool(flag)


class ResultQueue:
    """Results of steps, each copied while later steps run: here within the host's own memory."""

    def __init__(self, out: Tensor) -> None:
        self._out, self._sent = out, deque[Tensor]()

    def post(self) -> None:
        """Enqueue the result of the step launched last."""
        self._sent.append(self._out.clone())

    def take(self) -> list[int]:
        """Wait for the oldest result and remove it."""
        found: list[int] = self._sent.popleft().tolist()
        return found

    def clear(self) -> None:
        """Drop all results."""
        self._sent.clear()


class HostDriven:
    """Executes a step block by block; ``close`` frees what ``prepare`` has made."""

    def __init__(
        self, step: Step, flags: Flags, prepare: Prepare, close: Callable[[], None] | None = None
    ) -> None:
        self.step_data, self.flags, self._close = step, flags, close
        self._prepared = self._prepare(step.items, prepare, flag_writers(step))
        # numbers of copies: the last posted, the last waited for, the last before this step
        self._posted = self._arrived = self._begun = 0

    @property
    def synchronisations(self) -> int:
        """How often the host has waited for flags."""
        return self.flags.synchronisations

    def step(self) -> None:
        self._begun = self._posted
        self._run(self._prepared)

    def close(self) -> None:
        """Drop what was prepared."""
        self._prepared.clear()
        if self._close is not None:
            self._close()

    def _prepare(
        self, items: tuple[Item, ...], prepare: Prepare, writers: Collection[Launch]
    ) -> Prepared:
        prepared: Prepared = []
        for entry in blocks(items, writers):
            if isinstance(entry, Conditional):
                prepared.append((entry, self._prepare(entry.body, prepare, writers)))
            else:
                prepared.append((prepare(entry), entry[-1] in writers))
        return prepared

    def _run(self, prepared: Prepared) -> None:
        for entry, detail in prepared:
            if isinstance(entry, Conditional):
                self._conditional(entry, detail)
            else:
                entry()
                if detail:
                    self._posted = self.flags.post()

    def _conditional(self, conditional: Conditional, body: Prepared) -> None:
        flag, posted = self.step_data[conditional.flag], self._posted
        ahead = conditional.ahead and self._arrived > self._begun
        if not ahead:
            self._wait(posted)
        if self.flags.known(flag):
            self._run(body)
            # the flags as they were before this body decide on the next one
            self._wait(posted)

    def _wait(self, number: int) -> None:
        if self._arrived < number:
            self.flags.wait(number)
            self._arrived = number


def called(step: Step) -> Prepare:
    """Blocks as plain calls."""

    def prepare(block: Block) -> Callable[[], None]:
        calls = [(launch.run, step.given(launch)) for launch in block]

        def run() -> None:
            for function, buffers in calls:
                function(buffers)

        return run

    return prepare
