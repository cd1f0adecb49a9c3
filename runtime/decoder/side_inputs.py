"""The slots of a pass's rows, and their side inputs: rotary embedding values, masks, and the like.

What depends on positions alone is computed once, as a table over the whole cache. A mask's row is
as long as the cache, so masks are computed for a chunk of rows at a time, and the chunks in use are
kept. Contiguous rows that attend to everything before them get slices of both, of masks turned to
where their sequence begins. For other rows (draft tokens in a tree, several sequences in one pass)
they are gathered, masks slot by slot.

Chunks of a prompt, wider than other passes, have no plain mask but a prefix
(``eepass::prefix_mask``): which slots they attend to in three numbers, on the host.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from eepass.masks import causal_mask_at, first_seen, first_seen_at, spans_at
from eepass.runtime.cache.kv_cache import copy_rows
from eepass.segments import CONTEXT, Input, Segment, SplitDecoder

# chunks of masks that are kept: as many as a pass may hold sequences
KEPT_CHUNKS = 32


class Row(NamedTuple):
    """One row of a pass: the token at ``position`` of the sequence that begins at slot ``first``.

    It attends to the ``position + 1 - len(path_slots)`` slots from ``first`` on, and to
    ``path_slots``: those of the draft tokens on its path, itself the last.
    """

    first: int
    position: int
    slot: int
    path_slots: tuple[int, ...] = ()


class Place(NamedTuple):
    """Slots [R] and side inputs by name for the rows of a pass, padding included."""

    slots: Tensor
    sides: Mapping[str, Tensor]

    def selecting(self, slots: Tensor) -> Place:
        """The same for rows that attend to no other ``slots`` int32 [R, K]."""
        return Place(self.slots, {**self.sides, CONTEXT.name: slots})


class SideInputs:
    """Side inputs for the positions of a cache, and ``Place``s made from them.

    Rotary embedding values and sliding windows go by a token's position, which in a tree is not its
    slot.
    """

    def __init__(
        self, splits: Mapping[int, SplitDecoder], tensors: Mapping[str, Tensor], scratch: int,
        chunks: Collection[int] = (),
    ) -> None:  # fmt: skip
        """``chunks``: row counts whose plain masks come as prefixes."""
        one, many = splits[min(splits)], splits[max(splits)]
        self.slots = one.cache_length
        self.scratch = scratch
        self.tables: dict[str, Tensor] = {}
        self.row_dim: dict[str, int] = {}
        self.masks = _mask_sides(one)
        # those that are a mask as it comes, and how far back it lets a row look
        self.windows = _plain_masks(one)
        self.by_token: set[str] = set(one.embed_outputs[1:])
        self.device = next(iter(tensors.values())).device
        # of masks
        self._dtype = one.hidden_example.dtype
        self._all_slots = torch.arange(self.slots, device=self.device)
        last = (one.positions or self.slots) - 1
        self._positions = self._all_slots.clamp(max=last)
        self._spans: dict[tuple[int, int, int], Place] = {}
        for names, small, large in (
            (one.side_outputs, one.positional, many.positional),
            (one.embed_outputs, one.embed, many.embed),
        ):
            self.row_dim |= dict(zip(names, _row_dims(small, large), strict=True))
        self.chunks = frozenset(chunks)
        # its positional segment computes masks, for as many rows at a time as it was split for
        self._split = splits[max(splits.keys() - self.chunks)]
        self._splits, self._tensors = dict(splits), tensors
        # by number, the most recently used last
        self._mask_chunks: dict[int, dict[str, Tensor]] = {}
        self._fill(many)

    def span(self, position: int, rows: int, first: int = 0) -> Place:
        """``rows`` contiguous rows from ``position`` on of the sequence that begins at slot
        ``first``, each attending to all before it."""
        key = (position, rows, first)
        if key not in self._spans:
            # one pass needs few of them, and the next pass needs others
            if len(self._spans) > 16:
                self._spans.clear()
            slot = first + position
            sides = {
                name: table.narrow(
                    self.row_dim[name], slot if name in self.by_token else position, rows
                )
                for name, table in self.tables.items()
            }
            for name in self.masks:
                if rows in self.chunks and name in self.windows:
                    sides[name] = self._prefix(self.windows[name], position, rows, first)
                    continue
                # what comes round from the end is forbidden: no row is there yet
                mask = self._mask_rows(name, position, rows)
                sides[name] = mask.roll(first, -1) if first else mask
            place = Place(self._all_slots[slot : slot + rows], sides)
            if rows in self.chunks:
                # runs once
                return place
            self._spans[key] = place
        return self._spans[key]

    def gather(self, rows: Sequence[Row], size: int) -> Place:
        """Any rows, padded to ``size``; each padding row has a scratch slot of its own. Chunks of
        prompts are contiguous: ``ValueError`` for others."""
        if size in self.chunks:
            raise ValueError(f"{size} rows are not contiguous, or their padding has no room")
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
        """Keep a side input that depends on the tokens themselves, by their slots [R]."""
        dim = self.row_dim[name]
        if name not in self.tables:
            shape = list(value.shape)
            shape[dim] = self.slots
            self.tables[name] = value.new_zeros(shape)
            self._spans.clear()
        self.tables[name].index_copy_(dim, slots, value)

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy what belongs to the tokens of ``count`` slots from ``source`` on to ``target``
        onwards."""
        for name in self.by_token & self.tables.keys():
            copy_rows(self.tables[name], self.row_dim[name], source, target, count)

    def move_rows(self, sources: Tensor, targets: Tensor) -> None:
        """As ``KvCache.move_rows``, for what belongs to the tokens of the slots."""
        for name in self.by_token & self.tables.keys():
            table, dim = self.tables[name], self.row_dim[name]
            table.index_copy_(dim, targets, table.index_select(dim, sources))

    def masks_at(self, positions: Tensor, as_spans: Collection[str] = ()) -> dict[str, Tensor]:
        """Rows of every mask for ``positions`` [R] on the device, each as if its sequence began at
        slot 0: for steps, whose positions the host does not know. R: a row count of the splits.

        ``as_spans``: those of ``windows`` that come as spans int64 [R, 3] (``eepass.masks``)."""
        found = {name: spans_at(positions, self.windows[name]) for name in as_spans}
        if self.masks - found.keys():
            found = self._compute_at(self._splits[len(positions)], positions) | found
        return {name: found[name] for name in sorted(self.masks)}

    def _prefix(self, window: int | None, position: int, rows: int, first: int) -> Tensor:
        """What ``rows`` from ``position`` on of the sequence at slot ``first`` attend to."""
        last = torch.tensor([position, position + rows - 1], device="cpu")
        begin, least = first_seen(last, window).tolist()
        # where the last row attends to all, every row does
        back = window if window is not None and least else 0
        return torch.tensor([first + begin, first + position + rows, back], device="cpu")

    def _mask_rows(self, name: str, first: int, count: int) -> Tensor:
        """Rows ``first`` onwards of a mask, each as if its sequence began at slot 0."""
        dim, parts = self.row_dim[name], []
        while count:
            chunk, at = divmod(first, self._split.rows)
            taken = min(count, self._split.rows - at)
            parts.append(self._mask_chunk(chunk)[name].narrow(dim, at, taken))
            first, count = first + taken, count - taken
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def _mask_chunk(self, index: int) -> dict[str, Tensor]:
        found = self._mask_chunks.pop(index, None)
        if found is None:
            while len(self._mask_chunks) >= KEPT_CHUNKS:
                del self._mask_chunks[next(iter(self._mask_chunks))]
            found = self._compute(self._split, index * self._split.rows)
            found = {name: found[name] for name in self.masks}
        self._mask_chunks[index] = found
        return found

    def _gathered_mask(self, name: str, rows: Sequence[Row], spare: range) -> Tensor:
        if name in self.windows:
            return self._plain_mask(self.windows[name], rows, spare)
        dim = self.row_dim[name]
        positions = sorted({0, *(row.position for row in rows)})
        by_row = torch.cat([self._mask_rows(name, at, 1) for at in positions], dim).movedim(dim, 0)
        index_of = {position: index for index, position in enumerate(positions)}
        size = len(rows) + len(spare)
        # the first position does not attend to later ones
        forbidden = by_row[0, ..., -1:]
        mask = forbidden.expand(by_row.shape[1:]).repeat(size, *[1] * (by_row.ndim - 1))
        # rows of one tree attend to the same slots up to its root
        lines: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(rows):
            lines.setdefault((row.first, row.position + 1 - len(row.path_slots)), []).append(index)
        for (first, count), members in lines.items():
            indices = self._tensor([index_of[rows[index].position] for index in members])
            mask[members, ..., first : first + count] = by_row[indices, ..., :count]
        # a slot's value goes by the position of the token in it (biases, windows)
        single = [
            (index, slot, index_of[row.position], row.position - len(row.path_slots) + 1 + depth)
            for index, row in enumerate(rows)
            for depth, slot in enumerate(row.path_slots)
        ]
        single += [(index, slot, 0, 0) for index, slot in enumerate(spare, len(rows))]
        if single:
            mask_rows, slots, indices, attended = self._tensor(single).unbind(1)
            # advanced indices in front and behind: what lies between comes last
            mask[mask_rows, ..., slots] = by_row[indices, ..., attended]
        return mask.movedim(0, dim).contiguous()

    def _plain_mask(self, window: int | None, rows: Sequence[Row], spare: range) -> Tensor:
        """A mask [1, 1, R, C] of ``rows`` and padding: each pass with a tree makes one, so few
        operations do."""
        size = len(rows) + len(spare)
        mask = torch.full(
            (size, self.slots), torch.finfo(self._dtype).min, dtype=self._dtype, device=self.device
        )
        # padding rows attend to themselves; flat, as one index is quicker than two
        alone = [index * self.slots + slot for index, slot in enumerate(spare, len(rows))]
        seen = []
        for index, row in enumerate(rows):
            root = row.position + 1 - len(row.path_slots)
            least = first_seen_at(row.position, window)
            seen.append((row.first + least, row.first + root))
            path = row.path_slots[max(least - root, 0) :]
            alone += [index * self.slots + slot for slot in path]
        # rows of one tree mostly attend to the same slots up to its root
        begin = 0
        for (first, last), group in groupby(seen):
            end = begin + sum(1 for _ in group)
            if first < last:
                mask[begin:end, first:last].zero_()
            begin = end
        if alone:
            mask.view(-1).index_fill_(0, self._tensor(alone), 0)
        return mask[None, None]

    def _tensor(self, values: Sequence[int | tuple[int, ...]]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def _fill(self, split: SplitDecoder) -> None:
        names = [name for name in split.side_outputs if name not in self.masks]
        if not names:
            return
        chunks: list[list[Tensor]] = []
        for start in range(0, self.slots, split.rows):
            computed = self._compute(split, start)
            # masks are not kept: all of them at once are the square of the cache
            chunks.append([computed[name] for name in names])
        for name, parts in zip(names, zip(*chunks, strict=True), strict=True):
            dim = self.row_dim[name]
            table = torch.cat(parts, dim)
            self.tables[name] = table.narrow(dim, 0, self.slots).contiguous()

    def _compute(self, split: SplitDecoder, start: int) -> dict[str, Tensor]:
        """Side inputs of the positions from ``start`` on, as many as the split has rows."""
        rows = torch.arange(start, start + split.rows, device=self.device)
        return self._compute_at(split, rows)

    def _compute_at(self, split: SplitDecoder, rows: Tensor) -> dict[str, Tensor]:
        """Side inputs of ``rows`` [R], positions; R the split's rows."""

        def value_of(role: Input) -> Tensor:
            if role.kind == "mask":
                window, dtype = split.windows[role.name], split.hidden_example.dtype
                return causal_mask_at(rows, self.slots, window, dtype)
            if role.kind == "positions":
                # no row reads what is past the last slot, or past the model's last position
                return self._positions[rows.clamp(max=self.slots - 1)][None]
            return self._tensors[role.name]

        return dict(zip(split.side_outputs, split.positional.run(value_of), strict=True))


def _row_dims(one: Segment, many: Segment) -> list[int]:
    """The dimension of each output that grew from one traced row count to the other."""
    dims = []
    for small, large in zip(one.outputs, many.outputs, strict=True):
        shapes = zip(small.meta["val"].shape, large.meta["val"].shape, strict=True)
        grown = [dim for dim, (few, more) in enumerate(shapes) if few != more]
        dims.append(grown[0] if grown else 0)
    return dims


def _plain_masks(split: SplitDecoder) -> dict[str, int | None]:
    """The side inputs that are a mask and nothing else, with their windows."""
    roles = split.positional.roles
    named = zip(split.side_outputs, split.positional.outputs, strict=True)
    found = {name: roles[node] for name, node in named if node in roles}
    return {n: split.windows[role.name] for n, role in found.items() if role.kind == "mask"}


def _mask_sides(split: SplitDecoder) -> set[str]:
    """The side inputs that depend on a mask."""
    segment = split.positional
    reached = {node for node, role in segment.roles.items() if role.kind == "mask"}
    for node in segment.graph.graph.nodes:
        if any(arg in reached for arg in node.all_input_nodes):
            reached.add(node)
    named = zip(split.side_outputs, segment.outputs, strict=True)
    return {name for name, node in named if node in reached}
