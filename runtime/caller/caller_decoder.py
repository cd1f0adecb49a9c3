"""A decode step over a cache that is the caller's: keys, values and lengths come with each call.

The layers run one by one, as in the engine's own loop, until every sequence of the batch has its
next token. The layers left out get keys and values projected from the hidden state at the exit, so
whoever reads the cache next finds every slot filled. Where one sequence decodes, that hidden state
is also kept, and the next step that goes deeper takes it along as another row: its keys and values
become the true ones.

A cache may be reset, cropped, reordered, filled anew or freed between two steps without notice.
Every such change is a write, and tensors count their writes: what was remembered of a cache holds
only if nothing was written since the step that remembered it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from eepass.private_names import foreach_add_
from eepass.runtime.caller.caller_exits import CallerExits
from eepass.runtime.decoder.bound_segment import Compile
from eepass.runtime.exits.scheduler import PredictorSchedule
from eepass.runtime.statistics import Statistics
from eepass.segments import CallerStep, Input, Segment

# the tensors of a call and, behind them, what the prelude makes of them and a hidden state
Values = list[Any]


@dataclass(slots=True)
class DeferredToken:
    """A token that exited after ``layer`` layers with ``hidden`` [1, 1, H]: its side inputs by
    name, and the slot it has in each deeper layer by the place of that layer's length."""

    layer: int
    hidden: Tensor
    sides: dict[str, Tensor]
    slots: dict[int, Tensor]


@dataclass(slots=True)
class CacheState:
    """Of one cache: the schedule of its predictors, its statistics, the tokens the deeper layers
    have not seen, its count of writes."""

    schedule: PredictorSchedule | None
    statistics: Statistics
    pending: list[DeferredToken] = field(default_factory=list)
    written: tuple[int, ...] = ()


class CacheStates:
    """One ``CacheState`` for each cache alive; a cache goes by its first tensor."""

    def __init__(self) -> None:
        self._states = WeakTensorKeyDictionary()
        self._lock = threading.Lock()

    def take(self, cache: Sequence[Tensor], fresh: Callable[[], CacheState]) -> CacheState:
        """The state of ``cache``; a new one if anyone wrote to it since ``keep``."""
        with self._lock:
            state = self._states.get(cache[0])
        if state is None or not state.written or state.written != _writes(cache):
            return fresh()
        return state

    def keep(self, cache: Sequence[Tensor], state: CacheState) -> None:
        """Remember ``state`` after a step that wrote to ``cache``."""
        if not cache[0].is_inference():
            # compiled code writes past the counters, and others go by them too
            torch.autograd.graph.increment_version(cache)
        state.written = _writes(cache)
        with self._lock:
            self._states[cache[0]] = state


