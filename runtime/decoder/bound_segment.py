"""Segments with their parameters, and with keys and values of the cache, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from eepass.runtime.cache.kv_cache import KvCache
from eepass.runtime.decoder.side_inputs import Place
from eepass.segments import Input, Link, Segment

Compiled = Callable[[list[Tensor]], Sequence[Tensor]]
Compile = Callable[..., Compiled]


def bind_parameters(
    segment: Segment, tensors: Mapping[str, Tensor], compile: Compile, examples: Sequence[Tensor]
) -> Callable[..., Any]:
    """``segment`` compiled, with its parameters, its last inputs, in place.

    The result takes the inputs before them, like ``examples``, and returns a tuple of outputs.
    """
    parameters = [tensors[name] for name in segment.parameters]
    compiled = compile(segment.graph, segment.structure, [*examples, *parameters])
    return lambda *inputs: compiled([*inputs, *parameters])


class BoundSegment:
    """A segment whose arguments are filled in once, all but those that come with each call."""

    compiled: Compiled

    def __init__(self, segment: Segment, tensors: Mapping[str, Tensor], kv: KvCache) -> None:
        fixed: dict[str, Callable[[Input], Tensor]] = {
            "parameter": lambda role: tensors[role.name],
            "keys": lambda role: kv.keys[role.layer],
            "values": lambda role: kv.values[role.layer],
            "state": lambda role: kv.states[role.name],
        }
        self.template: list[Any] = segment.arguments(
            lambda role: fixed[role.kind](role) if role.kind in fixed else None
        )
        kinds = [role.kind for role in segment.inputs]
        self.hidden_at = kinds.index("hidden") if "hidden" in kinds else -1
        self.slots_at = [at for at, kind in enumerate(kinds) if kind == "slots"]
        self.side_at = [(at, r.name) for at, r in enumerate(segment.inputs) if r.kind == "side"]

    def arguments(self, hidden: Tensor, place: Place | None) -> list:
        arguments = self.template.copy()
        if self.hidden_at >= 0:
            arguments[self.hidden_at] = hidden
        if place is not None:
            for index in self.slots_at:
                arguments[index] = place.slots
            for index, name in self.side_at:
                arguments[index] = place.sides[name]
        return arguments

    def link(self, sides: Sequence[str]) -> Link:
        """What a chain needs to call it, where slots and then ``sides`` change."""
        places = [(index, 0) for index in self.slots_at]
        places += [(index, 1 + sides.index(name)) for index, name in self.side_at]
        return self.template, self.hidden_at, [p for p, _ in places], [w for _, w in places]

    def __call__(self, hidden: Tensor, place: Place | None) -> Tensor:
        return self.compiled(self.arguments(hidden, place))[0]
