"""A split decoder made runnable: compiled pieces, their weights bound, its KV cache.

Pieces exist for several row counts (buckets). What depends on positions or masks alone is tabled
once for the whole cache, so a pass only slices it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eepass.plan import Piece, SplitDecoder, causal_mask
from eepass.runtime.kv_cache import KvCache

Compiled = Callable[[list[Tensor]], Sequence[Tensor]]
Compile = Callable[..., Compiled]


class Decoder:
    """Runs layers of a decoder over a few rows of one sequence.

    ``splits`` maps a row count to the decoder split for it; ``compile`` turns a graph into a
    function from the list of its inputs to its outputs.
    """

    def __init__(self, splits: Mapping[int, SplitDecoder], compile: Compile) -> None:
        self.splits = dict(sorted(splits.items()))
        self.buckets = tuple(self.splits)
        first = self.splits[self.buckets[0]]
        self.num_layers = len(first.layers)
        self.hidden_size = first.hidden_size
        self.cache_length = first.cache_length
        self.tensors = {name: tensor.detach() for name, tensor in first.tensors.items()}
        self.compile = compile
        self.kv = KvCache(_kv_examples(first))
        # padding rows are written past the last token
        self.capacity = self.cache_length - self.buckets[-1] + 1
        self._starts = torch.arange(self.cache_length + 1).unbind()
        self._tables = _SideTables(self.splits, self.tensors)
        self._layers: dict[int, list[_Bound]] = {}
        self._fills: list[_Bound] = []
        self._head: _Bound | None = None

    def bucket(self, rows: int) -> int:
        """The smallest row count compiled for at least ``rows``."""
        return next(size for size in self.buckets if size >= rows)

    def prepare(self, rows: int) -> None:
        """Compile what a pass of ``rows`` needs, if it is not yet."""
        if rows not in self._layers:
            split = self.splits[rows]
            self._layers[rows] = [self._bind(layer, rows) for layer in split.layers]

    def embed(self, ids: Tensor, position: int) -> Tensor:
        """Boundary 0 [1, R, H] of token ids [1, R] at ``position`` onwards; R is a bucket."""
        rows = ids.shape[1]
        split = self.splits[rows]
        arguments = []
        for role in split.embed.inputs:
            if role.kind == "ids":
                arguments.append(ids)
            elif role.kind == "positions":
                arguments.append(torch.arange(position, position + rows)[None])
            else:
                arguments.append(self.tensors[role.name])
        outputs = split.embed.graph(*arguments)
        if isinstance(outputs, Tensor):
            return outputs
        for name, value in zip(split.embed_outputs[1:], outputs[1:], strict=True):
            self._tables.store(name, value, position)
        return outputs[0]

    def run_layer(self, layer: int, hidden: Tensor, slot: int, position: int) -> Tensor:
        """Boundary ``layer`` -> ``layer + 1`` for hidden [1, R, H], R a bucket.

        Writes keys and values of the R rows from ``slot`` on; lengths are the caller's.
        """
        rows = hidden.shape[1]
        if rows not in self._layers:
            self.prepare(rows)
        bound = self._layers[rows][layer]
        return bound(hidden, self._starts[slot], self._tables.at(slot, position, rows))

    def fill_kv(self, layer: int, hidden: Tensor, slot: int, position: int) -> None:
        """Keys and values of one row at ``layer`` from whatever boundary [1, 1, H] is given."""
        if not self._fills:
            self._fills = [self._bind(fill, 1) for fill in self.splits[1].kv_fills]
        self._fills[layer](hidden, self._starts[slot], self._tables.at(slot, position, 1))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [1, 1, V] of the last boundary [1, 1, H]."""
        if self._head is None:
            self._head = self._bind(self.splits[1].head.whole, 1, logits=True)
        return self._head(hidden, None, {})

    def bind(self, piece: Piece, extra: Mapping[str, Tensor], examples: Sequence[Tensor]) -> Any:
        """``piece`` compiled, its parameters bound from the model's and ``extra``'s tensors.

        The result takes the piece's other inputs in order; returns the tuple of its outputs.
        """
        tensors = {**self.tensors, **extra}
        parameters = [tensors[r.name] for r in piece.inputs if r.kind == "parameter"]
        compiled = self.compile(piece.graph, piece.structure, [*examples, *parameters])
        return lambda *inputs: compiled([*inputs, *parameters])

    def _bind(self, piece: Piece, rows: int, logits: bool = False) -> _Bound:
        bound = _Bound(piece, self.tensors, self.kv)
        hidden = torch.zeros(1, rows, self.hidden_size, dtype=self._dtype())
        examples = bound.arguments(hidden, self._starts[0], self._tables.at(0, 0, rows))
        bound.compiled = self.compile(piece.graph, piece.structure, examples, logits=logits)
        return bound

    def _dtype(self) -> torch.dtype:
        return self.kv.keys[0].dtype


