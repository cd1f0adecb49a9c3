"""How tokens come from a device to the host: a step behind, without making the device wait."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from torch import Tensor


class Outbox(Protocol):
    """Sends what a step found to the host."""

    def post(self) -> None:
        """Send the result of the step launched last."""

    def take(self) -> tuple[int, int]:
        """The oldest result not taken: token and exit layer; waits for it."""

    def clear(self) -> None:
        """Forget what was sent and not taken."""


class PlainOutbox:
    """Results in the host's own memory."""

    def __init__(self, out: Tensor) -> None:
        self._out, self._sent = out, deque[Tensor]()

    def post(self) -> None:
        self._sent.append(self._out.clone())

    def take(self) -> tuple[int, int]:
        token, layer = self._sent.popleft().tolist()
        return token, layer

    def clear(self) -> None:
        self._sent.clear()
