"""How an engine decodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eepass.runtime.drafting.planner import Mode


@dataclass(frozen=True, slots=True)
class Options:
    """How an engine decodes. ``pending_limit`` bounds a sequence's pending tokens; ``modes`` are
    the ways of decoding the planner may choose from, the plainest first."""

    guarantee: Literal["exact", "approximate"] = "approximate"
    kv_policy: Literal["defer", "propagate", "drop"] = "defer"
    pending_limit: int = 7
    modes: tuple[Mode, ...] = ("dense",)
