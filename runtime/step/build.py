"""Build the decode step of a decoder with exits: which launches, over which buffers.

    begin, embed, sides, segment 0, draft,
    [active] predict, [wants_exit] verify,   at each exit point
    [go] segment for so many rows,           after each; [fill] its KV, where it is not deferred
    [needs_head] head, commit

In brackets: the flag of a conditional.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Place
from eepass.runtime.step import drawing, updates
from eepass.runtime.step.data import Buffers, Conditional, Item, Launch, Step
from eepass.runtime.step.exit_points import ExitPoints
from eepass.runtime.step.layout import StepLayout, StepOptions

# makes one function of tensors out of an update: itself, or compiled
Fuse = Callable[[Callable[..., None]], Callable[..., None]]


def build_step(
    decoder: Decoder, exits: ExitPoints | None, options: StepOptions, fuse: Fuse | None = None
) -> Step:
    """The step of ``decoder``; dense without ``exits`` and ``options.force``."""
    return _Builder(decoder, exits, options, fuse or (lambda update: update)).build()


class _Builder(StepLayout):
    def __init__(
        self, decoder: Decoder, exits: ExitPoints | None, options: StepOptions, fuse: Fuse
    ) -> None:
        super().__init__(decoder, exits, options)
        self.fuse = fuse
        # all exit points share their compiled updates
        exiting: dict[str, Any] = dict(scratch=decoder.kv.scratch, fills=options.kv != "defer")
        self.predicted = fuse(updates.predicted)
        self.verified = fuse(partial(updates.verified, **exiting))
        self.exit_early = partial(updates.exit_early, **exiting)
        self.draw = fuse(drawing.draw)
        self.drawing = (*drawing.OPTIONS, "position") if options.draws else ()
        self.drawn = ("drawn",) if options.draws else ()

    def build(self) -> Step:
        items: list[Item] = [self._begin(), *self._prelude()]
        for index, (start, end) in enumerate(zip(self.cuts, self.cuts[1:], strict=False)):
            items += self._segment(index, start, end)
            if self.exits is not None and end == self.draft_layer:
                items.append(self._draft(self.exits))
            if end in self.points:
                items.append(self._exit(end))
        items += [self._head(), self._commit()]
        constants = dict(self.decoder.tensors)
        if self.exits is not None:
            constants |= {f"exit {name}": tensor for name, tensor in self.exits.tensors.items()}
        constants = {name: tensor for name, tensor in constants.items() if tensor.numel()}
        return Step(self.buffers, tuple(items), self.flags, constants)

    def _launch(
        self,
        name: str,
        update: Callable[..., None],
        reads: Sequence[str],
        changes: Sequence[str],
        writes: Sequence[str] = (),
    ) -> Launch:
        """``update`` over buffers: those it reads, those it changes, those it writes whole."""
        names, fused = (*reads, *changes, *writes), self.fuse(update)

        def run(b: Buffers) -> None:
            fused(*(b[name] for name in names))

        return Launch(name, run, (*reads, *changes), (*changes, *writes))

    def _begin(self) -> Launch:
        update = partial(updates.begin, pending=self.pending, scratch=self.decoder.kv.scratch)
        reads = ("stopped", "position", "ring", "exits", "fixed", "starts", "buckets")
        writes = (
            "run", "rows", "active", "go", "more", "live", "slots", "fill", "needs_head",
            "previous", "answer", "exit_layer",
        )  # fmt: skip
        return self._launch("begin", update, reads, ("hidden", "depth"), writes)

    def _prelude(self) -> list[Item]:
        decoder, side_inputs, tables = self.decoder, self.decoder.side_inputs, self.tables
        kept = [name for name in tables if name in side_inputs.by_token]

        def embed(b: Buffers) -> None:
            slots = torch.where(b["run"], b["rows@1"], b["scratch"])
            embedded = decoder.embed(b["token"][None], b["rows@1"][None], slots)
            hidden = b["hidden@1"]
            hidden.copy_(torch.where(b["run"], embedded, hidden))

        def sides(b: Buffers) -> None:
            found = {
                name: table.index_select(side_inputs.row_dim[name], b["rows"])
                for name, table in tables.items()
            }
            for name, value in {**found, **side_inputs.masks_at(b["rows"], decoder.spans)}.items():
                b[f"side {name}"].copy_(value)

        stored = tuple(f"table {name}" for name in kept)
        reads = ("token", "rows@1", "run", "scratch", "hidden@1", *stored)
        names = tuple(f"side {name}" for name in self.sides)
        return [
            Launch("embed", embed, reads, ("hidden@1", *stored)),
            Launch("sides", sides, ("rows", *stored), names),
        ]

    def _segment(self, index: int, start: int, end: int) -> list[Item]:
        if start < self.first:
            # before the first exit point there is one row, and it always runs
            return [self._layers(index, start, end, 1)]
        items: list[Item] = []
        for count in self.buckets:
            layers = self._layers(index, start, end, count)
            items.append(Conditional(f"go.{index}@{count}", (layers,), ahead=True))
        if len(items) > 2:
            # few steps run more than one row: they alone look up how many
            items[1:] = [Conditional(f"more.{index}", tuple(items[1:]), ahead=True)]
        if self.options.kv != "defer":
            items.append(Conditional(f"fill.{index}", (self._fill(index, start, end),)))
        return items

    def _layers(self, index: int, start: int, end: int, count: int) -> Launch:
        """Segment ``index``, layers ``start`` to ``end``, for ``count`` rows."""
        decoder, names = self.decoder, self.sides
        decoder.prepare(count, captured=True)
        part = f"{index}@{count}"

        def run(b: Buffers) -> None:
            hidden = before = b[f"hidden@{count}"]
            sides = {name: b[f"side {name}@{count}"] for name in names}
            place = Place(b[f"slots.{part}"], sides)
            for layer in range(start, end):
                hidden = decoder.run_layer(layer, hidden, place, captured=True)
            before.copy_(torch.where(b[f"live.{part}"][None, :, None], hidden, before))

        cache = self._cache_names(start, end)
        sides = tuple(f"side {name}@{count}" for name in names)
        reads = (f"hidden@{count}", f"slots.{part}", f"live.{part}", *sides, *cache)
        rows = "1 row" if count == 1 else f"{count} rows"
        name = f"layers {start}–{end}, {rows}"
        return Launch(name, run, reads, (f"hidden@{count}", *cache))

    def _fill(self, index: int, start: int, end: int) -> Launch:
        """Keys and values of an exited token: projected from its hidden state, or blank."""
        decoder, names = self.decoder, self.sides
        blank = self.options.kv == "drop"

        def run(b: Buffers) -> None:
            slots = torch.where(b[f"fill.{index}"], b["rows@1"], b["scratch"])
            place = Place(slots, {name: b[f"side {name}@1"] for name in names})
            for layer in range(start, end):
                if blank:
                    decoder.kv.blank(layer, slots)
                else:
                    decoder.fill_kv(layer, b["hidden@1"], place, captured=True)

        sides = tuple(f"side {name}@1" for name in names)
        cache = self._cache_names(start, end)
        reads = ("hidden@1", "rows@1", "scratch", f"fill.{index}", *sides, *cache)
        return Launch(f"fill {start}–{end}", run, reads, cache)

    def _cache_names(self, start: int, end: int) -> tuple[str, ...]:
        return tuple(f"{k}.{layer}" for layer in range(start, end) for k in ("keys", "values"))

    def _draft(self, exits: ExitPoints) -> Launch:
        def run(b: Buffers) -> None:
            b["drafts"].copy_(exits.draft(b["hidden@1"]))

        return Launch("draft", run, ("hidden@1",), ("drafts",))

    def _exit(self, layer: int) -> Conditional:
        active, number = f"active.{layer}", f"layer.{layer}"
        self.add(number, self.tensor([layer]), "kept")
        where = ("wants_exit", number, "starts", "rows")
        changed = ("active", "go", "more", "live", "slots", "fill", "exit_layer")
        exits = self.exits
        if exits is None:

            def want(b: Buffers) -> None:
                b["wants_exit"].copy_(b[active])

            wanted = Launch(f"want exit {layer}", want, (active,), ("wants_exit",))
            exited = self._launch(f"exit {layer}", self.exit_early, where, changed)
            return Conditional(active, (wanted, exited))

        def predict(b: Buffers) -> None:
            wants, probabilities, z = exits.predict(
                layer, b["hidden@1"], b["drafts"], b["previous"]
            )
            b["z"].copy_(z)
            noted = (b[active], b["previous"], b["wants_exit"], b["counters"])
            self.predicted(wants, probabilities, *noted)

        answer = ("needs_head", "answer", "counters")

        def verify(b: Buffers) -> None:
            if self.options.draws:
                self._draw(b, exits.logits(b["z"]), number)
                token, drafted = exits.named(b["drawn"], b["drafts"])
            else:
                token, drafted = exits.verify(b["z"], b["drafts"])
            self.verified(token, drafted, *(b[name] for name in (*answer, *where, *changed)))

        reads = ("hidden@1", "drafts", "previous", active, "counters")
        writes = ("z", "previous", "wants_exit", "counters")
        prediction = Launch(f"predict {layer}", predict, reads, writes)
        reads = ("z", "drafts", *where, *answer, *changed, *self.drawing)
        writes = (*answer, *changed, *self.drawn)
        verification: Item = Launch(f"verify {layer}", verify, reads, writes)
        if self.options.verify == "wanted":
            verification = Conditional("wants_exit", (verification,))
        return Conditional(active, (prediction, verification))

    def _head(self) -> Conditional:
        decoder = self.decoder
        head_token = self.fuse(updates.head_token)

        def run(b: Buffers) -> None:
            logits = decoder.logits(b["hidden@1"])[0]
            best, token = logits.max(-1)
            if self.options.draws:
                self._draw(b, logits, "layer.head")
                token = b["drawn"]
            head_token(token, best, b["needs_head"], b["answer"], b["counters"])

        changed = ("answer", "counters")
        number = ("layer.head",) if self.options.draws else ()
        reads = ("hidden@1", "needs_head", *changed, *self.drawing, *number)
        return Conditional("needs_head", (Launch("head", run, reads, (*changed, *self.drawn)),))

    def _draw(self, b: Buffers, logits: Tensor, salt: str) -> None:
        self.draw(logits, *(b[name] for name in (*self.drawing, salt, *self.drawn)))

    def _commit(self) -> Launch:
        reads = ("run", "answer", "exit_layer", "stop")
        changes = ("token", "position", "stopped", "depth", "ring", "counters")
        return self._launch("commit", updates.commit, reads, changes, ("out",))
