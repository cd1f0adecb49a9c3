"""Where the rows of a pass stand: their slots, and the side inputs that follow from positions.

What depends on positions alone is tabled once for the whole cache. A mask's row is as long as the
cache, so masks are made a chunk of rows at a time, and the chunks in use are kept. Rows that are
neighbours and see all before them get slices of either; others (drafts in a tree, several
sequences in one pass) get theirs gathered, their masks put together slot by slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eepass.masks import causal_mask
from eepass.segments import Segment, SplitDecoder

# chunks of masks that are kept: as many as a pass may hold sequences
KEPT = 32


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
    """Side inputs for the positions of a cache, and ``Place``s made from them.

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
        known = (one.positions or self.slots) - 1
        self._positions = torch.arange(self.slots, device=self.device).clamp(max=known)
        self._spans: dict[tuple[int, int], Place] = {}
        for names, small, large in (
            (one.side_outputs, one.positional, many.positional),
            (one.embed_outputs, one.embed, many.embed),
        ):
            self.row_dim |= dict(zip(names, _row_dims(small, large), strict=True))
        # what makes them, for so many rows at a time
        self._maker, self._tensors = many, tensors
        # by place in the cache, the one used last at the end
        self._mask_chunks: dict[int, dict[str, Tensor]] = {}
        self._fill()

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
            sides |= {name: self._mask_rows(name, slot, rows) for name in self.masks}
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
            at = slots if name in self.by_token else positions
            sides[name] = table.index_select(self.row_dim[name], at)
        sides |= {name: self._gathered_mask(name, rows, spare) for name in self.masks}
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

    def whole_masks(self) -> dict[str, Tensor]:
        """Every row of every mask, the square of the cache: for steps that look rows up by
        positions the host does not know."""
        made = {name: self._mask_rows(name, 0, self.slots) for name in self.masks}
        self._mask_chunks.clear()
        return made

    def _mask_rows(self, name: str, first: int, count: int) -> Tensor:
        """Rows ``first`` onwards of a mask, each as if its sequence began at slot 0."""
        dim, parts = self.row_dim[name], []
        while count:
            chunk, at = divmod(first, self._maker.rows)
            taken = min(count, self._maker.rows - at)
            parts.append(self._mask_chunk(chunk)[name].narrow(dim, at, taken))
            first, count = first + taken, count - taken
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def _mask_chunk(self, index: int) -> dict[str, Tensor]:
        found = self._mask_chunks.pop(index, None)
        if found is None:
            while len(self._mask_chunks) >= KEPT:
                del self._mask_chunks[next(iter(self._mask_chunks))]
            found = self._made(index * self._maker.rows)
            found = {name: found[name] for name in self.masks}
        self._mask_chunks[index] = found
        return found

    def _gathered_mask(self, name: str, rows: Sequence[Row], spare: range) -> Tensor:
        dim = self.row_dim[name]
        wanted = sorted({0, *(row.position for row in rows)})
        by_row = torch.cat([self._mask_rows(name, at, 1) for at in wanted], dim).movedim(dim, 0)
        of = {position: index for index, position in enumerate(wanted)}
        size = len(rows) + len(spare)
        # the first position sees nothing after itself
        forbidden = by_row[0, ..., -1:]
        made = forbidden.expand(by_row.shape[1:]).repeat(size, *[1] * (by_row.ndim - 1))
        # rows of one tree see the same line of slots up to its root
        lines: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(rows):
            lines.setdefault((row.first, row.position + 1 - len(row.over)), []).append(index)
        for (first, seen), members in lines.items():
            places = self._tensor([of[rows[index].position] for index in members])
            made[members, ..., first : first + seen] = by_row[places, ..., :seen]
        # what a row sees in a slot goes by the position of the token there (biases, windows)
        over = [
            (index, slot, of[row.position], row.position - len(row.over) + 1 + depth)
            for index, row in enumerate(rows)
            for depth, slot in enumerate(row.over)
        ]
        over += [(index, slot, 0, 0) for index, slot in enumerate(spare, len(rows))]
        if over:
            made_rows, slots, places, seen_positions = self._tensor(over).unbind(1)
            # advanced indices in front and behind: what lies between comes last
            made[made_rows, ..., slots] = by_row[places, ..., seen_positions]
        return made.movedim(0, dim).contiguous()

    def _tensor(self, values: Sequence[int | tuple[int, ...]]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def _fill(self) -> None:
        names = [name for name in self._maker.side_outputs if name not in self.masks]
        if not names:
            return
        chunks: list[list[Tensor]] = []
        for start in range(0, self.slots, self._maker.rows):
            made = self._made(start)
            # masks are let go again: all of them at once are the square of the cache
            chunks.append([made[name] for name in names])
        for name, parts in zip(names, zip(*chunks, strict=True), strict=True):
            dim = self.row_dim[name]
            table = torch.cat(parts, dim)
            self.tables[name] = table.narrow(dim, 0, self.slots).contiguous()

    def _made(self, start: int) -> dict[str, Tensor]:
        """What the positional graph makes for its rows from position ``start`` on."""
        split = self._maker
        dtype = split.hidden_example.dtype
        arguments = []
        for role in split.positional.inputs:
            if role.kind == "mask":
                window = split.windows[role.name]
                arguments.append(
                    causal_mask(split.rows, self.slots, window, dtype, self.device, start)
                )
            elif role.kind == "positions":
                # past the last slot, or the last position the model knows, nobody reads
                at = torch.arange(start, start + split.rows, device=self.device)
                arguments.append(self._positions[at.clamp(max=self.slots - 1)][None])
            else:
                arguments.append(self._tensors[role.name])
        made = split.positional.graph(*arguments)
        values = [made] if isinstance(made, Tensor) else list(made)
        return dict(zip(split.side_outputs, values, strict=True))


def _row_dims(one: Segment, many: Segment) -> list[int]:
    """The dimension of each output that grew from one traced row count to the other."""
    dims = []
    for small, large in zip(_outputs(one), _outputs(many), strict=True):
        grown = [d for d, (a, b) in enumerate(zip(small.shape, large.shape, strict=True)) if a != b]
        dims.append(grown[0] if grown else 0)
    return dims


def _outputs(segment: Segment) -> list[Tensor]:
    return [node.meta["val"] for node in segment.graph.graph.output_node().all_input_nodes]


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
