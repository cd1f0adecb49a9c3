"""Decode and prompt steps whose KV cache is a value, for formats without memory such as ONNX.

    before   hidden = layer(hidden, side, keys, values, slots)        writes the cache
    after    hidden, k, v = layer(hidden, side, keys, values, slots)
             return token, ..., every layer's k and v

Whoever runs a step writes the new rows of keys and values to its caches. Positions, masks and the
schedule of predictors are computed in the graph, before the layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eepass.errors import PassError
from eepass.exit_rule import SCHEDULE_RADIUS, near_last_exits
from eepass.masks import causal_mask_at
from eepass.passes.exits.exit_chain import ExitChain
from eepass.passes.exits.step_builder import Builder, Call, StepCalls, Value
from eepass.passes.functional.return_kv_rows import (
    return_kv_rows,
    row_inputs,
    with_standard_operators,
)
from eepass.plan import ExitPlan, ExitSegments
from eepass.segments import Input, SplitDecoder


class FunctionalStep:
    """What both steps share; ``caches``: the roles of the keys and values they take, in order.

    Rows of keys and values come out in the same order.
    """

    def __init__(self, split: SplitDecoder) -> None:
        if split.stepwise:
            raise PassError("its recurrent states are overwritten in place, token by token")
        self.split = return_kv_rows(split)
        self.caches = [role for layer in self.split.layers for role in row_inputs(layer)]
        written = [role for fill in self.split.kv_fills for role in row_inputs(fill)]
        if written != self.caches or len(set(written)) != len(written):
            raise PassError("its layers share keys and values, or write them in several places")

    def empty_caches(self) -> list[Tensor]:
        like = [layer.examples[role] for layer in self.split.layers for role in row_inputs(layer)]
        return [torch.zeros(each.shape, dtype=each.dtype) for each in like]

    def _inputs(
        self, build: Builder, ids: Value, first: Value, caches: Sequence[Value]
    ) -> dict[Input, Value]:
        """What segments read for rows from position ``first`` on."""
        split = self.split
        dtype = split.hidden_example.dtype

        def place(first: Tensor) -> Sequence[Tensor]:
            positions = first + torch.arange(split.rows)
            masks = (
                causal_mask_at(positions, split.cache_length, window, dtype)
                for window in split.windows.values()
            )
            return [positions, positions[None], *masks]

        slots, positions, *masks = build.call(Call("place", place, [first]))
        roles = (role for layer in split.layers for role in layer.inputs)
        found = {role: slots for role in roles if role.kind == "slots"}
        found |= zip((Input("mask", name) for name in split.windows), masks, strict=True)
        found |= zip(self.caches, caches, strict=True)
        return {**found, Input("ids", "ids"): ids, Input("positions", "positions"): positions}


class FunctionalDecodeStep(FunctionalStep):
    """One token through a decoder with exits: the schedule, then the exit chain.

    ``always``: the first so many exits of the plan's ranking are active for every token, besides
    those near the exit layers of the last tokens; before the first token all are. None: all exits
    are active for every token.
    """

    def __init__(
        self, split: SplitDecoder, segments: ExitSegments, plan: ExitPlan, always: int | None
    ) -> None:
        super().__init__(split)
        if plan.kv_policy == "defer":
            raise PassError("a step of one row cannot catch up: ask for kv propagate or drop")
        if not plan.draft_layer:
            raise PassError("its drafts come from the draft head, which is not in the step's graph")
        self.plan = plan
        self.segments = ExitSegments(
            {n: with_standard_operators(p) for n, p in segments.predictors.items()},
            *map(with_standard_operators, (segments.verify, segments.draft, segments.normed)),
        )
        self.fixed = frozenset(segments.predictors if always is None else plan.ranking[:always])

    def build(
        self, build: Builder, ids: Value, position: Value, recent: Value, threshold: Value,
        caches: Sequence[Value],
    ) -> list[Value]:  # fmt: skip
        """ids [1, 1], position [1], recent [W], threshold [L + 1], caches -> token [1], exit layer
        [1], recent [W], rows of keys and values.

        ``recent``: the exit layers of the last W tokens, 0 where there was none yet. Thresholds of
        1 and more at every layer mean the dense model; no predictor runs then.
        """
        inputs = self._inputs(build, ids, position, caches)
        chain = ExitChain(build, self.split, self.segments, self.plan, inputs.__getitem__)
        draft = build.constant(torch.zeros(1, self.plan.draft_tokens, dtype=torch.long))
        active = self._active(build, recent, threshold)
        token, exit_layer, _, rows = chain.write(active, threshold, draft)

        def remember(recent: Tensor, exit_layer: Tensor) -> Sequence[Tensor]:
            return [torch.cat([recent[1:], exit_layer])]

        (recent,) = build.call(Call("remember", remember, [recent, exit_layer]))
        return [token, exit_layer, recent, *rows]

    def _active(self, build: Builder, recent: Value, threshold: Value) -> Value:
        """Which predictors run, bool [L + 1]."""
        layers = range(self.plan.num_layers + 1)

        def active(
            recent: Tensor, threshold: Tensor, exits: Tensor, fixed: Tensor
        ) -> Sequence[Tensor]:
            past = recent > 0
            far = torch.full_like(recent, -1 - SCHEDULE_RADIUS)
            near = near_last_exits(torch.arange(len(layers)), torch.where(past, recent, far))
            chosen = exits & (fixed | near | ~past.any())
            return [chosen & (threshold < 1).any()]

        exits, fixed = (
            build.constant(torch.tensor([n in chosen for n in layers]))
            for chosen in (self.segments.predictors, self.fixed)
        )
        return build.call(Call("active", active, [recent, threshold, exits, fixed]))[0]


class FunctionalPromptStep(FunctionalStep):
    """R tokens of a prompt; ``one`` is the decoder split for one row, whose head is used."""

    def __init__(self, split: SplitDecoder, one: SplitDecoder) -> None:
        super().__init__(split)
        self.head = one.head.whole

    def build(
        self, build: Builder, ids: Value, start: Value, last: Value, caches: Sequence[Value]
    ) -> list[Value]:
        """ids [1, R], start [1], last [1], caches -> the token after row ``last`` [1], rows of
        keys and values. Rows stand at ``start`` and after; what follows ``last`` is padding."""
        inputs = self._inputs(build, ids, start, caches)
        step = StepCalls(build, self.split, inputs.__getitem__)
        hidden = step.begin()
        rows: list[Value] = []
        for index in range(len(self.split.layers)):
            hidden, *new = build.call(step.layer(index, hidden))
            rows += new

        def row(hidden: Tensor, last: Tensor) -> Sequence[Tensor]:
            return [hidden.index_select(1, last)]

        (hidden,) = build.call(Call("last_row", row, [hidden, last]))
        return [*build.call(step.head(hidden, self.head)), *rows]
