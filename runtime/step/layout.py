"""The memory of a decode step: its segments, its row counts, and a buffer for each value.

The rows of the window are newest first, so a segment over few rows uses the first ones of each
buffer: one address whatever their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from eepass.exit_rule import SCHEDULE_WINDOW
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.step import drawing, updates
from eepass.runtime.step.data import Buffer, Life, Owner
from eepass.runtime.step.exit_points import ExitPoints
from eepass.runtime.step.tree_shape import TreeShape


@dataclass(frozen=True, slots=True)
class StepOptions:
    """How a step decodes.

    ``pending``: how many tokens may be pending. ``buckets``: row counts of the segments after the
    first exit point, rising. ``ranking`` and ``always``: as for ``PredictorSchedule``; without a
    ranking all exit points are always active. ``force``: every token exits after so many layers
    with the LM head's token there. ``stop``: end tokens. ``verify``: at every active exit point, or
    only where the predictor wants to exit. ``one_size``: only the largest row count, masked.
    ``draws``: tokens can be sampled. ``tree``: the rows of a pass in which draft tokens are
    verified; None: one token a pass. ``exact``: there, tokens of exits are guesses that a pass
    through all layers confirms.
    """

    kv: Literal["defer", "propagate", "drop"] = "defer"
    pending: int = 7
    buckets: tuple[int, ...] = (1, 2, 4, 8)
    ranking: tuple[int, ...] = ()
    always: int = 2
    force: int | None = None
    stop: tuple[int, ...] = ()
    verify: Literal["wanted", "always"] = "wanted"
    one_size: bool = False
    draws: bool = False
    tree: TreeShape | None = None
    exact: bool = False


class StepLayout:
    """Cuts, row counts and buffers of the step of ``decoder``.

    ``points``: layers after which tokens may exit. ``cuts``: where segments begin and end.
    ``first``: the first exit point. ``pending``: how many tokens may be pending, −1 where tokens
    are not deferred. ``buckets``: row counts of the segments after ``first``. ``counts``: those,
    and 1. ``exits``: None where exits are forced.
    """

    def __init__(self, decoder: Decoder, exits: ExitPoints | None, options: StepOptions) -> None:
        self.decoder, self.options = decoder, options
        self.exits = exits if options.force is None else None
        self.layers = decoder.num_layers
        if options.force is not None:
            self.points: tuple[int, ...] = (options.force,)
        else:
            self.points = exits.layers if exits is not None else ()
        early = [point for point in self.points if point < self.layers]
        defers = options.kv == "defer" and bool(early)
        self.pending = min(options.pending, options.buckets[-1] - 1) if defers else -1
        most = self.pending + 1 if defers else 1
        self.rows = next((n for n in options.buckets if n >= most), options.buckets[-1])
        fitting = [n for n in options.buckets if n <= self.rows]
        self.buckets = fitting[-1:] if options.one_size else fitting
        # one row before the first exit point, several after it
        self.counts = sorted({1, *self.buckets})
        self.draft_layer = self.exits.plan.draft_layer if self.exits is not None else 0
        cuts = {0, *early, self.layers}
        self.cuts = sorted(cuts | ({self.draft_layer} & set(range(self.layers))))
        self.first = min(early, default=self.layers)
        self.buffers: dict[str, Buffer] = {}
        self._make_state()
        self._make_flags()
        self._make_values()
        self._make_sides()
        kv = decoder.kv
        for kind, tensors in (("keys", kv.keys), ("values", kv.values)):
            for layer, tensor in enumerate(tensors):
                self.add(f"{kind}.{layer}", tensor, "kept", "cache")

    def add(self, name: str, tensor: Tensor, life: Life = "step", owner: Owner = "step") -> None:
        self.buffers[name] = Buffer(name, tensor, life, owner)

    def part(self, name: str, base: str, *at: int | slice) -> None:
        """Name the slice ``at`` of buffer ``base``."""
        whole = self.buffers[base]
        self.buffers[name] = Buffer(name, whole.tensor[at], whole.life, whole.owner, base)

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.decoder.device)

    def tensor(self, values: Sequence[Any], dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.decoder.device)

    def _make_state(self) -> None:
        """What is kept from step to step."""
        decoder, options, layers = self.decoder, self.options, self.layers
        numbers = range(layers + 1)
        scheduled = bool(options.ranking) and options.force is None
        fixed = options.ranking[: options.always] if scheduled else self.points
        state = {
            "hidden": self._zeros(1, self.rows, decoder.hidden_size, dtype=decoder.dtype),
            "depth": self._zeros(self.rows) + layers,
            "token": self._zeros(1),
            "position": self._zeros(1),
            "stopped": self._zeros(1, dtype=torch.bool),
            "ring": self._zeros(SCHEDULE_WINDOW) + updates.NEVER,
            "out": self._zeros(2),
            "counters": self._zeros(layers + 1 + len(updates.COUNTED)),
            # at least one element, which equals no token
            "stop": self.tensor([*options.stop, updates.NOTHING]),
            "exits": self.tensor([layer in self.points for layer in numbers], torch.bool),
            "fixed": self.tensor([layer in fixed for layer in numbers], torch.bool),
            # a number on the host would be copied to the device whenever it is used
            "scratch": self._zeros(1) + decoder.kv.scratch,
            "starts": self.tensor(self.cuts[:-1]),
            "buckets": self.tensor([[0, *self.buckets[:-1]], self.buckets]),
        }
        for name, tensor in state.items():
            self.add(name, tensor, "kept")
        for count in self.counts:
            self.part(f"hidden@{count}", "hidden", slice(None), slice(count))

    def _make_flags(self) -> None:
        """The flags, and what says for each segment where its rows go."""
        segments, rows = len(self.cuts) - 1, self.rows
        shapes = {
            "run": (1,), "needs_head": (1,), "wants_exit": (1,), "active": (self.layers + 1,),
            "go": (segments, len(self.buckets)), "more": (segments,), "fill": (segments,),
        }  # fmt: skip
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        # contiguous, for a host that reads them all at once
        self.flags = self._zeros(sum(sizes), dtype=torch.bool)
        for (name, shape), part in zip(shapes.items(), self.flags.split(sizes), strict=True):
            self.add(name, part.view(shape))
        self.add("live", self._zeros(segments, rows, dtype=torch.bool))
        # rows of an even number of slots: each begins at a multiple of 16 bytes
        self.add("slots", self._zeros(segments, rows + rows % 2))
        for point in self.points:
            self.part(f"active.{point}", "active", slice(point, point + 1))
        for index in range(segments):
            for name in ("more", "fill"):
                self.part(f"{name}.{index}", name, slice(index, index + 1))
            for count in self.counts:
                for name in ("live", "slots"):
                    self.part(f"{name}.{index}@{count}", name, index, slice(count))
            for place, count in enumerate(self.buckets):
                self.part(f"go.{index}@{count}", "go", index, slice(place, place + 1))

    def _make_values(self) -> None:
        """What launches hand to one another within a step, and how tokens are sampled."""
        k = self.exits.plan.draft_tokens if self.exits is not None else 1
        self.add("rows", self._zeros(self.rows))
        self.part("rows@1", "rows", slice(1))
        self.add("answer", self._zeros(1))
        self.add("exit_layer", self._zeros(1))
        self.add("previous", self._zeros(1, k, dtype=torch.float32))
        if self.exits is not None:
            self.add("drafts", self._zeros(1, k))
            size = self.decoder.hidden_size
            self.add("z", self._zeros(1, 1, size, dtype=self.decoder.dtype))
        if self.options.draws:
            for name in drawing.OPTIONS:
                dtype = torch.long if name in ("top_k", "seed") else torch.float64
                self.add(name, self._zeros(1, dtype=dtype), "kept")
            self.add("drawn", self._zeros(1))
            self.add("layer.head", self._zeros(1), "kept")

    def _make_sides(self) -> None:
        """Buffers for the rows' side inputs, and tables of those that depend on tokens."""
        decoder, side_inputs = self.decoder, self.decoder.side_inputs
        # creates the tables of what depends on tokens; the slot is scratch
        decoder.embed(self._zeros(1, 1), self._zeros(1, 1), self.buffers["scratch"].tensor)
        # rows of masks are computed, not looked up: a table of them is the square of the cache
        self.tables = dict(side_inputs.tables)
        masks = side_inputs.masks_at(self.buffers["rows"].tensor, decoder.spans)
        for name, table in self.tables.items():
            if name in side_inputs.by_token:
                self.add(f"table {name}", table, "kept", "cache")
        for name, like in {**self.tables, **masks}.items():
            dim = 0 if name in decoder.spans else side_inputs.row_dim[name]
            shape = list(like.shape)
            shape[dim] = self.rows
            self.add(f"side {name}", like.new_zeros(shape))
            for count in self.counts:
                part = f"side {name}@{count}"
                self.part(part, f"side {name}", *[slice(None)] * dim, slice(count))
                # layers are compiled for slices of tables: those of the buffer have their strides
                mine, given = self.buffers[part].tensor, decoder.captured_span(count).sides[name]
                strides = zip(mine.shape, mine.stride(), given.stride(), strict=True)
                if any(size > 1 and stride != other for size, stride, other in strides):
                    raise ValueError(
                        f"{name} has strides {list(given.stride())}: its rows do not come first"
                    )
        self.sides = [*self.tables, *masks]
