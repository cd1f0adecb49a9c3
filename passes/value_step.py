"""A decode step and a prompt step in which the cache is a value: what formats without memory need.

    before   state = cond(done, pass_through, layer_and_predictor, state, ...)       layer by layer
    after    hidden, k, v = cond(done, fill, layer, ...)
             wanted, z    = cond(active & ~done, predict, pass_through, ...)      at exit points
             token, done  = cond(wanted, verify, pass_through, ...)
             return token, exit layer, every layer's k and v

The conditions stand in a flat chain, so a predictor that is not active costs nothing, and neither
does verification that nobody asked for. New keys and values are written by whoever runs the step;
where a token has left, they are projected from the boundary it left at (``propagate``) or zero
(``drop``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eepass.passes.report import PassError
from eepass.passes.return_kv_rows import return_kv_rows, row_inputs, standard
from eepass.plan import ExitPieces, ExitPlan, Input, Piece, SplitDecoder, causal_mask_at

cond = torch.ops.higher_order.cond
Values = Mapping[tuple[str, str], Tensor]


class _ValueStep(torch.nn.Module):
    """``split`` and its tensors, as buffers; ``names``: what each buffer is called outside.

    ``caches``: the roles of the keys and values the step takes, in order; it returns their rows in
    the same order.
    """

    def __init__(self, split: SplitDecoder) -> None:
        super().__init__()
        if split.stepwise:
            raise PassError("its recurrent states are overwritten in place, token by token")
        self.split = return_kv_rows(split)
        self.names: dict[str, str] = {}
        self._buffer_of: dict[str, str] = {}
        self.caches = [role for layer in self.split.layers for role in row_inputs(layer)]
        kept = [role for fill in self.split.kv_fills for role in row_inputs(fill)]
        if kept != self.caches or len(set(kept)) != len(kept):
            raise PassError("its layers share keys and values, or write them in several places")

    def examples(self) -> list[Tensor]:
        """Empty caches."""
        shapes = {}
        for layer in self.split.layers:
            placeholders = layer.graph.graph.find_nodes(op="placeholder")
            for role, node in zip(layer.inputs, placeholders, strict=True):
                shapes[role] = node.meta["val"]
        return [torch.zeros(shapes[c].shape, dtype=shapes[c].dtype) for c in self.caches]

    def keep(self, pieces: Sequence[Piece], tensors: Mapping[str, Tensor]) -> None:
        for piece in pieces:
            for role in piece.inputs:
                if role.kind == "parameter":
                    self.keep_tensor(role.name, tensors[role.name])

    def keep_tensor(self, name: str, tensor: Tensor) -> None:
        if name not in self._buffer_of:
            buffer = f"tensor_{len(self._buffer_of)}"
            self.register_buffer(buffer, tensor.detach())
            self._buffer_of[name] = buffer
            self.names[buffer] = name

    def tensor(self, name: str) -> Tensor:
        return getattr(self, self._buffer_of[name])

    def begin(self, ids: Tensor, positions: Tensor, caches: Sequence[Tensor]) -> dict[Any, Tensor]:
        """All values but hidden, draft and previous, by kind and name; and boundary 0."""
        split = self.split
        found: dict[Any, Tensor] = {
            ("ids", "ids"): ids,
            ("positions", "positions"): positions[None],
            ("slots", ""): positions,
        }
        found |= {(r.kind, r.name): cache for r, cache in zip(self.caches, caches, strict=True)}
        dtype = split.boundary.dtype
        for name, window in split.windows.items():
            found["mask", name] = causal_mask_at(positions, split.cache_length, window, dtype)
        embedded = _outputs(split.embed.graph(*self.arguments(split.embed, found)))
        sides = _outputs(split.positional.graph(*self.arguments(split.positional, found)))
        found["hidden", "hidden"] = embedded[0]
        names = (*split.embed_outputs[1:], *split.side_outputs)
        found |= {("side", n): v for n, v in zip(names, [*embedded[1:], *sides], strict=True)}
        return found

    def arguments(self, piece: Piece, values: Mapping[Any, Tensor]) -> list[Tensor]:
        return [self._argument(role, values) for role in piece.inputs]

    def _argument(self, role: Input, values: Mapping[Any, Tensor]) -> Tensor:
        if role.kind == "parameter":
            return self.tensor(role.name)
        return values[role.kind, "" if role.kind == "slots" else role.name]


class PromptStep(_ValueStep):
    """ids [1, R], start [1], last [1], caches -> the token after row ``last`` [1], rows of keys and
    values. The rows stand at ``start`` and after; what follows ``last`` is padding."""

    def __init__(self, split: SplitDecoder, one: SplitDecoder) -> None:
        super().__init__(split)
        self.head = one.head.whole
        self.keep(
            [self.split.embed, self.split.positional, *self.split.layers, self.head], split.tensors
        )

    def forward(self, ids: Tensor, start: Tensor, last: Tensor, *caches: Tensor) -> Any:
        values = self.begin(ids, start + torch.arange(self.split.rows), caches)
        hidden, rows = values["hidden", "hidden"], []
        for layer in self.split.layers:
            values["hidden", "hidden"] = hidden
            hidden, *written = _outputs(layer.graph(*self.arguments(layer, values)))
            rows += written
        values["hidden", "hidden"] = hidden.index_select(1, last)
        logits = self.head.graph(*self.arguments(self.head, values))
        return (logits[0].float().argmax(-1), *(row.contiguous() for row in rows))


class DecodeStep(_ValueStep):
    """One token: ids [1, 1], position [1], recent [W], threshold [L + 1], caches -> token [1],
    exit layer [1], recent [W], rows of keys and values.

    ``recent``: the layers the last W tokens left after, 0 where there was none yet; exits within
    ``radius`` of one of them are active, besides the first ``always`` of the plan's ranking; all
    are before the first token. Thresholds of 1 and more at every layer mean the dense model.
    """

    def __init__(
        self,
        split: SplitDecoder,
        pieces: ExitPieces,
        plan: ExitPlan,
        tensors: Mapping[str, Tensor],
        radius: int,
        always: int,
    ) -> None:
        super().__init__(split)
        if plan.kv_policy == "defer":
            raise PassError("one row takes no waiting tokens along: ask for kv propagate or drop")
        if not plan.draft_layer:
            raise PassError("its drafts come from the draft head, which is not in the step's graph")
        self.plan, self.radius = plan, radius
        self.predictors = {n: standard(p) for n, p in pieces.predictors.items()}
        self.verify, self.draft = standard(pieces.verify), standard(pieces.draft)
        self.normed, self.head = standard(pieces.normed), split.head.whole
        self.fixed = frozenset(plan.ranking[:always])
        used = [
            self.split.embed, self.split.positional, *self.split.layers, *self.split.kv_fills,
            self.head, self.verify, self.draft, self.normed, *self.predictors.values(),
        ]  # fmt: skip
        self.keep(used, tensors)
        self.keep_tensor("hot.ids", tensors["hot.ids"])

    def forward(
        self, ids: Tensor, position: Tensor, recent: Tensor, threshold: Tensor, *caches: Tensor
    ) -> Any:
        plan = self.plan
        values = self.begin(ids, position, caches)
        active = self._active(recent, threshold)
        hidden = values["hidden", "hidden"]
        done, rows = torch.zeros((), dtype=torch.bool), []
        token, exit_layer = torch.full((1,), -1), torch.full((1,), plan.num_layers)
        draft = torch.zeros(1, plan.draft_tokens, dtype=torch.long)
        previous = torch.zeros(1, plan.draft_tokens)
        for index in range(plan.num_layers):
            boundary = index + 1
            hidden, *written = self._layer(index, hidden, done, values)
            rows += written
            if boundary == plan.draft_layer:
                draft = self._drafted(hidden, active, draft)
            if boundary in self.predictors:
                ask = active[boundary] & ~done
                limit = threshold[boundary : boundary + 1]
                wanted, previous, z = self._predicted(boundary, ask, hidden, draft, previous, limit)
                done, token, exit_layer = self._verified(
                    boundary, wanted, z, draft, done, token, exit_layer
                )
        token = self._head(hidden, done, token)
        recent = torch.cat([recent[1:], exit_layer])
        return token, exit_layer, recent, *rows

    def _active(self, recent: Tensor, threshold: Tensor) -> Tensor:
        layers = torch.arange(self.plan.num_layers + 1)
        exits = torch.tensor([n in self.predictors for n in range(self.plan.num_layers + 1)])
        on = (threshold < 1).any()
        fixed = torch.tensor([n in self.fixed for n in range(self.plan.num_layers + 1)])
        past = recent > 0
        near = ((layers[:, None] - recent).abs() <= self.radius) & past
        chosen = fixed | near.any(-1) | ~past.any()
        return exits & chosen & on

    def _layer(
        self, index: int, hidden: Tensor, done: Tensor, values: dict[Any, Tensor]
    ) -> tuple[Tensor, ...]:
        layer, fill = self.split.layers[index], self.split.kv_fills[index]
        roles = [role for role in layer.inputs if role.kind != "hidden"]
        shapes = [
            node.meta["val"] for node in layer.graph.graph.output_node().all_input_nodes[1:]
        ]  # fmt: skip

        def arguments(piece: Piece, hidden: Tensor, given: Sequence[Tensor]) -> list[Tensor]:
            return [hidden if r.kind == "hidden" else given[roles.index(r)] for r in piece.inputs]

        def run(hidden: Tensor, *given: Tensor) -> Any:
            return _fresh(layer.graph(*arguments(layer, hidden, given)))

        def skip(hidden: Tensor, *given: Tensor) -> Any:
            if self.plan.kv_policy == "propagate":
                rows = _outputs(fill.graph(*arguments(fill, hidden, given)))
            else:
                rows = [torch.zeros(s.shape, dtype=s.dtype) for s in shapes]
            return _fresh([hidden, *rows])

        operands = [hidden, *(self._argument(role, values) for role in roles)]
        return cond(done, skip, run, operands)

    def _drafted(self, hidden: Tensor, active: Tensor, draft: Tensor) -> Tensor:
        roles = (*self.normed.inputs, *self.draft.inputs)
        names = list(dict.fromkeys(r.name for r in roles if r.kind == "parameter"))

        def run(hidden: Tensor, draft: Tensor, hot: Tensor, *given: Tensor) -> Any:
            by_name = dict(zip(names, given, strict=True))
            z = _call(self.normed, by_name, hidden=hidden)[0]
            ranked = _call(self.draft, by_name, hidden=z)[0]
            return _fresh([hot[ranked[0].topk(self.plan.draft_tokens, -1).indices]])

        def skip(hidden: Tensor, draft: Tensor, *rest: Tensor) -> Any:
            return _fresh([draft])

        weights = [self.tensor(name) for name in names]
        operands = [hidden, draft, self.tensor("hot.ids"), *weights]
        return cond(active.any(), run, skip, operands)[0]

    def _predicted(
        self, boundary: int, ask: Tensor, hidden: Tensor, draft: Tensor, previous: Tensor,
        limit: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        piece = self.predictors[boundary]
        names = [role.name for role in piece.inputs if role.kind == "parameter"]

        def run(
            hidden: Tensor, draft: Tensor, previous: Tensor, limit: Tensor, *given: Tensor
        ) -> Any:
            by_name = dict(zip(names, given, strict=True))
            probability, now, z = _call(
                piece, by_name, hidden=hidden, draft=draft, previous=previous
            )[:3]
            return _fresh([(probability > limit)[0], now, z])

        def skip(hidden: Tensor, draft: Tensor, previous: Tensor, *rest: Tensor) -> Any:
            return _fresh([torch.zeros((), dtype=torch.bool), previous, hidden])

        weights = [self.tensor(name) for name in names]
        return cond(ask, run, skip, [hidden, draft, previous, limit, *weights])

    def _verified(
        self, boundary: int, wanted: Tensor, z: Tensor, draft: Tensor, done: Tensor, token: Tensor,
        exit_layer: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        hot = self.plan.verify == "hot"
        names = [role.name for role in self.verify.inputs if role.kind == "parameter"]

        def run(
            z: Tensor, draft: Tensor, done: Tensor, token: Tensor, exit_layer: Tensor,
            hot_ids: Tensor, *given: Tensor,
        ) -> Any:  # fmt: skip
            by_name = dict(zip(names, given, strict=True))
            best = _call(self.verify, by_name, hidden=z)[0][0].argmax(-1)
            answer = hot_ids[best] if hot else best
            accepted = (answer[:, None] == draft).any(-1)
            here = torch.full_like(exit_layer, boundary)
            return _fresh(
                [accepted[0], torch.where(accepted, answer, token),
                 torch.where(accepted, here, exit_layer)]
            )  # fmt: skip

        def skip(
            z: Tensor, draft: Tensor, done: Tensor, token: Tensor, exit_layer: Tensor,
            *rest: Tensor,
        ) -> Any:  # fmt: skip
            return _fresh([done, token, exit_layer])

        weights = [self.tensor(name) for name in names]
        operands = [z, draft, done, token, exit_layer, self.tensor("hot.ids"), *weights]
        return cond(wanted, run, skip, operands)

    def _head(self, hidden: Tensor, done: Tensor, token: Tensor) -> Tensor:
        names = [role.name for role in self.head.inputs if role.kind == "parameter"]

        def run(hidden: Tensor, token: Tensor, *given: Tensor) -> Any:
            logits = _call(self.head, dict(zip(names, given, strict=True)), hidden=hidden)[0]
            return _fresh([logits[0].float().argmax(-1)])

        def skip(hidden: Tensor, token: Tensor, *rest: Tensor) -> Any:
            return _fresh([token])

        weights = [self.tensor(name) for name in names]
        return cond(done, skip, run, [hidden, token, *weights])[0]


def _call(piece: Piece, by_name: Mapping[str, Tensor], **given: Tensor) -> list[Tensor]:
    values = [
        by_name[role.name] if role.kind == "parameter" else given[role.kind]
        for role in piece.inputs
    ]
    return _outputs(piece.graph(*values))


def _outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _fresh(results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Results of a branch: alike in layout, and none an operand itself."""
    return tuple(value.clone(memory_format=torch.contiguous_format) for value in results)
