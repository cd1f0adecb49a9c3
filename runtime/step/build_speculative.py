"""Build the exact, speculative step: a tree of draft tokens verified in one pass.

    draft, place, embed, sides, all layers, head, accept
    if the path lies apart: compact

All rows go through all layers (``build_exiting.py``: with exits). The number of rows is fixed, so
that a token comes from the same kernels whatever was drafted, and drafts change how many passes an
answer takes, never the answer (greedy verification: Leviathan et al., 2023; of a tree: SpecInfer,
Miao et al., 2024). A token that is sampled hangs on its position and the seed, and is compared with
its draft token as the likeliest one is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Place
from eepass.runtime.step import drawing, speculating, text_drafts
from eepass.runtime.step.build import Fuse
from eepass.runtime.step.data import Buffer, Buffers, Conditional, Item, Launch, Life, Step
from eepass.runtime.step.head_drafts import HeadDrafts
from eepass.runtime.step.tree_shape import TreeShape
from eepass.runtime.step.updates import NOTHING


def build_speculative_step(
    decoder: Decoder,
    shape: TreeShape,
    stop: tuple[int, ...],
    draws: bool,
    fuse: Fuse | None = None,
    head: HeadDrafts | None = None,
) -> Step:
    """The step of ``decoder`` over the rows of ``shape``, a row count it is split for; ``stop``:
    end tokens; ``draws``: tokens can be sampled; ``head``: the draft head, where rows are its."""
    return SpeculativeBuilder(decoder, shape, draws, fuse or (lambda update: update), head).build(
        stop
    )


class SpeculativeBuilder:
    # which buffers hold the tree: where it begins, and the rows after row 0
    tree = ("position", "draft ids", "draft parents")
    # draft tokens of the head that not every pass writes
    drafts_life: Life = "step"

    def __init__(
        self, decoder: Decoder, shape: TreeShape, draws: bool, fuse: Fuse, head: HeadDrafts | None
    ) -> None:
        self.decoder, self.shape, self.rows = decoder, shape, shape.rows
        self.draws, self.fuse, self.head = draws, fuse, head if shape.named else None
        self.buffers: dict[str, Buffer] = {}
        # how many tokens a pass may confirm
        self.confirmed = shape.deepest + 1

    def build(self, stop: tuple[int, ...]) -> Step:
        self._make_buffers(stop)
        self._make_sides()
        items: list[Item] = [self._place(), self._embed(), self._sides()]
        items.append(self._layers(0, self.decoder.num_layers))
        items += [self._logits(), self._accept()]
        if self.shape.branches:
            items.insert(0, self._draft_from_text())
        if self.head is not None:
            items.insert(0, self._draft_from_head(self.head))
            items.append(self._follow())
        if not self.shape.is_chain:
            items.append(Conditional("moved", (self._compact(),)))
        constants = {name: t for name, t in self.decoder.tensors.items() if t.numel()}
        return Step(self.buffers, tuple(items), self.buffers["moved"].tensor, constants)

    def _add(self, name: str, tensor: Tensor, life: Life = "step") -> None:
        self.buffers[name] = Buffer(name, tensor, life)

    def _part(self, name: str, base: str, begin: int, end: int) -> None:
        if begin < end:
            whole = self.buffers[base]
            self.buffers[name] = Buffer(name, whole.tensor[begin:end], whole.life, base=base)

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.decoder.device)

    def _make_buffers(self, stop: tuple[int, ...]) -> None:
        decoder, rows = self.decoder, self.rows
        kept = {
            # as many as there are slots, and the one that follows
            "history": self._zeros(decoder.cache_length + 1),
            "position": self._zeros(1),
            "limit": self._zeros(1),
            "last position": self._zeros(1) + decoder.num_positions - 1,
            "stopped": self._zeros(1, dtype=torch.bool),
            # at least one element, which equals no token
            "stop": torch.tensor([*stop, NOTHING], device=decoder.device),
            "counters": self._zeros(len(speculating.COUNTED)),
            "out": self._zeros(rows + 1),
        }
        if self.draws:
            for name in drawing.OPTIONS:
                dtype = torch.long if name in ("top_k", "seed") else torch.float64
                kept[name] = self._zeros(1, dtype=dtype)
            kept["layer.head"] = self._zeros(1)
        for name, tensor in kept.items():
            self._add(name, tensor, "kept")
        for name in ("ids", "parents", "paths", "positions", "rows", "tokens", "path"):
            self._add(name, self._zeros(rows))
        self._make_flags()
        self._add("best", self._zeros(rows, dtype=torch.float32))
        self._add("hidden", self._zeros(1, rows, decoder.hidden_size, dtype=decoder.dtype))
        self._make_drafts()
        for kind, tensors in (("keys", decoder.kv.keys), ("values", decoder.kv.values)):
            for layer, tensor in enumerate(tensors):
                name = f"{kind}.{layer}"
                self.buffers[name] = Buffer(name, tensor, "kept", "cache")

    def _make_flags(self) -> None:
        self._add("moved", self._zeros(1, dtype=torch.bool))

    def _make_drafts(self) -> None:
        """Draft tokens: those of the head first, then those from the text."""
        count, named = self.rows - 1, self.shape.named
        for name, dtype in (("ids", torch.long), ("parents", torch.long), ("known", torch.bool)):
            # without draft tokens nothing writes them
            life = self.drafts_life if count else "kept"
            self._add(f"draft {name}", self._zeros(count, dtype=dtype), life)
            self._part(f"draft {name} of head", f"draft {name}", 0, named)
            self._part(f"draft {name} from text", f"draft {name}", named, count)
        if self.head is None:
            return
        width, confirmed = self.head.head.feature_size, self.confirmed
        features = self._zeros(self.rows, width, dtype=self.decoder.dtype)
        self._add("features", features, self.drafts_life)
        kept = {
            "confirmed": self._zeros(confirmed),
            "confirmed features": self._zeros(confirmed, width, dtype=self.decoder.dtype),
            "first confirmed": self._zeros(1),
            "number confirmed": self._zeros(1),
            **self.head.state(),
        }
        for name, tensor in kept.items():
            self._add(name, tensor, "kept")

    def _make_sides(self) -> None:
        decoder, side_inputs = self.decoder, self.decoder.side_inputs
        if side_inputs.by_token:
            # creates the tables of what depends on tokens; the slots are scratch
            slots = decoder.kv.scratch + torch.arange(self.rows, device=decoder.device)
            decoder.embed(self._zeros(1, self.rows), self._zeros(1, self.rows), slots)
        like = decoder.captured_span(self.rows).sides
        for name in side_inputs.by_token:
            table = side_inputs.tables[name]
            self.buffers[f"table {name}"] = Buffer(f"table {name}", table, "kept", "cache")
        self.sides = list(like)
        for name, value in like.items():
            # in memory as slices of tables are, for which layers are compiled
            buffer = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=value.device
            )
            self._add(f"side {name}", buffer.zero_())

    def _launch(
        self, name: str, update: Callable[..., None], reads: tuple[str, ...],
        changes: tuple[str, ...], writes: tuple[str, ...] = (),
    ) -> Launch:  # fmt: skip
        """``update`` over buffers: those it reads, those it changes, those it writes whole."""
        names, fused = (*reads, *changes, *writes), self.fuse(update)

        def run(b: Buffers) -> None:
            fused(*(b[name] for name in names))

        return Launch(name, run, (*reads, *changes), (*changes, *writes))

    def _draft_from_text(self) -> Launch:
        writes = tuple(f"draft {name} from text" for name in ("ids", "parents", "known"))
        first = 1 + self.shape.named
        draft = partial(text_drafts.draft, branches=self.shape.branches, first=first)
        return self._launch("draft from text", draft, ("history", "position"), (), writes)

    def _draft_from_head(self, head: HeadDrafts) -> Launch:
        confirmed = ("confirmed", "confirmed features", "first confirmed", "number confirmed")
        state = tuple(head.state())
        levels = head.levels(self.shape, self.confirmed)
        ids, parents, known = (f"draft {name} of head" for name in ("ids", "parents", "known"))

        def run(b: Buffers) -> None:
            found = levels(*(b[name] for name in (*confirmed, *state)))
            b[ids].copy_(found[0])
            b[parents].copy_(found[1])
            b[known].fill_(True)

        reads = (*confirmed, *state)
        return Launch("draft from head", run, reads, (*state, ids, parents, known))

    def _place(self) -> Launch:
        root, *drafts = self.tree
        reads = ("history", root, "last position", *drafts)
        writes = ("ids", "parents", "paths", "positions", "rows")
        return self._launch("place", speculating.place, reads, (), writes)

    def _embed(self) -> Launch:
        decoder = self.decoder
        stored = tuple(f"table {name}" for name in decoder.side_inputs.by_token)

        def run(b: Buffers) -> None:
            hidden = decoder.embed(b["ids"][None], b["positions"][None], b["rows"])
            b["hidden"].copy_(hidden)

        reads = ("ids", "positions", "rows", *stored)
        return Launch("embed", run, reads, ("hidden", *stored))

    def _sides(self) -> Launch:
        side_inputs = self.decoder.side_inputs
        stored = tuple(f"table {name}" for name in side_inputs.by_token)
        spans = {
            name: self.fuse(partial(speculating.tree_spans, window=side_inputs.windows[name]))
            for name in self.decoder.spans
        }
        whole = bool(side_inputs.masks - spans.keys())

        def run(b: Buffers) -> None:
            positions = b["positions"]
            masks = side_inputs.masks_at(positions) if whole else {}
            for name in self.sides:
                if name in spans:
                    spans[name](b["rows"], positions, b["paths"], b[f"side {name}"])
                    continue
                dim = side_inputs.row_dim[name]
                if name in masks:
                    mask = masks[name].movedim(dim, -2)
                    value = speculating.tree_mask(mask, b["rows"][:1], b["paths"]).movedim(-2, dim)
                else:
                    at = b["rows"] if name in side_inputs.by_token else positions
                    value = side_inputs.tables[name].index_select(dim, at)
                b[f"side {name}"].copy_(value)

        names = tuple(f"side {name}" for name in self.sides)
        return Launch("sides", run, ("rows", "positions", "paths", *stored), names)

    def _layers(self, start: int, end: int, flag: str = "") -> Launch:
        """Layers ``start`` to ``end``; hidden states stay as they are where ``flag`` is false."""
        decoder = self.decoder
        decoder.prepare(self.rows, captured=True)

        def run(b: Buffers) -> None:
            hidden = before = b["hidden"]
            place = Place(b["rows"], {name: b[f"side {name}"] for name in self.sides})
            if not start:
                self._keep_features(b, 0, hidden)
            for layer in range(start, end):
                hidden = decoder.run_layer(layer, hidden, place, captured=True)
                self._keep_features(b, layer + 1, hidden)
            before.copy_(torch.where(b[flag], hidden, before) if flag else hidden)

        cache, flags = self._cache(start, end), (flag,) * bool(flag)
        reads = ("hidden", "rows", *(f"side {name}" for name in self.sides), *cache, *flags)
        features = ("features",) if self.head is not None else ()
        if self.drafts_life == "kept":
            # of some layers alone
            reads += features
        name = f"layers {start}–{end}, {self.rows} rows"
        return Launch(name, run, reads, ("hidden", *cache, *features))

    def _keep_features(self, b: Buffers, layer: int, hidden: Tensor) -> None:
        """Keep what the draft head reads of the hidden states [1, R, H] after ``layer`` layers."""
        if self.head is None:
            return
        parts = b["features"].split(self.decoder.hidden_size, -1)
        if layer == self.decoder.num_layers:
            parts[0].copy_(self.head.norm(hidden)[0])
        for part, wanted in zip(parts[1:], self.head.layers, strict=True):
            if layer == wanted:
                part.copy_(hidden[0])

    def _cache(self, start: int, end: int) -> tuple[str, ...]:
        layers = range(start, end)
        return tuple(f"{kind}.{layer}" for layer in layers for kind in ("keys", "values"))

    def _logits(self) -> Launch:
        decoder = self.decoder
        options = (*drawing.OPTIONS, "positions", "layer.head") if self.draws else ()
        draw = self.fuse(drawing.draw)

        def run(b: Buffers) -> None:
            logits = decoder.logits(b["hidden"])[0]
            best, tokens = logits.max(-1)
            b["best"].copy_(best)
            b["tokens"].copy_(tokens)
            if options:
                draw(logits, *(b[name] for name in options), b["tokens"])

        return Launch("head", run, ("hidden", *options), ("best", "tokens"))

    def _accept(self) -> Launch:
        reads = ("ids", "parents", "paths", "draft known", "tokens", "best", "stop", "limit")
        changes = ("history", "position", "stopped", "counters")
        writes = ("path", "moved", "out")
        return self._launch("accept", speculating.accept, reads, changes, writes)

    def _follow(self) -> Launch:
        """Confirmed tokens and their features, for the draft head to run in the next pass."""
        reads = ("rows", "path", "out", "features")
        writes = ("confirmed", "confirmed features", "first confirmed", "number confirmed")
        return self._launch("follow", speculating.follow, reads, (), writes)

    def _compact(self) -> Launch:
        decoder, by_token = self.decoder, sorted(self.decoder.side_inputs.by_token)
        stored = tuple(f"table {name}" for name in by_token)

        def run(b: Buffers) -> None:
            source = b["rows"][b["path"]]
            decoder.kv.move_rows(source, b["rows"])
            decoder.side_inputs.move_rows(source, b["rows"])

        written = (*self._cache(0, decoder.num_layers), *stored)
        return Launch("compact", run, ("rows", "path", *written), written)