class _Bound:
    """A piece with its weights and cache in place; the rest is filled in per call."""

    def __init__(self, piece: Piece, tensors: Mapping[str, Tensor], kv: KvCache) -> None:
        self.compiled: Compiled = _not_compiled
        self.template: list[Any] = []
        self.hidden_at = -1
        self.start_at: list[int] = []
        self.side_at: list[tuple[int, str]] = []
        for place, role in enumerate(piece.inputs):
            value: Any = None
            if role.kind == "parameter":
                value = tensors[role.name]
            elif role.kind == "keys":
                value = kv.keys[role.layer]
            elif role.kind == "values":
                value = kv.values[role.layer]
            elif role.kind == "hidden":
                self.hidden_at = place
            elif role.kind == "start":
                self.start_at.append(place)
            else:
                self.side_at.append((place, role.name))
            self.template.append(value)

    def arguments(self, hidden: Tensor, start: Tensor | None, sides: Mapping[str, Tensor]) -> list:
        arguments = self.template.copy()
        if self.hidden_at >= 0:
            arguments[self.hidden_at] = hidden
        for place in self.start_at:
            arguments[place] = start
        for place, name in self.side_at:
            arguments[place] = sides[name]
        return arguments

    def __call__(self, hidden: Tensor, start: Tensor | None, sides: Mapping[str, Tensor]) -> Tensor:
        return self.compiled(self.arguments(hidden, start, sides))[0]


class _SideTables:
    """Side inputs for every position of the cache, sliced per pass.

    Rotary values go by a token's position, masks by its slot; the two differ only where skipped
    layers leave holes (KV policy ``drop``), and there sliding windows go by slots.
    """

    def __init__(self, splits: Mapping[int, SplitDecoder], tensors: Mapping[str, Tensor]) -> None:
        one, many = splits[min(splits)], splits[max(splits)]
        self.tables: dict[str, Tensor] = {}
        self.row_dim: dict[str, int] = {}
        self.by_slot = _mask_sides(one)
        self._slices: dict[tuple[int, int, int], dict[str, Tensor]] = {}
        outputs = {"side": (one.side_outputs, one.positional, many.positional)}
        for names, small, large in outputs.values():
            for name, dim in zip(names, _row_dims(small, large), strict=True):
                self.row_dim[name] = dim
        for name, dim in zip(one.embed_outputs, _row_dims(one.embed, many.embed), strict=True):
            self.row_dim[name] = dim
        self._fill(many, tensors)

    def at(self, slot: int, position: int, rows: int) -> dict[str, Tensor]:
        """Side inputs of ``rows`` rows; all layers of a pass share the answer."""
        key = (slot, position, rows)
        if key not in self._slices:
            # a pass asks for few distinct starts; what an older pass asked for is gone
            if len(self._slices) > 16:
                self._slices.clear()
            self._slices[key] = {
                name: table.narrow(
                    self.row_dim[name], slot if name in self.by_slot else position, rows
                )
                for name, table in self.tables.items()
            }
        return self._slices[key]

    def store(self, name: str, value: Tensor, position: int) -> None:
        """Keep a side value that depends on the tokens themselves."""
        dim = self.row_dim[name]
        if name not in self.tables:
            shape = list(value.shape)
            shape[dim] = next(iter(self.tables.values())).shape[-1]
            self.tables[name] = value.new_zeros(shape)
            self._slices.clear()
        self.tables[name].narrow(dim, position, value.shape[dim]).copy_(value)

    def _fill(self, split: SplitDecoder, tensors: Mapping[str, Tensor]) -> None:
        dtype = split.layers[0].graph.graph.output_node().all_input_nodes[0].meta["val"].dtype
        rows, slots = split.rows, split.cache_length
        chunks: list[list[Tensor]] = []
        for start in range(0, slots, rows):
            arguments = []
            for role in split.positional.inputs:
                if role.kind == "mask":
                    window = split.windows[role.name]
                    arguments.append(causal_mask(rows, slots, window, dtype, start=start))
                elif role.kind == "positions":
                    arguments.append(torch.arange(start, start + rows)[None])
                else:
                    arguments.append(tensors[role.name])
            made = split.positional.graph(*arguments)
            chunks.append([made] if isinstance(made, Tensor) else list(made))
        for index, name in enumerate(split.side_outputs):
            dim = self.row_dim[name]
            table = torch.cat([chunk[index] for chunk in chunks], dim)
            self.tables[name] = table.narrow(dim, 0, slots).contiguous()


def _row_dims(one: Piece, many: Piece) -> list[int]:
    """The dimension of each output that grew from one traced row count to the other."""
    dims = []
    for small, large in zip(_outputs(one), _outputs(many), strict=True):
        grown = [d for d, (a, b) in enumerate(zip(small.shape, large.shape, strict=True)) if a != b]
        dims.append(grown[0] if grown else 0)
    return dims


def _outputs(piece: Piece) -> list[Tensor]:
    return [node.meta["val"] for node in piece.graph.graph.output_node().all_input_nodes]


def _mask_sides(split: SplitDecoder) -> set[str]:
    graph = split.positional.graph.graph
    reached = {
        node
        for node, role in zip(
            graph.find_nodes(op="placeholder"), split.positional.inputs, strict=True
        )
        if role.kind == "mask"
    }
    for node in graph.nodes:
        if any(arg in reached for arg in node.all_input_nodes):
            reached.add(node)
    outputs = graph.output_node().all_input_nodes
    return {name for name, node in zip(split.side_outputs, outputs, strict=True) if node in reached}


def _kv_examples(split: SplitDecoder) -> list[tuple[Tensor, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    for layer in split.layers:
        for node, role in zip(
            layer.graph.graph.find_nodes(op="placeholder"), layer.inputs, strict=True
        ):
            if role.kind in ("keys", "values"):
                found.setdefault(role.layer, {})[role.kind] = node.meta["val"]
    return [(_real(found[i]["keys"]), _real(found[i]["values"])) for i in sorted(found)]


def _real(fake: Tensor) -> Tensor:
    return torch.empty(fake.shape, dtype=fake.dtype, device=fake.device)


def _not_compiled(inputs: list[Tensor]) -> Sequence[Tensor]:
    raise RuntimeError("this piece was not compiled")