def _writes(cache: Sequence[Tensor]) -> tuple[int, ...]:
    # tensors of inference mode do not count: nothing is remembered of them
    return () if cache[0].is_inference() else tuple(tensor._version for tensor in cache)


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
        values = [*tensors, *self._spare]
        hidden, *values[self._tokens] = split.embed.run(lambda role: values[self._place(role)])
        values[self._sides] = split.positional.run(lambda role: values[self._place(role)])
        values[self._hidden_at] = hidden
        self._embed = self._bind(split.embed, values)
        self._positional: Callable[[Values], Sequence[Tensor]] = lambda values: ()
        if split.side_outputs:
            self._positional = self._bind(split.positional, values)
        self._layers = [self._bind(layer, values) for layer in split.layers]
        self._fills = [self._bind(fill, values) for fill in split.kv_fills]
        self._head = self._bind(split.head.whole, values)
        self._stacked = {
            rows: [self._bind_stacked(layer, values, rows) for layer in layers]
            for rows, layers in step.stacked.items()
        }
        # one row is the step's own
        self.most_pending = max(self._stacked, default=1) - 1

    def __call__(
        self,
        tensors: Sequence[Tensor],
        exits: CallerExits | None,
        active: frozenset[int],
        pending: list[DeferredToken] | None,
        statistics: Statistics,
    ) -> tuple[Tensor, int]:
        """Logits [B, 1, V] and the layers they took; writes keys, values and lengths in place.

        ``active``: the exit points that are evaluated. ``pending``: tokens of this cache that the
        deeper layers have not seen, brought up to date here; None to defer none.
        """
        values = [*tensors, *self._spare]
        hidden, *values[self._tokens] = self._embed(values)
        values[self._sides] = self._positional(values)
        state = exits.exits.begin(self.step.batch) if exits is not None and active else None
        joining = {token.layer for token in pending} if pending else frozenset()
        rows: _JoinedRows | None = None
        logits: Tensor | None = None
        layers = 0
        for layer in self._layers:
            if layers in joining:
                assert pending is not None
                new = [token for token in pending if token.layer == layers]
                rows = self._join(new, rows, hidden, values)
            if rows is None:
                values[self._hidden_at] = hidden
                (hidden,) = layer(values)
            else:
                hidden = rows.run(self._stacked[rows.size][layers])
            layers += 1
            if exits is None or state is None:
                continue
            if layers == exits.exits.plan.draft_layer:
                state = exits.exits.draft_from(_as_rows(hidden), state, statistics)
            if layers in active:
                logits, state = exits.check(layers, _as_rows(hidden), state, statistics)
                if logits is not None:
                    break
        values[self._hidden_at] = hidden
        if layers < self.num_layers:
            for fill in self._fills[layers:]:
                fill(values)
            if pending is not None:
                self._defer(pending, rows, layers, values)
        elif pending:
            statistics.rows_caught_up += len(pending)
            pending.clear()
        if logits is None:
            (logits,) = self._head(values)
            statistics.full_heads += self.step.batch
        if self._lengths:
            # one call for all layers
            foreach_add_([tensors[place] for place in self._lengths], self._grown)
        return logits, layers

    def _join(
        self, new: list[DeferredToken], rows: _JoinedRows | None, hidden: Tensor, values: Values
    ) -> _JoinedRows:
        """The rows from a layer on: tokens deferred there, those before, the step's own."""
        tokens = [*new, *(rows.tokens if rows else ())]
        size = next(count for count in self._stacked if count > len(tokens))
        before = [rows.hidden[: len(rows.tokens)]] if rows else []
        # padding repeats the step's own row, and writes to its slot what it writes
        padding = [hidden] * (size - len(tokens))
        joined = torch.cat([*(token.hidden for token in new), *before, *padding])
        return _JoinedRows(tokens, joined, size, values)

    def _defer(
        self, pending: list[DeferredToken], rows: _JoinedRows | None, layers: int, values: Values
    ) -> None:
        """Defer the step's own token, and note how far the step took those that joined it."""
        if rows is not None:
            for row, token in enumerate(rows.tokens):
                token.layer, token.hidden = layers, rows.hidden[row : row + 1].clone()
        sides = {
            # what the caller brought may be written to before it is needed again
            name: values[at].clone() if name in self.step.passed else values[at]
            for name, at in self._side_at.items()
        }
        slots = {
            at: values[at].reshape(1).clone() for each in self._slots_at[layers:] for at in each
        }
        pending.append(DeferredToken(layers, values[self._hidden_at].clone(), sides, slots))

    def _place(self, role: Input) -> int:
        """Where the value of ``role`` is among a call's values."""
        if role.kind == "hidden":
            return self._hidden_at
        return self._side_at[role.name] if role.kind == "side" else self.step.places[role]

    def _bind(self, segment: Segment, values: Values) -> Callable[[Values], Sequence[Tensor]]:
        at = segment.arguments(self._place)
        compiled = self._compile(segment.graph, segment.structure, [values[i] for i in at])
        return lambda values: compiled([values[i] for i in at])

    def _bind_stacked(
        self, segment: Segment, values: Values, size: int
    ) -> Callable[[_JoinedRows], Tensor]:
        at = segment.arguments(self._place)
        hidden_at = next(i for i, role in enumerate(segment.inputs) if role.kind == "hidden")
        sides = [(i, role.name) for i, role in enumerate(segment.inputs) if role.kind == "side"]
        slots = [i for i, role in enumerate(segment.inputs) if role.kind == "slots"]

        def arguments(rows: _JoinedRows) -> Values:
            found = [rows.values[place] for place in at]
            found[hidden_at] = rows.hidden
            for index, name in sides:
                found[index] = rows.side(name, at[index])
            for index in slots:
                found[index] = rows.slots(at[index])
            return found

        alone = _JoinedRows([], torch.cat([values[self._hidden_at]] * size), size, values)
        compiled = self._compile(segment.graph, segment.structure, arguments(alone))
        return lambda rows: compiled(arguments(rows))[0]


class _JoinedRows:
    """Deferred tokens and, last, the step's own row, going through layers together.

    ``hidden`` [R, 1, H] with R = ``size``; the rows after the step's own repeat it.
    """

    def __init__(
        self, tokens: list[DeferredToken], hidden: Tensor, size: int, values: Values
    ) -> None:
        self.tokens, self.hidden, self.size, self.values = tokens, hidden, size, values
        self._own = size - len(tokens)
        self._made: dict[str, Tensor] = {}

    def run(self, layer: Callable[[_JoinedRows], Tensor]) -> Tensor:
        """One layer; returns the hidden state [1, 1, H] of the step's own row."""
        self.hidden = layer(self)
        row = len(self.tokens)
        return self.hidden[row : row + 1]

    def side(self, name: str, place: int) -> Tensor:
        """Side input ``name`` of all rows; ``place``: where the step's own is."""
        if name not in self._made:
            own = [self.values[place]] * self._own
            self._made[name] = torch.cat([*(token.sides[name] for token in self.tokens), *own])
        return self._made[name]

    def slots(self, place: int) -> Tensor:
        """Slots of all rows in the layer whose length is at ``place``."""
        own = [self.values[place].reshape(1)] * self._own
        return torch.cat([*(token.slots[place] for token in self.tokens), *own])


def _as_rows(hidden: Tensor) -> Tensor:
    """Hidden states [B, 1, H] as rows [1, B, H]."""
    return hidden if hidden.shape[0] == 1 else hidden.transpose(0, 1).contiguous()
