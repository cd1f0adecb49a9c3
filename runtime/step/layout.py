"""The memory of a decode step: its segments, its row counts, and a buffer for each value.

The rows of the window are newest first, so a segment over few rows uses the first ones of each
buffer: one address whatever their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from eepass.exit_rule import SCHEDULE_WINDOW
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.step import drawing, updates
from eepass.runtime.step.data import Buffer
from eepass.runtime.step.exit_points import ExitPoints


@dataclass(frozen=True, slots=True)
class StepOptions:
    """How a step decodes.

    ``pending``: how many tokens may be pending. ``buckets``: row counts of the segments after the
    first exit point, rising. ``ranking`` and ``always``: as for ``PredictorSchedule``; without a
    ranking all exit points are always active. ``force``: every token exits after so many layers
    with the LM head's token there. ``stop``: end tokens. ``verify``: at every active exit point, or
    only where the predictor wants to exit. ``one_size``: only the largest row count, masked.
    ``draws``: tokens can be sampled.
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


class StepLayout:
    """Cuts, row counts and buffers of the step of ``decoder``.

    ``points``: layers after which tokens may exit. ``cuts``: where segments begin and end.
    ``first``: the first exit point. ``pending``: how many tokens may be pending, −1 where tokens
    are not deferred. ``buckets``: row counts of the segments after ``first``. ``counts``: those,
    and 1.
    """

    def __init__(self, decoder: Decoder, exits: ExitPoints | None, options: StepOptions) -> None:
        self.decoder, self.exits, self.options = decoder, exits, options
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
        draft = exits.plan.draft_layer if exits is not None and options.force is None else 0
        cuts = {0, *early, self.layers} | ({draft} if 0 < draft < self.layers else set())
        self.draft_layer = draft
        self.cuts = sorted(cuts)
        self.first = min(early, default=self.layers)
        self.buffers: dict[str, Buffer] = {}
        self._make_state()
        self._make_flags()
        self._make_sides()
        self._name_cache()

    def add(self, name: str, tensor: Tensor, life: Literal["kept", "step"] = "step") -> None:
        self.buffers[name] = Buffer(name, tensor, life)

    def part(self, name: str, base: str, tensor: Tensor) -> None:
        whole = self.buffers[base]
        self.buffers[name] = Buffer(name, tensor, whole.life, whole.owner, base)

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.decoder.device)

    def tensor(self, values: Sequence[Any], dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.decoder.device)

    def _make_state(self) -> None:
        decoder, layers = self.decoder, self.layers
        hidden = self._zeros(1, self.rows, decoder.hidden_size, dtype=decoder.dtype)
        self.add("hidden", hidden, "kept")
        for count in self.counts:
            self.part(f"hidden@{count}", "hidden", hidden[:, :count])
        self.add("depth", self._zeros(self.rows) + layers, "kept")
        for name in ("token", "position"):
            self.add(name, self._zeros(1), "kept")
        self.add("stopped", self._zeros(1, dtype=torch.bool), "kept")
        self.add("ring", self._zeros(SCHEDULE_WINDOW) + updates.NEVER, "kept")
        self.add("out", self._zeros(2), "kept")
        self.add("counters", self._zeros(layers + 1 + len(updates.COUNTED)), "kept")
        # at least one element, which equals no token
        self.add("stop", self.tensor([*self.options.stop, updates.NOTHING]), "kept")
        exits = [layer in self.points for layer in range(layers + 1)]
        scheduled = bool(self.options.ranking) and self.options.force is None
        fixed = set(self.options.ranking[: self.options.always]) if scheduled else set(self.points)
        self.add("exits", self.tensor(exits, torch.bool), "kept")
        self.add("fixed", self.tensor([n in fixed for n in range(layers + 1)], torch.bool), "kept")
        # a number on the host would be copied to the device whenever it is used
        self.add("scratch", self._zeros(1) + decoder.kv.scratch, "kept")
        self.add("starts", self.tensor(self.cuts[:-1]), "kept")
        self.add("buckets", self.tensor([[0, *self.buckets[:-1]], self.buckets]), "kept")

    def _make_flags(self) -> None:
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
        for point in self.points:
            flag = self.buffers["active"].tensor[point : point + 1]
            self.part(f"active.{point}", "active", flag)
        self.add("live", self._zeros(segments, rows, dtype=torch.bool))
        # rows of an even number of slots: each begins at a multiple of 16 bytes
        self.add("slots", self._zeros(segments, rows + rows % 2))
        for index in range(segments):
            for name in ("more", "fill"):
                tensor = self.buffers[name].tensor[index : index + 1]
                self.part(f"{name}.{index}", name, tensor)
            for count in self.counts:
                for name in ("live", "slots"):
                    tensor = self.buffers[name].tensor[index, :count]
                    self.part(f"{name}.{index}@{count}", name, tensor)
            for place, count in enumerate(self.buckets):
                go = self.buffers["go"].tensor[index, place : place + 1]
                self.part(f"go.{index}@{count}", "go", go)
        self.add("rows", self._zeros(rows))
        self.part("rows@1", "rows", self.buffers["rows"].tensor[:1])
        for name in ("answer", "exit_layer"):
            self.add(name, self._zeros(1))
        k = self.exits.plan.draft_tokens if self.exits is not None else 1
        self.add("previous", self._zeros(1, k, dtype=torch.float32))
        if self.options.draws:
            for name in drawing.OPTIONS:
                whole = name in ("top_k", "seed")
                dtype = torch.long if whole else torch.float64
                self.add(name, self._zeros(1, dtype=dtype), "kept")
            self.add("drawn", self._zeros(1))
            self.add("layer.head", self._zeros(1), "kept")
        if self.exits is not None and self.options.force is None:
            self.add("drafts", self._zeros(1, k))
            size = self.decoder.hidden_size
            self.add("z", self._zeros(1, 1, size, dtype=self.decoder.dtype))

    def _make_sides(self) -> None:
        """Buffers for the rows' side inputs, and tables of those that depend on tokens."""
        decoder = self.decoder
        side_inputs = decoder.side_inputs
        # creates the tables of what depends on tokens; the slot is scratch
        scratch = self._zeros(1) + decoder.kv.scratch
        decoder.embed(self._zeros(1, 1), self._zeros(1, 1), scratch)
        # the device looks up the rows of masks too
        self.tables = {**side_inputs.tables, **side_inputs.whole_masks()}
        for name, table in self.tables.items():
            if name in side_inputs.by_token:
                self.buffers[f"table {name}"] = Buffer(f"table {name}", table, "kept", "cache")
            dim = side_inputs.row_dim[name]
            shape = list(table.shape)
            shape[dim] = self.rows
            value = table.new_zeros(shape)
            self.add(f"side {name}", value)
            for count in self.counts:
                part = value.narrow(dim, 0, count)
                like = table.narrow(dim, 0, count)
                _require_layout(name, part, like)
                self.part(f"side {name}@{count}", f"side {name}", part)

    def _name_cache(self) -> None:
        kv = self.decoder.kv
        for kind, tensors in (("keys", kv.keys), ("values", kv.values)):
            for layer, tensor in enumerate(tensors):
                name = f"{kind}.{layer}"
                self.buffers[name] = Buffer(name, tensor, "kept", "cache")

    def constants(self) -> Mapping[str, Tensor]:
        found = dict(self.decoder.tensors)
        if self.exits is not None:
            found |= {f"exit {name}": tensor for name, tensor in self.exits.tensors.items()}
        return {name: tensor for name, tensor in found.items() if tensor.numel()}


def _require_layout(name: str, part: Tensor, like: Tensor) -> None:
    """Layers are compiled for slices of tables: slices of the buffer must have their strides."""
    strides = zip(part.shape, part.stride(), like.stride(), strict=True)
    if any(size > 1 and mine != theirs for size, mine, theirs in strides):
        raise ValueError(f"{name} has strides {list(like.stride())}: its rows do not come first")
