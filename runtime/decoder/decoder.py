"""A split decoder made runnable: compiled segments, their weights bound, its KV cache.

Segments exist for several row counts (buckets); rows that fill no bucket are padded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eepass.runtime.cache.kv_cache import KvCache
from eepass.runtime.decoder.side_inputs import Place, Row, SideInputs
from eepass.segments import Segment, SplitDecoder

Compiled = Callable[[list[Tensor]], Sequence[Tensor]]
Compile = Callable[..., Compiled]


class Decoder:
    """Runs layers of a decoder over a few rows, of one sequence or several.

    ``splits`` maps a row count to the decoder split for it; ``compile`` turns a graph into a
    function from the list of its inputs to its outputs.
    """

    def __init__(self, splits: Mapping[int, SplitDecoder], compile: Compile) -> None:
        self.splits = dict(sorted(splits.items()))
        self.buckets = tuple(self.splits)
        first = self.splits[self.buckets[0]]
        self.num_layers = len(first.layers)
        self.hidden_size = first.hidden_size
        # of boundaries
        self.dtype = first.hidden_example.dtype
        self.cache_length = first.cache_length
        self.tensors = {name: tensor.detach() for name, tensor in first.tensors.items()}
        self.device = next(iter(self.tensors.values())).device
        self.compile = compile
        # what padding rows write lies past the last token
        self.capacity = self.cache_length - self.buckets[-1]
        # positions the model knows, and so the longest sequence
        self.known = first.positions
        self.positions = min(self.cache_length, self.known or self.cache_length)
        self.longest = min(self.capacity, self.positions)
        self.kv = self._new_cache(_kv_examples(first), self.buckets[-1])
        self.side_inputs = SideInputs(self.splits, self.tensors, self.capacity)
        self._layers: dict[int, list[_Bound]] = {}
        self._fills: list[_Bound] = []
        self._heads: dict[int, _Bound] = {}

    @property
    def remedy(self) -> str:
        """What to do where ``longest`` is too short."""
        if self.longest < self.capacity or self.longest == self.known:
            return f"the model knows {self.known} positions: shorten it"
        return "shorten it or raise max_length"

    def _new_cache(self, like: Sequence[tuple[Tensor, Tensor]], scratch: int) -> KvCache:
        return KvCache(like, scratch)

    def bucket(self, rows: int) -> int:
        """The smallest row count compiled for at least ``rows``."""
        return next(size for size in self.buckets if size >= rows)

    def prepare(self, rows: int) -> None:
        """Compile what a pass of ``rows`` needs, if it is not yet."""
        if rows not in self._layers:
            split = self.splits[rows]
            self._layers[rows] = [self._bind(layer, rows) for layer in split.layers]

    def place(self, rows: Sequence[Row], size: int, end: int) -> Place:
        """Where ``rows`` stand, padded to ``size``; ``end``: where their sequence's region ends.

        Neighbours in a region that begins at slot 0 are cheap, if the padding fits behind them.
        """
        head = rows[0]
        if head.slot + size <= end and all(
            row.first == 0 and row.slot == row.position == head.slot + index
            for index, row in enumerate(rows)
        ):
            return self.side_inputs.span(head.slot, size)
        return self.side_inputs.gather(rows, size)

    def embed(self, ids: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """Boundary 0 [1, R, H] of ids and positions [1, R], R a bucket, written to slots [R]."""
        split = self.splits[ids.shape[1]]
        arguments = []
        for role in split.embed.inputs:
            if role.kind == "ids":
                arguments.append(ids)
            elif role.kind == "positions":
                arguments.append(positions)
            else:
                arguments.append(self.tensors[role.name])
        outputs = split.embed.graph(*arguments)
        if isinstance(outputs, Tensor):
            return outputs
        for name, value in zip(split.embed_outputs[1:], outputs[1:], strict=True):
            self.side_inputs.store(name, value, slots)
        return outputs[0]

    def forward(
        self,
        tokens: Sequence[int],
        rows: Sequence[Row],
        end: int,
        on_layer: Callable[[int, Tensor], None] | None = None,
        size: int | None = None,
    ) -> Tensor:
        """Run ``tokens`` through all layers where ``rows`` say; last boundary [1, n, H], n their
        number.

        ``end``: as for ``place``. ``on_layer(layer, hidden)`` sees each boundary [1, n, H].
        ``size``: the bucket to run in, the smallest that fits by default.
        """
        count = len(tokens)
        size = self.bucket(count) if size is None else size
        place = self.place(rows, size, end)
        last = rows[-1].position
        positions = [row.position for row in rows]
        positions += [min(last + 1 + i, self.positions - 1) for i in range(size - count)]
        ids = [*tokens, *[tokens[-1]] * (size - count)]
        hidden = self.embed(self._ids(ids), self._ids(positions), place.slots)
        for layer in range(self.num_layers + 1):
            if layer:
                hidden = self.run_layer(layer - 1, hidden, place)
            if on_layer is not None:
                on_layer(layer, hidden[:, :count])
        return hidden[:, :count]

    def _ids(self, values: Sequence[int]) -> Tensor:
        return torch.tensor([values], device=self.device)

    def run_layer(self, layer: int, hidden: Tensor, place: Place) -> Tensor:
        """Boundary ``layer`` -> ``layer + 1`` for hidden [1, R, H], R a bucket.

        Writes keys and values of the rows to their slots; lengths are the caller's.
        """
        rows = hidden.shape[1]
        if rows not in self._layers:
            self.prepare(rows)
        return self._layers[rows][layer](hidden, place)

    def fill_kv(self, layer: int, hidden: Tensor, place: Place) -> None:
        """Keys and values of one row at ``layer`` from whatever boundary [1, 1, H] is given."""
        if not self._fills:
            self._fills = [self._bind(fill, 1) for fill in self.splits[1].kv_fills]
        self._fills[layer](hidden, place)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [1, R, V] of last boundaries [1, R, H], R a bucket."""
        rows = hidden.shape[1]
        if rows not in self._heads:
            self._heads[rows] = self._bind(self.splits[rows].head.whole, rows, logits=True)
        return self._heads[rows](hidden, None)

    def bind(
        self, segment: Segment, extra: Mapping[str, Tensor], examples: Sequence[Tensor]
    ) -> Any:
        """``segment`` compiled, its parameters bound from the model's and ``extra``'s tensors.

        The result takes the segment's other inputs in order; returns the tuple of its outputs.
        """
        tensors = {**self.tensors, **extra}
        parameters = [tensors[r.name] for r in segment.inputs if r.kind == "parameter"]
        compiled = self.compile(segment.graph, segment.structure, [*examples, *parameters])
        return lambda *inputs: compiled([*inputs, *parameters])

    def _bind(self, segment: Segment, rows: int, logits: bool = False) -> _Bound:
        bound = _Bound(segment, self.tensors, self.kv)
        hidden = torch.zeros(1, rows, self.hidden_size, dtype=self.dtype, device=self.device)
        examples = bound.arguments(hidden, self.side_inputs.span(0, rows))
        bound.compiled = self.compile(segment.graph, segment.structure, examples, logits=logits)
        return bound


