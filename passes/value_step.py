"""Decode and prompt steps in which the cache is a value: what formats without memory need.

    before   state = cond(done, pass_through, layer_and_predictor, state, ...)       layer by layer
    after    hidden, k, v = branch(done, fill, layer, ...)
             wanted, z    = branch(active & ~done, predict, pass_through, ...)    at exit points
             token, done  = branch(wanted, verify, pass_through, ...)
             return token, exit layer, every layer's k and v

The branches stand in a flat chain, so a predictor that is not active costs nothing, and neither
does verification that nobody asked for. New keys and values are written by whoever runs the step;
where a token has left, they are projected from the boundary it left at (``propagate``) or zero
(``drop``). A step is said to a ``Builder``, function by function; equal ones have equal keys.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from eepass.passes.report import PassError
from eepass.passes.return_kv_rows import return_kv_rows, row_inputs, standard
from eepass.plan import ExitPieces, ExitPlan, Input, Piece, SplitDecoder, causal_mask_at

# what stands for a tensor while a step is built
Value = Any
Function = Callable[..., Sequence[Tensor]]


class Call(NamedTuple):
    """``function`` of ``operands``; those with one key are one function."""

    key: Hashable
    function: Function
    operands: Sequence[Value]


class Builder(Protocol):
    """Takes a step down: functions of tensors, and the values that go in and come out."""

    def weight(self, name: str) -> Value:
        """A tensor of the model or the artefact."""

    def constant(self, tensor: Tensor) -> Value:
        """A small tensor that is always the same."""

    def call(self, call: Call) -> list[Value]:
        """The results of a call."""

    def branch(
        self, condition: Value, then: Call | Sequence[Value], otherwise: Call | Sequence[Value]
    ) -> list[Value]:
        """The results of one of two calls, or values handed through; the other is not run."""


class ValueStep:
    """What both steps share; ``caches``: the roles of the keys and values they take, in order.

    Rows of keys and values come out in the same order.
    """

    def __init__(self, split: SplitDecoder) -> None:
        if split.stepwise:
            raise PassError("its recurrent states are overwritten in place, token by token")
        self.split = return_kv_rows(split)
        self.caches = [role for layer in self.split.layers for role in row_inputs(layer)]
        kept = [role for fill in self.split.kv_fills for role in row_inputs(fill)]
        if kept != self.caches or len(set(kept)) != len(kept):
            raise PassError("its layers share keys and values, or write them in several places")

    def empty_caches(self) -> list[Tensor]:
        shapes = {}
        for layer in self.split.layers:
            placeholders = layer.graph.graph.find_nodes(op="placeholder")
            for role, node in zip(layer.inputs, placeholders, strict=True):
                shapes[role] = node.meta["val"]
        return [torch.zeros(shapes[c].shape, dtype=shapes[c].dtype) for c in self.caches]

    def _begin(
        self, build: Builder, ids: Value, first: Value, caches: Sequence[Value]
    ) -> tuple[Value, dict[tuple[str, str], Value]]:
        """Boundary 0 of rows from position ``first`` on, and what layers read besides it."""
        split = self.split
        names = _parameters(split.embed, split.positional)
        dtype = split.boundary.dtype

        def begin(ids: Tensor, first: Tensor, *given: Tensor) -> Sequence[Tensor]:
            positions = first + torch.arange(split.rows)
            values = {("parameter", n): tensor for n, tensor in zip(names, given, strict=True)}
            values |= {("ids", "ids"): ids, ("positions", "positions"): positions[None]}
            for name, window in split.windows.items():
                mask = causal_mask_at(positions, split.cache_length, window, dtype)
                values["mask", name] = mask
            made = [positions]
            for piece in (split.embed, split.positional):
                made += _outputs(piece.graph(*(values[r.kind, r.name] for r in piece.inputs)))
            return made

        weights = [build.weight(name) for name in names]
        slots, hidden, *sides = build.call(Call("begin", begin, [ids, first, *weights]))
        names = [*split.embed_outputs[1:], *split.side_outputs]
        found = {("side", name): side for name, side in zip(names, sides, strict=True)}
        found |= {(r.kind, r.name): cache for r, cache in zip(self.caches, caches, strict=True)}
        return hidden, {**found, ("slots", ""): slots}

    def _operands(
        self, build: Builder, index: int, values: Mapping[tuple[str, str], Value]
    ) -> list[Value]:
        """What layer ``index`` reads besides its boundary."""
        operands = []
        for role in _others(self.split.layers[index]):
            if role.kind == "parameter":
                operands.append(build.weight(role.name))
            else:
                operands.append(values[role.kind, "" if role.kind == "slots" else role.name])
        return operands

    def _run(self, index: int, hidden: Value, operands: Sequence[Value]) -> Call:
        layer = self.split.layers[index]
        places = _places(layer, _others(layer))

        def run(hidden: Tensor, *given: Tensor) -> Sequence[Tensor]:
            return _outputs(layer.graph(*(hidden if p < 0 else given[p] for p in places)))

        return Call(("layer", layer.structure), run, [hidden, *operands])


class PromptStep(ValueStep):
    """R tokens of a prompt; ``one`` is the decoder split for one row."""

    def __init__(self, split: SplitDecoder, one: SplitDecoder) -> None:
        super().__init__(split)
        self.head = one.head.whole

    def build(
        self, build: Builder, ids: Value, start: Value, last: Value, caches: Sequence[Value]
    ) -> list[Value]:
        """ids [1, R], start [1], last [1], caches -> the token after row ``last`` [1], rows of
        keys and values. Rows stand at ``start`` and after; what follows ``last`` is padding."""
        hidden, values = self._begin(build, ids, start, caches)
        rows: list[Value] = []
        for index in range(len(self.split.layers)):
            operands = self._operands(build, index, values)
            hidden, *written = build.call(self._run(index, hidden, operands))
            rows += written
        names = _parameters(self.head)

        def head(hidden: Tensor, last: Tensor, *given: Tensor) -> Sequence[Tensor]:
            return [_likeliest(self.head, hidden.index_select(1, last), names, given)]

        weights = [build.weight(name) for name in names]
        return [*build.call(Call("head", head, [hidden, last, *weights])), *rows]


class DecodeStep(ValueStep):
    """One token through a decoder with exits.

    Exits within ``radius`` of one of the last tokens' are active, besides the first ``always`` of
    the plan's ranking; all are before the first token.
    """

    def __init__(
        self, split: SplitDecoder, pieces: ExitPieces, plan: ExitPlan, radius: int, always: int
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
        roles = _others(layer)
        used = [role for role in roles if role in fill.inputs]
        places = _places(fill, used)

        def project(hidden: Tensor, *given: Tensor) -> Sequence[Tensor]:
            made = fill.graph(*(hidden if p < 0 else given[p] for p in places))
            return [hidden, *_outputs(made)]

        given = [operands[roles.index(role)] for role in used]
        return Call(("fill", fill.structure, places), project, [hidden, *given])

    def _drafted(self, build: Builder, wanted: Value, hidden: Value, draft: Value) -> Value:
        names = _parameters(self.normed, self.draft)

        def run(hidden: Tensor, hot: Tensor, *given: Tensor) -> Sequence[Tensor]:
            z = _call(self.normed, names, given, hidden=hidden)[0]
            ranked = _call(self.draft, names, given, hidden=z)[0]
            return [hot[ranked[0].topk(self.plan.draft_tokens, -1).indices]]

        weights = [build.weight(name) for name in ("hot.ids", *names)]
        return build.branch(wanted, Call("draft", run, [hidden, *weights]), [draft])[0]

    def _predicted(
        self, build: Builder, boundary: int, number: Value, active: Value, done: Value,
        hidden: Value, draft: Value, previous: Value, threshold: Value,
    ) -> list[Value]:  # fmt: skip
        piece = self.predictors[boundary]
        names = _parameters(piece)

        def ask(active: Tensor, number: Tensor, done: Tensor) -> Sequence[Tensor]:
            return [active.index_select(0, number)[0] & ~done]

        def run(
            hidden: Tensor, draft: Tensor, previous: Tensor, threshold: Tensor, number: Tensor,
            *given: Tensor,
        ) -> Sequence[Tensor]:  # fmt: skip
            probability, now, z = _call(
                piece, names, given, hidden=hidden, draft=draft, previous=previous
            )[:3]
            return (probability > threshold.index_select(0, number))[0], now, z

        (asked,) = build.call(Call("ask", ask, [active, number, done]))
        operands = [hidden, draft, previous, threshold, number]
        operands += [build.weight(name) for name in names]
        no = build.constant(torch.tensor(False))
        call = Call(("predict", piece.structure), run, operands)
        return build.branch(asked, call, [no, previous, hidden])

    def _verified(
        self, build: Builder, number: Value, wanted: Value, z: Value, draft: Value, done: Value,
        token: Value, exit_layer: Value,
    ) -> list[Value]:  # fmt: skip
        hot, names = self.plan.verify == "hot", _parameters(self.verify)

        def run(
            token: Tensor, exit_layer: Tensor, z: Tensor, draft: Tensor, number: Tensor,
            hot_ids: Tensor, *given: Tensor,
        ) -> Sequence[Tensor]:  # fmt: skip
            answer = _likeliest(self.verify, z, names, given)
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
        names = _parameters(self.head)

        def run(hidden: Tensor, *given: Tensor) -> Sequence[Tensor]:
            return [_likeliest(self.head, hidden, names, given)]

        call = Call("head", run, [hidden, *(build.weight(name) for name in names)])
        return build.branch(done, [token], call)[0]


def _remember(recent: Tensor, exit_layer: Tensor) -> Sequence[Tensor]:
    return [torch.cat([recent[1:], exit_layer])]


def _likeliest(
    piece: Piece, hidden: Tensor, names: Sequence[str], given: Sequence[Tensor]
) -> Tensor:
    """The place of the largest logit [1], of a piece from hidden [1, 1, H] to logits [1, 1, N]."""
    return _call(piece, names, given, hidden=hidden)[0][0].float().argmax(-1)


def _call(
    piece: Piece, names: Sequence[str], given: Sequence[Tensor], **others: Tensor
) -> list[Tensor]:
    by_name = dict(zip(names, given, strict=True))
    values = [
        by_name[role.name] if role.kind == "parameter" else others[role.kind]
        for role in piece.inputs
    ]
    return _outputs(piece.graph(*values))


def _parameters(*pieces: Piece) -> list[str]:
    roles = (role for piece in pieces for role in piece.inputs if role.kind == "parameter")
    return list(dict.fromkeys(role.name for role in roles))


def _others(layer: Piece) -> list[Input]:
    return [role for role in layer.inputs if role.kind != "hidden"]


def _places(piece: Piece, roles: Sequence[Input]) -> tuple[int, ...]:
    """Where each input of ``piece`` stands in ``roles``; −1 for the boundary."""
    return tuple(-1 if role.kind == "hidden" else roles.index(role) for role in piece.inputs)


def _outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]
