"""A split decoder made runnable: compiled segments with their weights, and the KV cache.

Segments exist for several row counts (buckets); rows that fill no bucket are padded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from eepass.runtime.cache.kv_cache import KvCache
from eepass.runtime.decoder.bound_segment import (
    BoundSegment,
    Compile,
    Compiled,
    bind_parameters,
)
from eepass.runtime.decoder.side_inputs import Place, Row, SideInputs
from eepass.segments import CONTEXT, ChainedLayers, ContextLayers, Link, Segment, SplitDecoder

# passes of more rows are chunks of a prompt
WIDEST_PASS = 64
# so many rows are normed one by one, by compiled code for one
FEW_NORMED = 8
# chunks of prompts have no fewer rows to be sooner done: each reads all weights
LEAST_CHUNK = 16
# some compiled code has it: layers that it is called for as one
Chainer = Callable[[Sequence[tuple[Compiled, Link]]], ChainedLayers | None]


class Decoder:
    """Runs layers of a decoder over a few rows, of one sequence or several.

    ``splits`` maps a row count to the decoder split for it; ``compile`` turns a graph into a
    function from the list of its inputs to its outputs; ``captured`` does so for the layers of
    captured steps, ``compile`` unless given. With ``spans`` those layers get masks that only say
    where rows attend as spans int64 [R, 3] (``eepass.masks``), which ``captured`` then handles.
    ``wide`` compiles layers over more than ``WIDEST_PASS`` rows, which are chunks of prompts and
    get a prefix int64 [3] in place of such masks (``eepass::prefix_mask``).
    """

    def __init__(
        self,
        splits: Mapping[int, SplitDecoder],
        compile: Compile,
        captured: Compile | None = None,
        spans: bool = False,
        wide: Compile | None = None,
    ) -> None:
        self.splits = dict(sorted(splits.items()))
        self.buckets = tuple(self.splits)
        first = self.splits[self.buckets[0]]
        self.num_layers = len(first.layers)
        self.hidden_size = first.hidden_size
        # of hidden states
        self.dtype = first.hidden_example.dtype
        self.cache_length = first.cache_length
        self.tensors = {name: tensor.detach() for name, tensor in first.tensors.items()}
        self.device = next(iter(self.tensors.values())).device
        self.compile, self.compile_captured = compile, captured or compile
        # row counts of chunks of prompts, the smallest of which is more than their padding
        self.chunks = tuple(rows for rows in self.buckets if wide and rows > WIDEST_PASS)
        self.compile_wide = wide
        # padding rows write behind the last token
        padding = (self.chunks or self.buckets[-1:])[0]
        self.capacity = self.cache_length - padding
        # positions the model has embeddings for, None where it has no table of them
        self.max_positions = first.positions
        self.num_positions = min(self.cache_length, self.max_positions or self.cache_length)
        self.max_sequence_length = min(self.capacity, self.num_positions)
        self.kv = self._new_cache(_kv_examples(first, self.device), padding)
        self.side_inputs = SideInputs(self.splits, self.tensors, self.capacity, self.chunks)
        if self.side_inputs.masks - self.side_inputs.windows.keys():
            # masks that are more than a prefix, such as biases, grow with the rows of a chunk
            self.chunks = self.chunks[:1]
        # the side inputs that captured layers take as spans
        self.spans = tuple(self.side_inputs.windows) if spans else ()
        # by row count, and whether they are captured
        self._layers: dict[tuple[int, bool], list[BoundSegment]] = {}
        # layers that attend to selected slots: by how many, and by row count
        self.context: dict[int, Mapping[int, ContextLayers]] = {}
        self._selecting: dict[tuple[int, int], list[BoundSegment]] = {}
        self._queries: dict[tuple[int, int], dict[int, BoundSegment]] = {}
        # by whether they are captured
        self._fills: dict[bool, list[BoundSegment]] = {}
        self._heads: dict[int, BoundSegment] = {}
        self._norm: BoundSegment | None = None
        # by row count and number of selected slots; None where layers are called one by one
        self._chains: dict[tuple[int, int], ChainedLayers | None] = {}
        # what changes with each pass, after the slots
        self._sides = [*self.side_inputs.tables, *sorted(self.side_inputs.masks)]

    @property
    def length_hint(self) -> str:
        """What to do about a text longer than ``max_sequence_length``."""
        if self.max_sequence_length == self.max_positions:
            return f"the model knows {self.max_positions} positions: shorten it"
        return "shorten it or raise max_length"

    def _new_cache(self, like: Sequence[tuple[Tensor, Tensor]], scratch: int) -> KvCache:
        return KvCache(like, scratch)

    def bucket(self, rows: int) -> int:
        """The smallest row count compiled for at least ``rows``."""
        return next(size for size in self.buckets if size >= rows)

    def chunk(self, left: int, room: int) -> int:
        """The row count of the next pass over a prompt with ``left`` tokens to go, where there are
        ``room`` slots for them and for padding: the most of those that are well filled."""
        few = [rows for rows in self.buckets if rows <= WIDEST_PASS or not self.chunks]
        if left <= few[-1]:
            size = self.bucket(left)
            # a CPU computes padding as any row: two chunks are sooner done where they are smaller
            halves = [rows for rows in few if rows >= LEAST_CHUNK and left <= 2 * rows < size]
            return halves[0] if halves and self.device.type == "cpu" else size
        filled = [rows for rows in self.chunks if rows < left + self.chunks[0] and rows <= room]
        return (filled or few)[-1]

    def prepare(self, rows: int, captured: bool = False) -> None:
        """Compile the layers for ``rows``, if they are not yet; ``captured``: those of steps."""
        if (rows, captured) not in self._layers:
            compile = self.compile_captured if captured else self.compile
            if rows > WIDEST_PASS and self.compile_wide is not None:
                compile = self.compile_wide
            place = self.captured_span(rows) if captured else None
            layers = [self._bind(layer, rows, compile, place) for layer in self.splits[rows].layers]
            self._layers[rows, captured] = layers

    def prepare_selecting(self, rows: int, slots: int) -> None:
        """Compile the layers of ``context`` that attend to ``slots`` slots for ``rows``, if they
        are not yet."""
        if (rows, slots) in self._selecting:
            return
        none = torch.full((rows, slots), -1, dtype=torch.int32, device=self.device)
        place = self.side_inputs.span(0, rows).selecting(none)
        self._selecting[rows, slots] = [
            self._bind(layer, rows, self.compile, place)
            for layer in self.context[slots][rows].layers
        ]

    def prepare_queries(self, rows: int, slots: int) -> None:
        """Compile what layers that select up to ``slots`` slots compute their queries by."""
        if (rows, slots) not in self._queries:
            self._queries[rows, slots] = {
                layer: self._bind(query.segment, rows, self.compile)
                for layer, query in self.context[slots][rows].queries.items()
            }

    def prepare_head(self, rows: int) -> None:
        """Compile the LM head for ``rows``, if it is not yet."""
        if rows not in self._heads:
            compile = partial(self.compile, logits=True)
            self._heads[rows] = self._bind(self.splits[rows].head.whole, rows, compile)

    def prepare_fills(self, captured: bool = False) -> None:
        """Compile ``fill_kv``, if it is not yet; ``captured``: that of steps."""
        if captured not in self._fills:
            compile = self.compile_captured if captured else self.compile
            self._fills[captured] = [self._bind(f, 1, compile) for f in self.splits[1].kv_fills]

    def prepare_passes(self, rows: int, slots: int | None = None) -> None:
        """Compile layers and LM head for every row count that passes of up to ``rows`` have; with
        ``slots`` also layers that attend to so many selected ones."""
        for size in self.buckets[: self.buckets.index(self.bucket(rows)) + 1]:
            self.prepare(size)
            self.prepare_head(size)
            if slots is not None:
                self.prepare_selecting(size, slots)
                self.prepare_queries(size, slots)

    def captured_span(self, rows: int, position: int = 0) -> Place:
        """``rows`` contiguous rows from ``position`` on, as captured layers take them."""
        place = self.side_inputs.span(position, rows)
        if not self.spans:
            return place
        positions = torch.arange(position, position + rows, device=self.device)
        masks = self.side_inputs.masks_at(positions, self.spans)
        return Place(place.slots, {**place.sides, **{name: masks[name] for name in self.spans}})

    def place(self, rows: Sequence[Row], size: int, end: int) -> Place:
        """Slots and side inputs of ``rows``, padded to ``size``; ``end``: where the slots of their
        sequence end.

        Contiguous rows of one sequence are cheap, if the padding fits behind them.
        """
        head = rows[0]
        if head.slot + size <= end and all(
            row.first == head.first
            and row.position == head.position + index
            and row.slot == row.first + row.position
            for index, row in enumerate(rows)
        ):
            return self.side_inputs.span(head.position, size, head.first)
        return self.side_inputs.gather(rows, size)

    def embed(self, ids: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """The hidden state before layer 0 [1, R, H] of ids and positions [1, R], R a bucket; the
        rows' slots are slots [R]."""
        split = self.splits[ids.shape[1]]
        given = {"ids": ids, "positions": positions}
        hidden, *sides = split.embed.run(
            lambda role: given[role.kind] if role.kind in given else self.tensors[role.name]
        )
        for name, value in zip(split.embed_outputs[1:], sides, strict=True):
            self.side_inputs.store(name, value, slots)
        return hidden

    def forward(
        self,
        tokens: Sequence[int],
        rows: Sequence[Row],
        end: int,
        on_layer: Callable[[int, Tensor], None] | None = None,
        size: int | None = None,
    ) -> Tensor:
        """Run ``tokens`` at ``rows`` through all layers; hidden state after the last [1, n, H], n
        their number.

        ``end``: as for ``place``. ``on_layer(layer, hidden)`` gets the hidden state [1, n, H] after
        each number of layers, from 0 on. ``size``: the bucket to run in, the smallest that fits by
        default.
        """
        count = len(tokens)
        size = self.bucket(count) if size is None else size
        place = self.place(rows, size, end)
        last = rows[-1].position
        positions = [row.position for row in rows]
        positions += [min(last + 1 + i, self.num_positions - 1) for i in range(size - count)]
        ids = [*tokens, *[tokens[-1]] * (size - count)]
        ids_tensor = torch.tensor([ids], device=self.device)
        positions_tensor = torch.tensor([positions], device=self.device)
        hidden = self.embed(ids_tensor, positions_tensor, place.slots)
        for layer in range(self.num_layers + 1):
            if layer:
                hidden = self.run_layer(layer - 1, hidden, place)
            if on_layer is not None:
                on_layer(layer, hidden[:, :count])
        return hidden[:, :count]

    def run_layer(self, layer: int, hidden: Tensor, place: Place, captured: bool = False) -> Tensor:
        """Hidden state [1, R, H] before layer number ``layer``, from 0 on, to the one after it; R a
        bucket. ``captured``: within a step.

        Writes keys and values of the rows to their slots; lengths are the caller's. Rows attend to
        selected slots alone where ``place`` has such.
        """
        return self._layers_for(hidden.shape[1], place, captured)[layer](hidden, place)

    def run_layers(
        self, begin: int, stops: Sequence[int], hidden: Tensor, place: Place
    ) -> list[Tensor]:
        """As ``run_layer``, of those from number ``begin`` on: the hidden state before each of
        ``stops``, ascending. Where the compiled layers allow it, in one call."""
        chain = self._chain(hidden.shape[1], place)
        if chain is not None:
            changing = [place.slots, *(place.sides[name] for name in self._changing(place))]
            return chain(begin, list(stops), hidden, changing)
        found = []
        for first, end in pairwise((begin, *stops)):
            for layer in range(first, end):
                hidden = self.run_layer(layer, hidden, place)
            found.append(hidden)
        return found

    def _layers_for(self, rows: int, place: Place, captured: bool = False) -> list[BoundSegment]:
        if slots := _num_selected(place):
            self.prepare_selecting(rows, slots)
            return self._selecting[rows, slots]
        self.prepare(rows, captured)
        return self._layers[rows, captured]

    def _changing(self, place: Place) -> list[str]:
        return [*self._sides, CONTEXT.name] if CONTEXT.name in place.sides else self._sides

    def _chain(self, rows: int, place: Place) -> ChainedLayers | None:
        key = rows, _num_selected(place)
        if key not in self._chains:
            layers, sides = self._layers_for(rows, place), self._changing(place)
            make: Chainer | None = getattr(layers[0].compiled, "chain", None)
            self._chains[key] = (
                None if make is None else make([(own.compiled, own.link(sides)) for own in layers])
            )
        return self._chains[key]

    def queries(self, layer: int, slots: int, hidden: Tensor, place: Place) -> Tensor:
        """Queries [Q, R, D] of a layer that selects up to ``slots`` slots, from the hidden state
        [1, R, H] before it."""
        rows = hidden.shape[1]
        self.prepare_queries(rows, slots)
        return self._queries[rows, slots][layer](hidden, place)[0]

    def fill_kv(self, layer: int, hidden: Tensor, place: Place, captured: bool = False) -> None:
        """Write keys and values of one row at ``layer``, projected from the hidden state [1, 1, H]
        of any layer; ``captured``: within a step."""
        self.prepare_fills(captured)
        self._fills[captured][layer](hidden, place)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [1, n, V] of hidden states after the last layer [1, n, H]."""
        rows = hidden.shape[1]
        if rows not in self.buckets:
            padding = hidden[:, -1:].expand(-1, self.bucket(rows) - rows, -1)
            return self.logits(torch.cat([hidden, padding], 1))[:, :rows]
        self.prepare_head(rows)
        return self._heads[rows](hidden, None)

    def normed(self, hidden: Tensor) -> Tensor:
        """Hidden states after the last layer [1, n, H] as the LM head's rows take them."""
        head, count = self.splits[1].head, hidden.shape[1]
        if count > FEW_NORMED or self.device.type != "cpu":
            return head.normed(hidden, self.tensors)
        if self._norm is None:
            assert head.norm is not None
            self._norm = self._bind(head.norm, 1, self.compile)
        rows = [self._norm(row, None) for row in hidden.split(1, 1)]
        return rows[0] if count == 1 else torch.cat(rows, 1)

    def bind(
        self, segment: Segment, extra: Mapping[str, Tensor], examples: Sequence[Tensor]
    ) -> Callable[..., Any]:
        """``bind_parameters`` with the model's tensors and ``extra``."""
        return bind_parameters(segment, {**self.tensors, **extra}, self.compile, examples)

    def _bind(
        self, segment: Segment, rows: int, compile: Compile, place: Place | None = None
    ) -> BoundSegment:
        bound = BoundSegment(segment, self.tensors, self.kv)
        hidden = torch.zeros(1, rows, self.hidden_size, dtype=self.dtype, device=self.device)
        examples = bound.arguments(hidden, place or self.side_inputs.span(0, rows))
        bound.compiled = compile(segment.graph, segment.structure, examples)
        return bound


def _num_selected(place: Place) -> int:
    """How many slots are selected for a row; 0 where rows attend to all."""
    slots = place.sides.get(CONTEXT.name)
    return 0 if slots is None else slots.shape[1]


def _kv_examples(split: SplitDecoder, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for layer in split.layers:
        # a layer without keys or values gets ones of no width
        found = dict.fromkeys(("keys", "values"), torch.empty(1, 0, split.cache_length, 0))
        for role, like in layer.examples.items():
            if role.kind in found:
                # examples may be on no device; the cache is where the weights are
                found[role.kind] = torch.empty(like.shape, dtype=like.dtype, device=device)
        pairs.append((found["keys"], found["values"]))
    return pairs
