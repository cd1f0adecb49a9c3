"""What decoding remembers of a cache that is not its own, and when that no longer holds.

A cache may be reset, cropped, reordered, filled anew or freed between two steps without notice.
Every such change is a write, and tensors count their writes: what was remembered holds only if
nothing was written since the step that remembered it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from eepass.runtime.caller.caller_decoder import DeferredToken
from eepass.runtime.exits.scheduler import PredictorSchedule
from eepass.runtime.statistics import Statistics


@dataclass(slots=True)
class CacheState:
    """Of one cache: the schedule of its predictors, its statistics, the tokens the deeper layers
    have not seen, its count of writes."""

    schedule: PredictorSchedule | None
    statistics: Statistics
    pending: list[DeferredToken] = field(default_factory=list)
    written: tuple[int, ...] = ()


class CacheStates:
    """One ``CacheState`` for each cache alive; a cache goes by its first tensor."""

    def __init__(self) -> None:
        self._states = WeakTensorKeyDictionary()
        self._lock = threading.Lock()

    def take(self, cache: Sequence[Tensor], fresh: Callable[[], CacheState]) -> CacheState:
        """The state of ``cache``; a new one if anyone wrote to it since ``keep``."""
        with self._lock:
            state = self._states.get(cache[0])
        if state is None or not state.written or state.written != _writes(cache):
            return fresh()
        return state

    def keep(self, cache: Sequence[Tensor], state: CacheState) -> None:
        """Remember ``state`` after a step that wrote to ``cache``."""
        if not cache[0].is_inference():
            # compiled code writes past the counters, and others go by them too
            torch.autograd.graph.increment_version(cache)
        state.written = _writes(cache)
        with self._lock:
            self._states[cache[0]] = state


def _writes(cache: Sequence[Tensor]) -> tuple[int, ...]:
    # tensors of inference mode do not count: nothing is remembered of them
    return () if cache[0].is_inference() else tuple(tensor._version for tensor in cache)
