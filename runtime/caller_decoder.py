"""A decode step over a cache that is the caller's: keys, values and lengths come with each call.

The layers run one by one, as in the engine's own loop, until every row of the batch knows its
answer; then the layers left out get their keys and values from the boundary the step left at, so
that whoever reads the cache next finds every slot filled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eepass.plan import CallerStep, Piece, SplitDecoder
from eepass.runtime.exits import Exits, RowState
from eepass.runtime.statistics import Statistics

Compiled = Callable[[list[Tensor]], Sequence[Tensor]]
Compile = Callable[..., Compiled]


class Weights:
    """What exits need of a decoder: its split, its tensors as they are now, a compiler."""

    def __init__(self, step: CallerStep, tensors: Sequence[Tensor], compile: Compile) -> None:
        self.splits: Mapping[int, SplitDecoder] = {1: step.split}
        self.num_layers = len(step.split.layers)
        self.hidden_size = step.split.hidden_size
        self.tensors = {
            role.name: tensors[place].detach()
            for role, place in step.places.items()
            if role.kind == "parameter"
        }
        self.compile = compile

    def bind(self, piece: Piece, extra: Mapping[str, Tensor], examples: Sequence[Tensor]) -> Any:
        """As ``Decoder.bind``."""
        tensors = {**self.tensors, **extra}
        parameters = [tensors[r.name] for r in piece.inputs if r.kind == "parameter"]
        compiled = self.compile(piece.graph, piece.structure, [*examples, *parameters])
        return lambda *inputs: compiled([*inputs, *parameters])


class CallerExits:
    """When a step may leave, and with which logits [B, 1, V].

    ``full`` maps z [1, n, H] to logits of the whole vocabulary [1, n, V]; without it, logits are
    those of the hot vocabulary and −inf elsewhere.
    """

    def __init__(self, exits: Exits, step: CallerStep, full: Callable[..., Any] | None) -> None:
        self.exits, self.full = exits, full
        self.batch, self.like = step.batch, step.logits
        self.asked = list(range(step.batch))
        self.layers = frozenset(exits.thresholds)
        if full is not None:
            # the logits of the last layer are what the caller asked for
            self.layers -= {len(step.split.layers)}

    def prepare(self) -> None:
        self.exits.prepare(self.batch)

    def check(
        self, layer: int, hidden: Tensor, state: RowState, statistics: Statistics
    ) -> tuple[Tensor | None, RowState]:
        """Logits if all rows of hidden [1, B, H] know their answer after ``layer``."""
        seen: list[Tensor] = []

        def keep(logits: Tensor) -> Tensor:
            seen[:] = [logits]
            return logits.argmax(-1)

        choose = keep if self.full is None else None
        found, state = self.exits.check(layer, hidden, state, self.asked, statistics, choose)
        if len(found.answers) < self.batch:
            return None, state
        if self.full is None:
            return self._among_hot(seen[0][: self.batch]), state
        (logits,) = self.full(found.z[None, : self.batch])
        answers = logits[0].argmax(-1)
        if not bool((answers[:, None] == state.drafts).any(-1).all()):
            # the hot vocabulary was sure, the whole one knows better
            statistics.refused += self.batch
            return None, state
        return logits.transpose(0, 1).to(self.like.dtype), state

    def _among_hot(self, hot: Tensor) -> Tensor:
        shape, dtype = self.like.shape, self.like.dtype
        made = torch.full(shape, -torch.inf, dtype=dtype, device=hot.device)
        made[:, 0, self.exits.hot_ids] = hot.to(dtype)
        return made


class CallerDecoder:
    """The pieces of a ``CallerStep``, compiled, run over the tensors of each call."""

    def __init__(self, step: CallerStep, tensors: Sequence[Tensor], compile: Compile) -> None:
        """``tensors``: those of one call, as examples; nothing is written to them."""
        self.step = step
        split = step.split
        self.num_layers = len(split.layers)
        at = len(tensors)
        names = [*split.embed_outputs[1:], *split.side_outputs]
        self._side_at = {name: at + i for i, name in enumerate(names)} | dict(step.passed)
        self._hidden_at = at + len(names)
        values: list[Any] = [*tensors, *[None] * (len(names) + 1)]
        hidden, *tokens = _eager(split.embed, self._arguments(split.embed, values))
        values[at : at + len(tokens)] = tokens
        sides = _eager(split.positional, self._arguments(split.positional, values))
        values[at + len(tokens) :] = [*sides, hidden]

        def bind(piece: Piece) -> Callable[[list[Any]], Sequence[Tensor]]:
            indices = self._indices(piece)
            examples = [values[i] for i in indices]
            compiled = compile(piece.graph, piece.structure, examples)
            return lambda values: compiled([values[i] for i in indices])

        self._embed = bind(split.embed)
        self._positional = bind(split.positional) if split.side_outputs else _nothing
        self._layers = [bind(layer) for layer in split.layers]
        self._fills = [bind(fill) for fill in split.kv_fills]
        self._head = bind(split.head.whole)
        self._spare: list[Any] = [None] * (len(names) + 1)
        self._tokens = slice(at, at + len(split.embed_outputs) - 1)
        self._sides = slice(at + len(split.embed_outputs) - 1, self._hidden_at)

    def __call__(
        self,
        tensors: Sequence[Tensor],
        exits: CallerExits | None,
        active: frozenset[int],
        statistics: Statistics,
    ) -> tuple[Tensor, int]:
        """Logits [B, 1, V] and the layers they took; writes keys, values and lengths in place."""
        values = [*tensors, *self._spare]
        hidden, *values[self._tokens] = self._embed(values)
        values[self._sides] = self._positional(values)
        state = exits.exits.begin(self.step.batch) if exits is not None else None
        logits: Tensor | None = None
        boundary = 0
        for layer in self._layers:
            values[self._hidden_at] = hidden
            (hidden,) = layer(values)
            boundary += 1
            if exits is None or state is None:
                continue
            rows = hidden if self.step.batch == 1 else hidden.transpose(0, 1).contiguous()
            if boundary == exits.exits.plan.draft_layer:
                state = exits.exits.draft_from(rows, state, statistics)
            if boundary in active:
                logits, state = exits.check(boundary, rows, state, statistics)
                if logits is not None:
                    break
        values[self._hidden_at] = hidden
        for fill in self._fills[boundary:]:
            fill(values)
        if logits is None:
            (logits,) = self._head(values)
            statistics.full_heads += self.step.batch
        self._advance(tensors)
        return logits, boundary

    def _advance(self, tensors: Sequence[Tensor]) -> None:
        for place, rows in self.step.advance:
            tensors[place].add_(rows)

    def _indices(self, piece: Piece) -> list[int]:
        return [
            self._hidden_at
            if role.kind == "hidden"
            else self._side_at[role.name]
            if role.kind == "side"
            else self.step.places[role]
            for role in piece.inputs
        ]

    def _arguments(self, piece: Piece, values: Sequence[Any]) -> list[Any]:
        return [values[i] for i in self._indices(piece)]


def _eager(piece: Piece, arguments: Sequence[Tensor]) -> list[Tensor]:
    result = piece.graph(*arguments)
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _nothing(values: Sequence[Any]) -> Sequence[Tensor]:
    return ()
