"""A decode step with exits in which the cache is a value.

    before   state = cond(done, pass_through, layer_and_predictor, state, ...)       layer by layer
    after    hidden, k, v = branch(done, fill, layer, ...)
             wanted, z    = branch(active & ~done, predict, pass_through, ...)    at exit points
             token, done  = branch(wanted, verify, pass_through, ...)
             return token, exit layer, every layer's k and v

The branches stand in a flat chain, so a predictor that is not active costs nothing, and neither
does verification that nobody asked for. Where a token has left, keys and values are projected from
the boundary it left at (``propagate``) or zero (``drop``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eepass.errors import PassError
from eepass.passes.functional.return_kv_rows import standard
from eepass.passes.functional.value_step import (
    Builder,
    Call,
    Value,
    ValueStep,
    called,
    likeliest,
    others,
    outputs,
    parameters,
    places_in,
)
from eepass.plan import ExitPlan, ExitSegments
from eepass.segments import SplitDecoder


class DecodeStep(ValueStep):
    """One token through a decoder with exits.

    Exits within ``radius`` of one of the last tokens' are active, besides the first ``always`` of
    the plan's ranking; all are before the first token.
    """

    def __init__(
        self, split: SplitDecoder, segments: ExitSegments, plan: ExitPlan, radius: int, always: int
    ) -> None:
        super().__init__(split)
        if plan.kv_policy == "defer":
            raise PassError("one row takes no waiting tokens along: ask for kv propagate or drop")
        if not plan.draft_layer:
            raise PassError("its drafts come from the draft head, which is not in the step's graph")
        self.plan, self.radius = plan, radius
        self.predictors = {n: standard(p) for n, p in segments.predictors.items()}
        self.verify, self.draft = standard(segments.verify), standard(segments.draft)
        self.normed, self.head = standard(segments.normed), split.head.whole
        self.fixed = frozenset(plan.ranking[:always])

    def build(
        self, build: Builder, ids: Value, position: Value, recent: Value, threshold: Value,
        caches: Sequence[Value],
    ) -> list[Value]:  # fmt: skip
        """ids [1, 1], position [1], recent [W], threshold [L + 1], caches -> token [1], exit layer
        [1], recent [W], rows of keys and values.

        ``recent``: the layers the last W tokens left after, 0 where there was none yet. Thresholds
        of 1 and more at every layer mean the dense model; no predictor runs then.
        """
        plan = self.plan
        hidden, values = self._begin(build, ids, position, caches)
        active, wanted = self._active(build, recent, threshold)
        done = build.constant(torch.tensor(False))
        token = build.constant(torch.full((1,), -1))
        exit_layer = build.constant(torch.full((1,), plan.num_layers))
        draft = build.constant(torch.zeros(1, plan.draft_tokens, dtype=torch.long))
        previous = build.constant(torch.zeros(1, plan.draft_tokens))
        rows: list[Value] = []
        for index in range(plan.num_layers):
            boundary = index + 1
            operands = self._operands(build, index, values)
            skipped = self._fill(build, index, hidden, operands)
            hidden, *written = build.branch(done, skipped, self._run(index, hidden, operands))
            rows += written
            if boundary == plan.draft_layer:
                draft = self._drafted(build, wanted, hidden, draft)
            if boundary in self.predictors:
                number = build.constant(torch.full((1,), boundary))
                answer, previous, z = self._predicted(
                    build, boundary, number, active, done, hidden, draft, previous, threshold
                )
                done, token, exit_layer = self._verified(
                    build, number, answer, z, draft, done, token, exit_layer
                )
        token = self._head(build, done, hidden, token)
        (after,) = build.call(Call("remember", _remember, [recent, exit_layer]))
        return [token, exit_layer, after, *rows]

    def _active(self, build: Builder, recent: Value, threshold: Value) -> list[Value]:
        """Which predictors run, bool [L + 1], and whether any does."""
        numbers = range(self.plan.num_layers + 1)
        exits = build.constant(torch.tensor([n in self.predictors for n in numbers]))
        fixed = build.constant(torch.tensor([n in self.fixed for n in numbers]))

        def active(
            recent: Tensor, threshold: Tensor, exits: Tensor, fixed: Tensor
        ) -> Sequence[Tensor]:
            past = recent > 0
            near = (torch.arange(len(numbers))[:, None] - recent).abs() <= self.radius
            chosen = exits & (fixed | (near & past).any(-1) | ~past.any())
            chosen = chosen & (threshold < 1).any()
            return chosen, chosen.any()

        return build.call(Call("active", active, [recent, threshold, exits, fixed]))

    def _fill(
        self, build: Builder, index: int, hidden: Value, operands: Sequence[Value]
    ) -> Call | Sequence[Value]:
        """What a layer leaves behind for a token that left before it."""
        layer, fill = self.split.layers[index], self.split.kv_fills[index]
        if self.plan.kv_policy == "drop":
            rows = [n.meta["val"] for n in layer.graph.graph.output_node().all_input_nodes[1:]]
            holes = (torch.zeros(row.shape, dtype=row.dtype) for row in rows)
            return [hidden, *(build.constant(hole) for hole in holes)]
        roles = others(layer)
        used = [role for role in roles if role in fill.inputs]
        places = places_in(fill, used)

        def project(hidden: Tensor, *given: Tensor) -> Sequence[Tensor]:
            made = fill.graph(*(hidden if p < 0 else given[p] for p in places))
            return [hidden, *outputs(made)]

        given = [operands[roles.index(role)] for role in used]
        return Call(("fill", fill.structure, places), project, [hidden, *given])

    def _drafted(self, build: Builder, wanted: Value, hidden: Value, draft: Value) -> Value:
        names = parameters(self.normed, self.draft)

        def run(hidden: Tensor, hot: Tensor, *given: Tensor) -> Sequence[Tensor]:
            z = called(self.normed, names, given, hidden=hidden)[0]
            ranked = called(self.draft, names, given, hidden=z)[0]
            return [hot[ranked[0].topk(self.plan.draft_tokens, -1).indices]]

        weights = [build.weight(name) for name in ("hot.ids", *names)]
        return build.branch(wanted, Call("draft", run, [hidden, *weights]), [draft])[0]

    def _predicted(
        self, build: Builder, boundary: int, number: Value, active: Value, done: Value,
        hidden: Value, draft: Value, previous: Value, threshold: Value,
    ) -> list[Value]:  # fmt: skip
        segment = self.predictors[boundary]
        names = parameters(segment)

        def ask(active: Tensor, number: Tensor, done: Tensor) -> Sequence[Tensor]:
            return [active.index_select(0, number)[0] & ~done]

        def run(
            hidden: Tensor, draft: Tensor, previous: Tensor, threshold: Tensor, number: Tensor,
            *given: Tensor,
        ) -> Sequence[Tensor]:  # fmt: skip
            probability, now, z = called(
                segment, names, given, hidden=hidden, draft=draft, previous=previous
            )[:3]
            return (probability > threshold.index_select(0, number))[0], now, z

        (asked,) = build.call(Call("ask", ask, [active, number, done]))
        operands = [hidden, draft, previous, threshold, number]
        operands += [build.weight(name) for name in names]
        no = build.constant(torch.tensor(False))
        call = Call(("predict", segment.structure), run, operands)
        return build.branch(asked, call, [no, previous, hidden])

    def _verified(
        self, build: Builder, number: Value, wanted: Value, z: Value, draft: Value, done: Value,
        token: Value, exit_layer: Value,
    ) -> list[Value]:  # fmt: skip
        hot, names = self.plan.verify == "hot", parameters(self.verify)

        def run(
            token: Tensor, exit_layer: Tensor, z: Tensor, draft: Tensor, number: Tensor,
            hot_ids: Tensor, *given: Tensor,
        ) -> Sequence[Tensor]:  # fmt: skip
            answer = likeliest(self.verify, z, names, given)
            answer = hot_ids[answer] if hot else answer
            accepted = (answer[:, None] == draft).any(-1)
            return (
                accepted[0],
                torch.where(accepted, answer, token),
                torch.where(accepted, number, exit_layer),
            )

        weights = [build.weight(name) for name in ("hot.ids", *names)]
        call = Call("verify", run, [token, exit_layer, z, draft, number, *weights])
        return build.branch(wanted, call, [done, token, exit_layer])

    def _head(self, build: Builder, done: Value, hidden: Value, token: Value) -> Value:
        names = parameters(self.head)

        def run(hidden: Tensor, *given: Tensor) -> Sequence[Tensor]:
            return [likeliest(self.head, hidden, names, given)]

        call = Call("head", run, [hidden, *(build.weight(name) for name in names)])
        return build.branch(done, [token], call)[0]


def _remember(recent: Tensor, exit_layer: Tensor) -> Sequence[Tensor]:
    return [torch.cat([recent[1:], exit_layer])]
