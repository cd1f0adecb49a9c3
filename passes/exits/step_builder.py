"""The language a decode step is described in: calls of functions, and branches.

A step is written down once, as calls of functions of tensors. A builder turns them into a graph:
``insert_exits`` into a ``torch.fx`` graph with ``torch.cond``, ``eepass.onnx.graph`` into an ONNX
graph with ``If``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from eepass.segments import Input, Segment, SplitDecoder

# what stands for a tensor while a step is built
Value = Any
Function = Callable[..., Sequence[Tensor]]
# kinds of inputs that change along the step; everything else a segment reads is the same
# wherever it is read
STATE = ("hidden", "draft", "previous")


@dataclass(frozen=True, slots=True)
class Call:
    """``function`` of ``operands``. Calls of equal ``key`` are one function: a builder traces the
    first of them. ``kind`` names what it does: "layer", "predict"."""

    kind: str
    function: Function
    operands: Sequence[Value]
    structure: str = ""

    @property
    def key(self) -> Hashable:
        return self.kind, self.structure


class Builder(Protocol):
    """Makes a graph out of calls and branches."""

    def weight(self, name: str) -> Value:
        """A tensor of the model or the artefact."""

    def constant(self, tensor: Tensor) -> Value:
        """A small tensor that is always the same."""

    def call(self, call: Call) -> list[Value]:
        """The results of a call."""

    def branch(
        self, condition: Value, then: Call | Sequence[Value], otherwise: Call | Sequence[Value]
    ) -> list[Value]:
        """The results of one of two calls, or values handed through; the other does not run."""


def unaliased(results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Results none of which shares memory with another or with an input: no graph format lets a
    branch return its inputs. All are contiguous, as both branches must return the same strides."""
    return tuple(result.clone(memory_format=torch.contiguous_format) for result in results)


class StepCalls:
    """The parts of a decode step, as calls; ``value_of`` gives what segments read besides
    parameters, side inputs and what changes along the step."""

    def __init__(
        self, build: Builder, split: SplitDecoder, value_of: Callable[[Input], Value]
    ) -> None:
        self.build, self.split = build, split
        self._value_of = value_of
        self._sides: dict[Input, Value] = {}

    def begin(self) -> Value:
        """The hidden state before layer 1; side inputs are computed with it."""
        split = self.split

        def run(given: Mapping[Input, Tensor]) -> Sequence[Tensor]:
            return list(split.prelude(given.__getitem__).values())

        begin = self.reading("begin", [split.embed, split.positional], run)
        hidden, *sides = self.build.call(begin)
        names = (*split.embed_outputs[1:], *split.side_outputs)
        self._sides = dict(zip((Input("side", name) for name in names), sides, strict=True))
        return hidden

    def layer(self, index: int, hidden: Value) -> Call:
        """Layer ``index`` of ``hidden``: its hidden state, and rows of keys and values where it
        returns them."""
        layer = self.split.layers[index]
        return self.reading("layer", [layer], partial(called, layer), hidden)

    def head(self, hidden: Value, head: Segment) -> Call:
        """The token [1] with the highest logit of ``head``, from ``hidden`` [1, 1, H]."""
        return self.reading("head", [head], lambda *given: [likeliest(head, *given)], hidden)

    def reading(
        self, kind: str, segments: Sequence[Segment], function: Function, *operands: Value
    ) -> Call:
        """A call of ``function(given, *operands)``; ``given`` holds what ``segments`` read."""
        inputs = (role for segment in segments for role in segment.inputs)
        roles = list(dict.fromkeys(role for role in inputs if role.kind not in STATE))
        count = len(operands)

        def positional(*tensors: Tensor) -> Sequence[Tensor]:
            given = dict(zip(roles, tensors[count:], strict=True))
            return function(given, *tensors[:count])

        structure = " ".join(segment.structure for segment in segments)
        return Call(kind, positional, [*operands, *map(self._value, roles)], structure)

    def _value(self, role: Input) -> Value:
        if role.kind == "parameter":
            return self.build.weight(role.name)
        return self._sides[role] if role.kind == "side" else self._value_of(role)


def called(
    segment: Segment, given: Mapping[Input, Tensor], hidden: Tensor, **state: Tensor
) -> tuple[Tensor, ...]:
    """The outputs of ``segment``; ``state``: by kind, what else changes along the step."""
    state["hidden"] = hidden
    return segment.run(lambda role: state[role.kind] if role.kind in STATE else given[role])


def likeliest(segment: Segment, given: Mapping[Input, Tensor], hidden: Tensor) -> Tensor:
    """Argmax [1] of the logits [1, 1, N] that ``segment`` computes from hidden [1, 1, H]."""
    return called(segment, given, hidden)[0][0].float().argmax(-1)
