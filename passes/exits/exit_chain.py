"""The decode step with exits, described once for every graph format.

    before   hidden = layer(hidden)                                         for each layer
             token = argmax(head(hidden))
    after    hidden = branch(done, fill, layer)                             for each layer
             draft = branch(any active, draft, -)                           after the draft layer
             wanted, previous, z = branch(active & ~done, predict, -)       at each exit point
             done, token, exit_layer = branch(wanted, verify, -)            at each exit point
             token = branch(done, -, head)

The branches form a flat chain, none inside another. What a token does not need does not run: layers
after its exit, predictors that are not active, verification that no predictor asked for.

A layer either writes its keys and values in place or returns their rows; ``fill`` is what stands in
for a skipped layer and does the same. With KV policy ``propagate`` it projects keys and values from
the hidden state at the exit. With ``defer`` and ``drop`` it does nothing (returned rows are zero):
with ``defer`` whoever runs the graph runs the skipped layers later, from the hidden state at the
exit; with ``drop`` nobody does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from eepass.exit_rule import among_drafts, wants_exit
from eepass.passes.exits.step_builder import Builder, Call, StepCalls, Value, called, likeliest
from eepass.plan import ExitPlan, ExitSegments
from eepass.segments import Input, SplitDecoder


class ExitChain(StepCalls):
    """One token through a decoder with the exits of ``plan``."""

    def __init__(
        self, build: Builder, split: SplitDecoder, segments: ExitSegments, plan: ExitPlan,
        value_of: Callable[[Input], Value],
    ) -> None:  # fmt: skip
        super().__init__(build, split, value_of)
        self.segments, self.plan = segments, plan

    def write(
        self, active: Value, threshold: Value, draft: Value
    ) -> tuple[Value, Value, Value, list[Value]]:
        """active bool [L + 1] and threshold float32 [L + 1] by exit layer; draft int64 [1, K]:
        the draft tokens, unless they are taken from a hidden state on the way. Returns token [1],
        exit_layer [1], the hidden state at the exit [1, 1, H], and the rows of keys and values
        where layers return them."""
        build, plan = self.build, self.plan
        hidden = self.begin()
        done = build.constant(torch.tensor(False))
        token = build.constant(torch.full((1,), -1))
        exit_layer = build.constant(torch.full((1,), plan.num_layers))
        previous = build.constant(torch.zeros(1, plan.draft_tokens))
        rows: list[Value] = []
        for index in range(plan.num_layers):
            skipped = self._fill(index, hidden)
            hidden, *new = build.branch(done, skipped, self.layer(index, hidden))
            rows += new
            if index + 1 == plan.draft_layer:
                draft = self._draft(active, hidden, draft)
            if index + 1 in self.segments.predictors:
                number = build.constant(torch.full((1,), index + 1))
                wanted, previous, z = self._predict(
                    index + 1, number, active, threshold, done, hidden, draft, previous
                )
                verify = self._verify(number, z, draft, token, exit_layer)
                done, token, exit_layer = build.branch(wanted, verify, [done, token, exit_layer])
        (token,) = build.branch(done, [token], self.head(hidden, self.split.head.whole))
        return token, exit_layer, hidden, rows

    def _fill(self, index: int, hidden: Value) -> Call | Sequence[Value]:
        """What stands in for a layer that is skipped."""
        fill = self.split.kv_fills[index]
        rows = [node.meta["val"] for node in self.split.layers[index].outputs[1:]]
        if self.plan.kv_policy != "propagate":
            zeros = (torch.zeros(row.shape, dtype=row.dtype) for row in rows)
            return [hidden, *map(self.build.constant, zeros)]

        def project(given: Mapping[Input, Tensor], hidden: Tensor) -> Sequence[Tensor]:
            written = called(fill, given, hidden)
            return [hidden, *(written if rows else ())]

        return self.reading("fill", [fill], project, hidden)

    def _draft(self, active: Value, hidden: Value, draft: Value) -> Value:
        normed, logits = self.segments.normed, self.segments.draft

        def run(given: Mapping[Input, Tensor], hidden: Tensor, hot: Tensor) -> Sequence[Tensor]:
            (z,) = called(normed, given, hidden)
            (ranked,) = called(logits, given, z)
            return [hot[ranked[0].topk(self.plan.draft_tokens, -1).indices]]

        (needed,) = self.build.call(Call("any_active", lambda active: [active.any()], [active]))
        hot = self.build.weight("hot.ids")
        call = self.reading("draft", [normed, logits], run, hidden, hot)
        return self.build.branch(needed, call, [draft])[0]

    def _predict(
        self, layer: int, number: Value, active: Value, threshold: Value, done: Value,
        hidden: Value, draft: Value, previous: Value,
    ) -> list[Value]:  # fmt: skip
        """Whether the token wants to exit; the draft's probabilities; the normed state z."""
        predictor = self.segments.predictors[layer]

        def run(
            given: Mapping[Input, Tensor], number: Tensor, threshold: Tensor, hidden: Tensor,
            draft: Tensor, previous: Tensor,
        ) -> Sequence[Tensor]:  # fmt: skip
            probability, probabilities, z = called(
                predictor, given, hidden, draft=draft, previous=previous
            )[:3]
            wanted = wants_exit(probability, threshold.index_select(0, number))
            return wanted[0], probabilities, z

        def is_needed(active: Tensor, number: Tensor, done: Tensor) -> Sequence[Tensor]:
            return [active.index_select(0, number)[0] & ~done]

        (needed,) = self.build.call(Call("is_needed", is_needed, [active, number, done]))
        operands = [number, threshold, hidden, draft, previous]
        call = self.reading("predict", [predictor], run, *operands)
        no = self.build.constant(torch.tensor(False))
        return self.build.branch(needed, call, [no, previous, hidden])

    def _verify(
        self, number: Value, z: Value, draft: Value, token: Value, exit_layer: Value
    ) -> Call:
        """Whether the token exits, which it is, and its exit layer."""
        verify, hot = self.segments.verify, self.plan.verify == "hot"

        def run(
            given: Mapping[Input, Tensor], number: Tensor, z: Tensor, draft: Tensor,
            token: Tensor, exit_layer: Tensor, *hot_ids: Tensor,
        ) -> Sequence[Tensor]:  # fmt: skip
            best = likeliest(verify, given, z)
            verified = hot_ids[0][best] if hot else best
            exits = among_drafts(verified, draft)
            token = torch.where(exits, verified, token)
            return exits[0], token, torch.where(exits, number, exit_layer)

        hot_ids = [self.build.weight("hot.ids")] if hot else []
        operands = [number, z, draft, token, exit_layer, *hot_ids]
        return self.reading("verify", [verify], run, *operands)
