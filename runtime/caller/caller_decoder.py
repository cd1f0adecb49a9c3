"""A decode step over a cache that is the caller's: keys, values and lengths come with each call.

The layers run one by one, as in the engine's own loop, until every sequence of the batch knows its
answer. The layers left out get keys and values projected from the boundary the step left at, so
whoever reads the cache next finds every slot filled. Where one sequence decodes, its boundary also
waits, and the next step that goes deeper takes it along as another row: its keys and values become
the true ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eepass.runtime.caller.caller_exits import CallerExits
from eepass.runtime.statistics import Statistics
from eepass.segments import CallerStep, Segment

Compile = Callable[..., Callable[[list[Tensor]], Sequence[Tensor]]]


@dataclass(slots=True)
class DeferredToken:
    """A token that left after ``layer`` layers with boundary ``hidden`` [1, 1, H]: its side inputs
    by name, and the slot it has in each deeper layer by the place of that layer's length."""

    layer: int
    hidden: Tensor
    sides: dict[str, Tensor]
    slots: dict[int, Tensor]


class CallerDecoder:
    """The segments of a ``CallerStep``, compiled, run over the tensors of each call."""

    def __init__(self, step: CallerStep, tensors: Sequence[Tensor], compile: Compile) -> None:
        """``tensors``: those of one call, as examples; nothing is written to them."""
        self.step, self._compile = step, compile
        split = step.split
        self.num_layers = len(split.layers)
        names = [*split.embed_outputs[1:], *split.side_outputs]
        first = len(tensors)
        self._tokens = slice(first, first + len(split.embed_outputs) - 1)
        self._sides = slice(self._tokens.stop, first + len(names))
        self._hidden_at = first + len(names)
        self._side_at = {name: first + i for i, name in enumerate(names)} | dict(step.passed)
        self._spare: list[Any] = [None] * (len(names) + 1)
        self._slots_at = [
            [step.places[role] for role in layer.inputs if role.kind == "slots"]
            for layer in split.layers
        ]
        self._lengths = [place for place, _ in step.advance]
        self._grown = [rows for _, rows in step.advance]
        values = self._example(tensors)
        self._embed = self._bind(split.embed, values)
        self._positional = self._bind(split.positional, values) if split.side_outputs else _nothing
        self._layers = [self._bind(layer, values) for layer in split.layers]
        self._fills = [self._bind(fill, values) for fill in split.kv_fills]
        self._head = self._bind(split.head.whole, values)
        self._stacked: dict[int, list[Callable[[_Rows], Tensor]]] = {}
        for rows, layers in step.stacked.items():
            self._stacked[rows] = [self._bind_stacked(layer, values, rows) for layer in layers]
        # tokens that may wait, one row being the step's own
        self.most_waiting = max(self._stacked, default=1) - 1

    def __call__(
        self,
        tensors: Sequence[Tensor],
        exits: CallerExits | None,
        active: frozenset[int],
        waiting: list[DeferredToken] | None,
        statistics: Statistics,
    ) -> tuple[Tensor, int]:
        """Logits [B, 1, V] and the layers they took; writes keys, values and lengths in place.

        ``active``: the exit layers that are asked. ``waiting``: tokens of this cache that the
        deeper layers have not seen, brought up to date here; None to let none wait.
        """
        values = [*tensors, *self._spare]
        own, *values[self._tokens] = self._embed(values)
        values[self._sides] = self._positional(values)
        state = exits.exits.begin(self.step.batch) if exits is not None and active else None
        joining = {token.layer for token in waiting} if waiting else frozenset()
        riding: _Rows | None = None
        logits: Tensor | None = None
        layers = 0
        for layer in self._layers:
            if layers in joining:
                assert waiting is not None
                riding = self._join(riding, own, layers, waiting, values)
            if riding is None:
                values[self._hidden_at] = own
                (own,) = layer(values)
            else:
                own = riding.run(self._stacked[riding.size][layers])
            layers += 1
            if exits is None or state is None:
                continue
            if layers == exits.exits.plan.draft_layer:
                state = exits.exits.draft_from(_as_rows(own), state, statistics)
            if layers in active:
                logits, state = exits.check(layers, _as_rows(own), state, statistics)
                if logits is not None:
                    break
        values[self._hidden_at] = own
        if layers < self.num_layers:
            for fill in self._fills[layers:]:
                fill(values)
        if waiting is not None:
            self._settle(waiting, riding, layers, values, statistics)
        if logits is None:
            (logits,) = self._head(values)
            statistics.full_heads += self.step.batch
        if self._lengths:
            # one call for all layers
            torch._foreach_add_([tensors[place] for place in self._lengths], self._grown)
        return logits, layers

    def _join(
        self,
        riding: _Rows | None,
        own: Tensor,
        layer: int,
        waiting: Sequence[DeferredToken],
        values: list[Any],
    ) -> _Rows:
        """The rows from ``layer`` on: tokens that wait there, those before, the step's own."""
        new = [token for token in waiting if token.layer == layer]
        tokens = [*new, *(riding.tokens if riding else ())]
        size = next(rows for rows in self._stacked if rows > len(tokens))
        before = [riding.hidden[: len(riding.tokens)]] if riding else []
        # padding repeats the step's own row, and writes to its slot what it writes
        padding = [own] * (size - len(tokens))
        hidden = torch.cat([*(token.hidden for token in new), *before, *padding])
        return _Rows(tokens, hidden, size, values)

    def _settle(
        self,
        waiting: list[DeferredToken],
        riding: _Rows | None,
        layers: int,
        values: list[Any],
        statistics: Statistics,
    ) -> None:
        """Who waits after this pass, and where."""
        if layers == self.num_layers:
            statistics.rows_caught_up += len(waiting)
            waiting.clear()
            return
        for row, token in enumerate(riding.tokens if riding else ()):
            assert riding is not None
            token.layer, token.hidden = layers, riding.hidden[row : row + 1].clone()
        passed = self.step.passed
        sides = {
            # what the caller brought may be written to before it is needed again
            name: values[at].clone() if name in passed else values[at]
            for name, at in self._side_at.items()
        }
        slots = {
            at: values[at].reshape(1).clone() for each in self._slots_at[layers:] for at in each
        }
        waiting.append(DeferredToken(layers, values[self._hidden_at].clone(), sides, slots))

    def _example(self, tensors: Sequence[Tensor]) -> list[Any]:
        split = self.step.split
        values = [*tensors, *self._spare]
        hidden, *values[self._tokens] = _eager(split.embed, values, self._indices(split.embed))
        positional = split.positional
        values[self._sides] = _eager(positional, values, self._indices(positional))
        values[self._hidden_at] = hidden
        return values

    def _bind(
        self, segment: Segment, values: Sequence[Any]
    ) -> Callable[[list[Any]], Sequence[Tensor]]:
        at = self._indices(segment)
        compiled = self._compile(segment.graph, segment.structure, [values[i] for i in at])
        return lambda values: compiled([values[i] for i in at])

    def _bind_stacked(
        self, segment: Segment, values: list[Any], rows: int
    ) -> Callable[[_Rows], Tensor]:
        at = self._indices(segment)
        kinds = [role.kind for role in segment.inputs]
        hidden = torch.cat([values[self._hidden_at]] * rows)
        alone = _Rows([], hidden, rows, values)
        compiled = self._compile(
            segment.graph, segment.structure, alone.arguments(kinds, segment, at)
        )
        return lambda riding: compiled(riding.arguments(kinds, segment, at))[0]

    def _indices(self, segment: Segment) -> list[int]:
        return [
            self._hidden_at
            if role.kind == "hidden"
            else self._side_at[role.name]
            if role.kind == "side"
            else self.step.places[role]
            for role in segment.inputs
        ]


