"""Build the decode step of a decoder with exits: which launches, over which buffers.

    begin, embed, sides, segment 0, draft,
    [ask] predict, [want] verify,            at each exit point
    [go]  segment for so many rows,          after each; [fill] keys and values, if they do not wait
    [need] head, commit

The window's rows stand newest first, so a segment over few rows takes the first ones of each
buffer: one address whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from eepass.runtime.decoder import Decoder
from eepass.runtime.side_inputs import Place
from eepass.runtime.step import drawing, updates
from eepass.runtime.step.data import Buffer, Buffers, Conditional, Item, Launch, Step
from eepass.runtime.step.exit_points import ExitPoints

RING = 5
# makes one function of tensors out of an update: itself, or compiled
Fuse = Callable[[Callable[..., None]], Callable[..., None]]


@dataclass(frozen=True, slots=True)
class StepOptions:
    """How a step decodes. ``pending``: tokens that may wait; ``buckets``: row counts of segments
    behind exits, rising; ``ranking`` with ``always``: as ``PredictorSchedule`` (empty: all exits
    are always asked); ``force``: every token leaves after so many layers, saying what the head
    says there; ``stop``: end tokens; ``verify``: always, or where a predictor wants to leave;
    ``one_size``: only the largest row count, masked; ``draws``: tokens may be drawn."""

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


def build_step(
    decoder: Decoder,
    exits: ExitPoints | None,
    options: StepOptions,
    fuse: Fuse | None = None,
) -> Step:
    """The step of ``decoder``; dense without ``exits`` and ``options.force``."""
    return _Builder(decoder, exits, options, fuse or (lambda update: update)).build()


class _Builder:
    def __init__(
        self, decoder: Decoder, exits: ExitPoints | None, options: StepOptions, fuse: Fuse
    ) -> None:
        self.decoder, self.exits, self.options, self.fuse = decoder, exits, options, fuse
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
        # what launches take rows by: alone before the first exit, so many behind it
        self.counts = sorted({1, *self.buckets})
        draft = exits.plan.draft_layer if exits is not None and options.force is None else 0
        cuts = {0, *early, self.layers} | ({draft} if 0 < draft < self.layers else set())
        self.draft_layer = draft
        self.cuts = sorted(cuts)
        self.first = min(early, default=self.layers)
        self.buffers: dict[str, Buffer] = {}
        # one code for all exits
        leaving = {"scratch": decoder.kv.scratch, "fills": options.kv != "defer"}
        self.note = fuse(updates.predicted)
        self.draw = fuse(drawing.draw)
        self.drawing = (*drawing.OPTIONS, "position") if options.draws else ()
        self.drawn = ("drawn",) if options.draws else ()
        self.accept = fuse(partial(updates.verified, **leaving))
        self.leave = fuse(partial(updates.forced, **leaving))

    def build(self) -> Step:
        self._make_state()
        self._make_flags()
        self._make_sides()
        self._name_cache()
        items: list[Item] = [self._begin(), *self._prelude()]
        for index, (start, end) in enumerate(zip(self.cuts, self.cuts[1:], strict=False)):
            items += self._segment(index, start, end)
            if end == self.draft_layer and self.exits is not None:
                items.append(self._draft())
            if end in self.points:
                items.append(self._exit(end))
        items += [self._head(), self._commit()]
        return Step(self.buffers, tuple(items), self.flags, self._constants())

    # buffers

    def _add(self, name: str, tensor: Tensor, life: Literal["kept", "step"] = "step") -> None:
        self.buffers[name] = Buffer(name, tensor, life)

    def _part(self, name: str, base: str, tensor: Tensor) -> None:
        whole = self.buffers[base]
        self.buffers[name] = Buffer(name, tensor, whole.life, whole.owner, base)

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.decoder.device)

    def _tensor(self, values: Sequence[Any], dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.decoder.device)

    def _make_state(self) -> None:
        decoder, layers = self.decoder, self.layers
        hidden = self._zeros(1, self.rows, decoder.hidden_size, dtype=decoder.dtype)
        self._add("hidden", hidden, "kept")
        for count in self.counts:
            self._part(f"hidden@{count}", "hidden", hidden[:, :count])
        self._add("depth", self._zeros(self.rows) + layers, "kept")
        for name in ("token", "position"):
            self._add(name, self._zeros(1), "kept")
        self._add("stopped", self._zeros(1, dtype=torch.bool), "kept")
        self._add("ring", self._zeros(RING) + updates.NEVER, "kept")
        self._add("out", self._zeros(2), "kept")
        self._add("counters", self._zeros(layers + 1 + len(updates.COUNTED)), "kept")
        # at least one, which no token is
        self._add("stop", self._tensor([*self.options.stop, updates.NOTHING]), "kept")
        at = [layer in self.points for layer in range(layers + 1)]
        scheduled = bool(self.options.ranking) and self.options.force is None
        fixed = set(self.options.ranking[: self.options.always]) if scheduled else set(self.points)
        self._add("exits", self._tensor(at, torch.bool), "kept")
        self._add(
            "fixed", self._tensor([n in fixed for n in range(layers + 1)], torch.bool), "kept"
        )
        # a number of the host's would be sent to the device when it is used
        self._add("scratch", self._zeros(1) + decoder.kv.scratch, "kept")
        self._add("starts", self._tensor(self.cuts[:-1]), "kept")
        self._add("buckets", self._tensor([[0, *self.buckets[:-1]], self.buckets]), "kept")

    def _make_flags(self) -> None:
        segments, rows = len(self.cuts) - 1, self.rows
        shapes = {
            "run": (1,), "need": (1,), "want": (1,), "ask": (self.layers + 1,),
            "go": (segments, len(self.buckets)), "more": (segments,), "fill": (segments,),
        }  # fmt: skip
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        # all in one place, for a host that reads them at once
        self.flags = self._zeros(sum(sizes), dtype=torch.bool)
        for (name, shape), part in zip(shapes.items(), self.flags.split(sizes), strict=True):
            self._add(name, part.view(shape))
        for point in self.points:
            self._part(f"ask.{point}", "ask", self.buffers["ask"].tensor[point : point + 1])
        self._add("live", self._zeros(segments, rows, dtype=torch.bool))
        # rows of an even number of slots: each begins at a multiple of 16 bytes
        self._add("slots", self._zeros(segments, rows + rows % 2))
        for index in range(segments):
            for name in ("more", "fill"):
                tensor = self.buffers[name].tensor[index : index + 1]
                self._part(f"{name}.{index}", name, tensor)
            for count in self.counts:
                for name in ("live", "slots"):
                    tensor = self.buffers[name].tensor[index, :count]
                    self._part(f"{name}.{index}@{count}", name, tensor)
            for place, count in enumerate(self.buckets):
                go = self.buffers["go"].tensor[index, place : place + 1]
                self._part(f"go.{index}@{count}", "go", go)
        self._add("rows", self._zeros(rows))
        self._part("rows@1", "rows", self.buffers["rows"].tensor[:1])
        for name in ("answer", "exit_layer"):
            self._add(name, self._zeros(1))
        k = self.exits.plan.draft_tokens if self.exits is not None else 1
        self._add("previous", self._zeros(1, k, dtype=torch.float32))
        if self.options.draws:
            for name in drawing.OPTIONS:
                whole = name in ("top_k", "seed")
                dtype = torch.long if whole else torch.float64
                self._add(name, self._zeros(1, dtype=dtype), "kept")
            self._add("drawn", self._zeros(1))
            self._add("layer.head", self._zeros(1), "kept")
        if self.exits is not None and self.options.force is None:
            self._add("drafts", self._zeros(1, k))
            size = self.decoder.hidden_size
            self._add("z", self._zeros(1, 1, size, dtype=self.decoder.dtype))

    def _make_sides(self) -> None:
        """Buffers for what the rows' positions say, and tables of what tokens say."""
        decoder = self.decoder
        tables = decoder.side_inputs
        # makes the tables of what depends on tokens; the slot is scratch
        scratch = self._zeros(1) + decoder.kv.scratch
        decoder.embed(self._zeros(1, 1), self._zeros(1, 1), scratch)
        for name, table in tables.tables.items():
            if name in tables.by_token:
                self.buffers[f"table {name}"] = Buffer(f"table {name}", table, "kept", "cache")
            dim = tables.row_dim[name]
            shape = list(table.shape)
            shape[dim] = self.rows
            value = table.new_zeros(shape)
            self._add(f"side {name}", value)
            for count in self.counts:
                part = value.narrow(dim, 0, count)
                like = table.narrow(dim, 0, count)
                _require_layout(name, part, like)
                self._part(f"side {name}@{count}", f"side {name}", part)

    def _name_cache(self) -> None:
        kv = self.decoder.kv
        for kind, tensors in (("keys", kv.keys), ("values", kv.values)):
            for layer, tensor in enumerate(tensors):
                name = f"{kind}.{layer}"
                self.buffers[name] = Buffer(name, tensor, "kept", "cache")

    def _constants(self) -> Mapping[str, Tensor]:
        found = dict(self.decoder.tensors)
        if self.exits is not None:
            found |= {f"exit {name}": tensor for name, tensor in self.exits.tensors.items()}
        return {name: tensor for name, tensor in found.items() if tensor.numel()}

    # launches

    def _launch(
        self,
        name: str,
        update: Callable[..., None],
        reads: Sequence[str],
        changes: Sequence[str],
        writes: Sequence[str] = (),
    ) -> Launch:
        """``update`` over buffers: those it reads, those it changes, those it writes whole."""
        names = (*reads, *changes, *writes)
        fused = self.fuse(update)
        return Launch(
            name,
            lambda b: fused(*(b[name] for name in names)),
            (*reads, *changes),
            (*changes, *writes),
        )

    def _begin(self) -> Launch:
        update = partial(updates.begin, pending=self.pending, scratch=self.decoder.kv.scratch)
        reads = ("stopped", "position", "ring", "exits", "fixed", "starts", "buckets")
        writes = (
            "run", "rows", "ask", "go", "more", "live", "slots", "fill", "need", "previous",
            "answer", "exit_layer",
        )  # fmt: skip
        return self._launch("begin", update, reads, ("hidden", "depth"), writes)

    def _prelude(self) -> list[Item]:
        decoder, tables = self.decoder, self.decoder.side_inputs
        kept = [name for name in tables.tables if name in tables.by_token]

        def embed(b: Buffers) -> None:
            slots = torch.where(b["run"], b["rows@1"], b["scratch"])
            made = decoder.embed(b["token"][None], b["rows@1"][None], slots)
            hidden = b["hidden@1"]
            hidden.copy_(torch.where(b["run"], made, hidden))

        def sides(b: Buffers) -> None:
            for name, table in tables.tables.items():
                value = table.index_select(tables.row_dim[name], b["rows"])
                b[f"side {name}"].copy_(value)

        stored = tuple(f"table {name}" for name in kept)
        reads = ("token", "rows@1", "run", "scratch", "hidden@1", *stored)
        names = tuple(f"side {name}" for name in tables.tables)
        return [
            Launch("embed", embed, reads, ("hidden@1", *stored)),
            Launch("sides", sides, ("rows", *stored), names),
        ]

    def _segment(self, index: int, start: int, end: int) -> list[Item]:
        if start < self.first:
            # nothing waits here, and nothing has left
            return [self._rows_through(index, start, end, 1)]
        bodies = [
            Conditional(
                f"go.{index}@{count}", (self._rows_through(index, start, end, count),), ahead=True
            )
            for count in self.buckets
        ]
        items: list[Item] = [bodies[0]]
        if len(bodies) > 2:
            # few steps take more than one row: they alone look how many
            items.append(Conditional(f"more.{index}", tuple(bodies[1:]), ahead=True))
        else:
            items += bodies[1:]
        if self.options.kv != "defer":
            items.append(Conditional(f"fill.{index}", (self._fill(index, start, end),)))
        return items

    def _rows_through(self, index: int, start: int, end: int, count: int) -> Launch:
        decoder, names = self.decoder, list(self.decoder.side_inputs.tables)
        decoder.prepare(count)
        at = f"{index}@{count}"

        def run(b: Buffers) -> None:
            hidden = before = b[f"hidden@{count}"]
            sides = {name: b[f"side {name}@{count}"] for name in names}
            place = Place(b[f"slots.{at}"], sides)
            for layer in range(start, end):
                hidden = decoder.run_layer(layer, hidden, place)
            before.copy_(torch.where(b[f"live.{at}"][None, :, None], hidden, before))

        cache = self._cache_names(start, end)
        sides = tuple(f"side {name}@{count}" for name in names)
        reads = (f"hidden@{count}", f"slots.{at}", f"live.{at}", *sides, *cache)
        rows = "1 row" if count == 1 else f"{count} rows"
        name = f"layers {start}–{end}, {rows}"
        return Launch(name, run, reads, (f"hidden@{count}", *cache))

    def _fill(self, index: int, start: int, end: int) -> Launch:
        """Keys and values a token that left does not make: projected from its exit, or blank."""
        decoder, names = self.decoder, list(self.decoder.side_inputs.tables)
        blank = self.options.kv == "drop"

        def run(b: Buffers) -> None:
            slots = torch.where(b[f"fill.{index}"], b["rows@1"], b["scratch"])
            place = Place(slots, {name: b[f"side {name}@1"] for name in names})
            for layer in range(start, end):
                if blank:
                    decoder.kv.blank(layer, slots)
                else:
                    decoder.fill_kv(layer, b["hidden@1"], place)

        sides = tuple(f"side {name}@1" for name in names)
        cache = self._cache_names(start, end)
        reads = ("hidden@1", "rows@1", "scratch", f"fill.{index}", *sides, *cache)
        return Launch(f"fill {start}–{end}", run, reads, cache)

    def _cache_names(self, start: int, end: int) -> tuple[str, ...]:
        return tuple(f"{k}.{layer}" for layer in range(start, end) for k in ("keys", "values"))

    def _draft(self) -> Launch:
        exits = self.exits
        assert exits is not None

        def run(b: Buffers) -> None:
            b["drafts"].copy_(exits.draft(b["hidden@1"]))

        return Launch("draft", run, ("hidden@1",), ("drafts",))

    def _exit(self, layer: int) -> Conditional:
        ask, number = f"ask.{layer}", f"layer.{layer}"
        self._add(number, self._tensor([layer]), "kept")
        where = ("want", number, "starts", "rows")
        changed = ("ask", "go", "more", "live", "slots", "fill", "exit_layer")
        if self.options.force is not None:

            def mark(b: Buffers) -> None:
                b["want"].copy_(b[ask])

            def leave(b: Buffers) -> None:
                self.leave(*(b[name] for name in (*where, *changed)))

            left = Launch(f"leave {layer}", leave, (*where, *changed), changed)
            return Conditional(ask, (Launch(f"ask {layer}", mark, (ask,), ("want",)), left))
        exits = self.exits
        assert exits is not None
        note, accept = self.note, self.accept

        def predict(b: Buffers) -> None:
            wants, now, z = exits.predict(layer, b["hidden@1"], b["drafts"], b["previous"])
            b["z"].copy_(z)
            note(wants, now, b[ask], b["previous"], b["want"], b["counters"])

        found = (*changed, "need", "answer", "counters")

        def verify(b: Buffers) -> None:
            if self.options.draws:
                self._draw(b, exits.logits(b["z"]), number)
                token, known = exits.named(b["drawn"], b["drafts"])
            else:
                token, known = exits.verify(b["z"], b["drafts"])
            accept(token, known, *(b[name] for name in (*where, *found)))

        reads = ("hidden@1", "drafts", "previous", ask, "counters")
        checks = ("z", "drafts", *where, *found, *self.drawing)
        check = Launch(f"verify {layer}", verify, checks, (*found, *self.drawn))
        ask_it = Launch(f"predict {layer}", predict, reads, ("z", "previous", "want", "counters"))
        wanted = self.options.verify == "wanted"
        return Conditional(ask, (ask_it, Conditional("want", (check,)) if wanted else check))

    def _head(self) -> Conditional:
        decoder = self.decoder
        note = self.fuse(updates.headed)

        def run(b: Buffers) -> None:
            logits = decoder.logits(b["hidden@1"])[0]
            best, token = logits.max(-1)
            if self.options.draws:
                self._draw(b, logits, "layer.head")
                token = b["drawn"]
            note(token, best, b["need"], b["answer"], b["counters"])

        changed = ("answer", "counters")
        number = ("layer.head",) if self.options.draws else ()
        reads = ("hidden@1", "need", *changed, *self.drawing, *number)
        return Conditional("need", (Launch("head", run, reads, (*changed, *self.drawn)),))

    def _draw(self, b: Buffers, logits: Tensor, salt: str) -> None:
        self.draw(logits, *(b[name] for name in (*self.drawing, salt, *self.drawn)))

    def _commit(self) -> Launch:
        reads = ("run", "answer", "exit_layer", "stop")
        changes = ("token", "position", "stopped", "depth", "ring", "counters")
        return self._launch("commit", updates.commit, reads, changes, ("out",))


def _require_layout(name: str, part: Tensor, like: Tensor) -> None:
    """Layers are compiled for slices of tables; those of a smaller buffer must look the same."""
    strides = zip(part.shape, part.stride(), like.stride(), strict=True)
    if any(size > 1 and mine != theirs for size, mine, theirs in strides):
        raise ValueError(f"{name} lies {list(like.stride())} in memory: its rows do not come first")
