"""Where the rows of a pass stand: their slots, and the side inputs that follow from positions.

What depends on positions or masks alone is tabled once for the whole cache. Rows that are
neighbours and see all before them get slices of the tables; others (drafts in a tree, several
sequences in one pass) get theirs gathered, their masks put together slot by slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eepass.plan import Piece, SplitDecoder, causal_mask


class Row(NamedTuple):
    """One row of a pass.

    It sees the slots from ``first`` up to its position less ``len(over)``, and those in ``over``
    (the drafts it follows, itself the last). ``position`` counts tokens from ``first``.
    """

    first: int
    position: int
    slot: int
    over: tuple[int, ...] = ()


class Place(NamedTuple):
    """Slots [R] and side inputs by name for the rows of a pass, padding included."""

    slots: Tensor
    sides: Mapping[str, Tensor]


class SideInputs:
    """Tables of side inputs for the positions of a cache, and ``Place``s made from them.

    Rotary values and sliding windows go by a token's position, which in a tree is not its slot.
    """

    def __init__(
        self, splits: Mapping[int, SplitDecoder], tensors: Mapping[str, Tensor], scratch: int
    ) -> None:
        one, many = splits[min(splits)], splits[max(splits)]
        self.slots = one.cache_length
        self.scratch = scratch
        self.tables: dict[str, Tensor] = {}
        self.row_dim: dict[str, int] = {}
        self.masks = _mask_sides(one)
        self.by_token: set[str] = set(one.embed_outputs[1:])
        self.device = next(iter(tensors.values())).device
        self._all_slots = torch.arange(self.slots, device=self.device)
        self._spans: dict[tuple[int, int], Place] = {}
        for names, small, large in (
            (one.side_outputs, one.positional, many.positional),
            (one.embed_outputs, one.embed, many.embed),
        ):
            self.row_dim |= dict(zip(names, _row_dims(small, large), strict=True))
        self._fill(many, tensors)

    def span(self, slot: int, rows: int) -> Place:
        """``rows`` neighbours from ``slot`` on, each seeing all before it; layers share it."""
        key = (slot, rows)
        if key not in self._spans:
            # a pass asks for few distinct starts; what an older pass asked for is gone
            if len(self._spans) > 16:
                self._spans.clear()
            sides = {
                name: table.narrow(self.row_dim[name], slot, rows)
                for name, table in self.tables.items()
            }
            self._spans[key] = Place(self._all_slots[slot : slot + rows], sides)
        return self._spans[key]

    def gather(self, rows: Sequence[Row], size: int) -> Place:
        """Any rows, padded to ``size``; padding rows see and write a slot of scratch each."""
        padding = size - len(rows)
        spare = range(self.scratch, self.scratch + padding)
        slots = self._tensor([row.slot for row in rows] + list(spare))
        positions = self._tensor([row.position for row in rows] + [0] * padding)
        sides = {}
        for name, table in self.tables.items():
            dim = self.row_dim[name]
            if name in self.masks:
                sides[name] = self._masks(table, dim, rows, spare)
            else:
                sides[name] = table.index_select(dim, slots if name in self.by_token else positions)
        return Place(slots, sides)

    def store(self, name: str, value: Tensor, slots: Tensor) -> None:
        """Keep a side value that depends on the tokens themselves, by their slots [R]."""
        dim = self.row_dim[name]
        if name not in self.tables:
            shape = list(value.shape)
            shape[dim] = self.slots
            self.tables[name] = value.new_zeros(shape)
            self._spans.clear()
        self.tables[name].index_copy_(dim, slots, value)

    def _masks(self, table: Tensor, dim: int, rows: Sequence[Row], spare: range) -> Tensor:
        by_row = table.movedim(dim, 0)  # [C, ..., C]
        size = len(rows) + len(spare)
        # the first position sees nothing after itself
        forbidden = by_row[0, ..., -1:]
        made = forbidden.expand(by_row.shape[1:]).repeat(size, *[1] * (by_row.ndim - 1))
        # rows of one tree see the same line of slots up to its root
        lines: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(rows):
            lines.setdefault((row.first, row.position + 1 - len(row.over)), []).append(index)
        for (first, seen), members in lines.items():
            positions = self._tensor([rows[index].position for index in members])
            made[members, ..., first : first + seen] = by_row[positions, ..., :seen]
        # what a row sees in a slot goes by the position of the token there (biases, windows)
        over = [
            (index, slot, row.position, row.position - len(row.over) + 1 + depth)
            for index, row in enumerate(rows)
            for depth, slot in enumerate(row.over)
        ]
        over += [(index, slot, 0, 0) for index, slot in enumerate(spare, len(rows))]
        if over:
            made_rows, slots, positions, seen_positions = self._tensor(over).unbind(1)
            # advanced indices in front and behind: what lies between comes last
            made[made_rows, ..., slots] = by_row[positions, ..., seen_positions]
        return made.movedim(0, dim).contiguous()

    def _tensor(self, values: Sequence[int | tuple[int, ...]]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def _fill(self, split: SplitDecoder, tensors: Mapping[str, Tensor]) -> None:
        dtype = split.layers[0].graph.graph.output_node().all_input_nodes[0].meta["val"].dtype
        rows, slots = split.rows, split.cache_length
        chunks: list[list[Tensor]] = []
        for start in range(0, slots, rows):
            arguments = []
            for role in split.positional.inputs:
                if role.kind == "mask":
                    window = split.windows[role.name]
                    arguments.append(causal_mask(rows, slots, window, dtype, self.device, start))
                elif role.kind == "positions":
                    at = torch.arange(start, start + rows, device=self.device)
                    arguments.append(at[None])
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