class _Rows:
    """DeferredToken tokens and, last, the step's own row, going through layers together.

    ``hidden`` [R, 1, H] with R = ``size``; the rows after the step's own repeat it.
    """

    def __init__(
        self, tokens: list[DeferredToken], hidden: Tensor, size: int, values: list[Any]
    ) -> None:
        self.tokens, self.hidden, self.size, self.values = tokens, hidden, size, values
        self._own = size - len(tokens)
        self._made: dict[int, Tensor] = {}

    def run(self, layer: Callable[[_Rows], Tensor]) -> Tensor:
        """One layer; returns the boundary [1, 1, H] of the step's own row."""
        self.hidden = layer(self)
        place = len(self.tokens)
        return self.hidden[place : place + 1]

    def arguments(self, kinds: Sequence[str], segment: Segment, at: Sequence[int]) -> list[Any]:
        found = []
        for kind, role, place in zip(kinds, segment.inputs, at, strict=True):
            if kind == "hidden":
                found.append(self.hidden)
            elif kind == "side":
                if place not in self._made:
                    own = [self.values[place]] * self._own
                    self._made[place] = torch.cat(
                        [*(t.sides[role.name] for t in self.tokens), *own]
                    )
                found.append(self._made[place])
            elif kind == "slots":
                others = [token.slots[place] for token in self.tokens]
                own = [self.values[place].reshape(1)] * self._own
                found.append(torch.cat([*others, *own]))
            else:
                found.append(self.values[place])
        return found


def _as_rows(hidden: Tensor) -> Tensor:
    """Boundaries [B, 1, H] as rows [1, B, H]."""
    return hidden if hidden.shape[0] == 1 else hidden.transpose(0, 1).contiguous()


def _eager(segment: Segment, values: Sequence[Any], at: Sequence[int]) -> list[Tensor]:
    result = segment.graph(*(values[i] for i in at))
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _nothing(values: Sequence[Any]) -> Sequence[Tensor]:
    return ()
