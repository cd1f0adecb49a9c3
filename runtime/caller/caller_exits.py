"""When a step over a caller's cache may exit, and with which logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eepass.exit_rule import among_drafts
from eepass.runtime.decoder.bound_segment import Compile, bind_parameters
from eepass.runtime.exits.exits import Exits, RowState
from eepass.runtime.statistics import Statistics
from eepass.segments import CallerStep, Segment


class CallerWeights:
    """What exits need of a decoder, over the parameters among the tensors of a call."""

    def __init__(self, step: CallerStep, tensors: Sequence[Tensor], compile: Compile) -> None:
        self.splits = {1: step.split}
        self.hidden_size = step.split.hidden_size
        self.dtype = step.split.hidden_example.dtype
        self.tensors = {
            role.name: tensors[place].detach()
            for role, place in step.places.items()
            if role.kind == "parameter"
        }
        self.compile = compile

    def bind(
        self, segment: Segment, extra: Mapping[str, Tensor], examples: Sequence[Tensor]
    ) -> Callable[..., Any]:
        """As ``Decoder.bind``."""
        return bind_parameters(segment, {**self.tensors, **extra}, self.compile, examples)


class CallerExits:
    """When a step may exit, and with which logits [B, 1, V].

    ``full`` maps z [1, n, H] to logits of the whole vocabulary [1, n, V]; without it, logits are
    those of the hot vocabulary and −inf elsewhere.
    """

    def __init__(self, exits: Exits, step: CallerStep, full: Callable[..., Any] | None) -> None:
        self.exits, self.full = exits, full
        self.batch, self.like = step.batch, step.logits
        self.all_rows = list(range(step.batch))
        self.layers = frozenset(exits.thresholds)
        if full is not None:
            # the logits of the last layer are what the caller asked for
            self.layers -= {len(step.split.layers)}
        exits.prepare(self.batch)

    def check(
        self, layer: int, hidden: Tensor, state: RowState, statistics: Statistics
    ) -> tuple[Tensor | None, RowState]:
        """Logits if all rows of hidden [1, B, H] exit after ``layer``."""
        seen: dict[int, Tensor] = {}

        def keep(row: int, logits: Tensor) -> Tensor:
            seen[row] = logits
            return logits.argmax(-1)

        rows = self.all_rows if self.full is None else ()
        choose = {row: partial(keep, row) for row in rows}
        found, state = self.exits.check(layer, hidden, state, self.all_rows, statistics, choose)
        if len(found.tokens) < self.batch:
            return None, state
        if self.full is None:
            hot = torch.cat([seen[row] for row in self.all_rows])
            made = hot.new_full(self.like.shape, -torch.inf, dtype=self.like.dtype)
            made[:, 0, self.exits.hot_ids] = hot.to(made.dtype)
            return made, state
        (logits,) = self.full(torch.stack([found.z[row] for row in self.all_rows])[None])
        if not bool(among_drafts(logits[0].argmax(-1), state.drafts).all()):
            # a cold token is likelier than the hot one that was verified
            statistics.refused += self.batch
            return None, state
        return logits.transpose(0, 1).to(self.like.dtype), state
