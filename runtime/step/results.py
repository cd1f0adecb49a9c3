"""Bring tokens from the device to the host without making the device wait."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from torch import Tensor


class ResultQueue(Protocol):
    """A queue of step results, each copied to the host while later steps run."""

    def post(self) -> None:
        """Enqueue the result of the step launched last."""

    def take(self) -> tuple[int, int]:
        """Wait for the oldest result and remove it: token and exit layer."""

    def clear(self) -> None:
        """Drop all results."""


class HostResultQueue:
    """ResultQueue in the host's own memory."""

    def __init__(self, out: Tensor) -> None:
        self._out, self._sent = out, deque[Tensor]()

    def post(self) -> None:
        self._sent.append(self._out.clone())

    def take(self) -> tuple[int, int]:
        token, layer = self._sent.popleft().tolist()
        return token, layer

    def clear(self) -> None:
        self._sent.clear()
