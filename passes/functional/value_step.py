"""Steps in which the cache is a value, for formats without memory; here that of a prompt.

    before   hidden = layer(hidden, side, keys, values, slots)        writes the cache
    after    hidden, k, v = layer(hidden, side, keys, values, slots)
             return token, every layer's k and v

New keys and values are written by whoever runs the step. A step is said to a ``Builder``, function
by function; equal ones have equal keys.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from eepass.errors import PassError
from eepass.masks import causal_mask_at
from eepass.passes.functional.return_kv_rows import return_kv_rows, row_inputs
from eepass.segments import Input, Segment, SplitDecoder

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
        names = parameters(split.embed, split.positional)
        dtype = split.hidden_example.dtype

        def begin(ids: Tensor, first: Tensor, *given: Tensor) -> Sequence[Tensor]:
            positions = first + torch.arange(split.rows)
            values = {("parameter", n): tensor for n, tensor in zip(names, given, strict=True)}
            values |= {("ids", "ids"): ids, ("positions", "positions"): positions[None]}
            for name, window in split.windows.items():
                mask = causal_mask_at(positions, split.cache_length, window, dtype)
                values["mask", name] = mask
            made = [positions]
            for segment in (split.embed, split.positional):
                made += outputs(segment.graph(*(values[r.kind, r.name] for r in segment.inputs)))
            return made

        weights = [build.weight(name) for name in names]
        slots, hidden, *sides = build.call(Call("begin", begin, [ids, first, *weights]))
        made = [*split.embed_outputs[1:], *split.side_outputs]
        found = {("side", name): side for name, side in zip(made, sides, strict=True)}
        found |= {(r.kind, r.name): cache for r, cache in zip(self.caches, caches, strict=True)}
        return hidden, {**found, ("slots", ""): slots}

    def _operands(
        self, build: Builder, index: int, values: Mapping[tuple[str, str], Value]
    ) -> list[Value]:
        """What layer ``index`` reads besides its boundary."""
        operands = []
        for role in others(self.split.layers[index]):
            if role.kind == "parameter":
                operands.append(build.weight(role.name))
            else:
                operands.append(values[role.kind, "" if role.kind == "slots" else role.name])
        return operands

    def _run(self, index: int, hidden: Value, operands: Sequence[Value]) -> Call:
        layer = self.split.layers[index]
        places = places_in(layer, others(layer))

        def run(hidden: Tensor, *given: Tensor) -> Sequence[Tensor]:
            return outputs(layer.graph(*(hidden if p < 0 else given[p] for p in places)))

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
        names = parameters(self.head)

        def head(hidden: Tensor, last: Tensor, *given: Tensor) -> Sequence[Tensor]:
            return [likeliest(self.head, hidden.index_select(1, last), names, given)]

        weights = [build.weight(name) for name in names]
        return [*build.call(Call("head", head, [hidden, last, *weights])), *rows]


def likeliest(
    segment: Segment, hidden: Tensor, names: Sequence[str], given: Sequence[Tensor]
) -> Tensor:
    """Argmax [1] of the logits [1, 1, N] that ``segment`` makes of hidden [1, 1, H]."""
    return called(segment, names, given, hidden=hidden)[0][0].float().argmax(-1)


def called(
    segment: Segment, names: Sequence[str], given: Sequence[Tensor], **others: Tensor
) -> list[Tensor]:
    by_name = dict(zip(names, given, strict=True))
    values = [
        by_name[role.name] if role.kind == "parameter" else others[role.kind]
        for role in segment.inputs
    ]
    return outputs(segment.graph(*values))


def parameters(*segments: Segment) -> list[str]:
    roles = (role for segment in segments for role in segment.inputs if role.kind == "parameter")
    return list(dict.fromkeys(role.name for role in roles))


def others(layer: Segment) -> list[Input]:
    return [role for role in layer.inputs if role.kind != "hidden"]


def places_in(segment: Segment, roles: Sequence[Input]) -> tuple[int, ...]:
    """Where each input of ``segment`` stands in ``roles``; −1 for the boundary."""
    return tuple(-1 if role.kind == "hidden" else roles.index(role) for role in segment.inputs)


def outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]