class _Bound:
    """A segment with its weights and cache in place; the rest is filled in per call."""

    def __init__(self, segment: Segment, tensors: Mapping[str, Tensor], kv: KvCache) -> None:
        self.compiled: Compiled = _not_compiled
        self.template: list[Any] = []
        self.hidden_at = -1
        self.slots_at: list[int] = []
        self.side_at: list[tuple[int, str]] = []
        for place, role in enumerate(segment.inputs):
            value: Any = None
            if role.kind == "parameter":
                value = tensors[role.name]
            elif role.kind == "keys":
                value = kv.keys[role.layer]
            elif role.kind == "values":
                value = kv.values[role.layer]
            elif role.kind == "state":
                value = kv.states[role.name]
            elif role.kind == "hidden":
                self.hidden_at = place
            elif role.kind == "slots":
                self.slots_at.append(place)
            else:
                self.side_at.append((place, role.name))
            self.template.append(value)

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

    def __call__(self, hidden: Tensor, place: Place | None) -> Tensor:
        return self.compiled(self.arguments(hidden, place))[0]


def _kv_examples(split: SplitDecoder) -> list[tuple[Tensor, Tensor]]:
    device = next(iter(split.tensors.values())).device
    pairs = []
    for layer in split.layers:
        # a layer that keeps none has none of no width
        found = dict.fromkeys(("keys", "values"), torch.empty(1, 0, split.cache_length, 0))
        for node, role in zip(
            layer.graph.graph.find_nodes(op="placeholder"), layer.inputs, strict=True
        ):
            if role.kind in found:
                # shapes may be of no device; the cache lies where the weights do
                found[role.kind] = _real(node.meta["val"], device)
        pairs.append((found["keys"], found["values"]))
    return pairs


def _real(fake: Tensor, device: torch.device) -> Tensor:
    return torch.empty(fake.shape, dtype=fake.dtype, device=device)


def _not_compiled(inputs: list[Tensor]) -> Sequence[Tensor]:
    raise RuntimeError("this segment was not compiled")
