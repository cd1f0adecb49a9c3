"""Build the exact, speculative step: a chain of draft tokens verified in one pass.

    draft, embed, sides, all layers, head, accept

There are no conditionals: all rows always run. The number of rows is fixed, so that a token comes
from the same kernels whatever was drafted, and drafts change how many passes an answer takes, never
the answer (greedy verification: Leviathan et al., 2023). A token that is sampled hangs on its
position and the seed, and is compared with its draft token as the likeliest one is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Place
from eepass.runtime.step import drawing, speculating
from eepass.runtime.step.build import Fuse
from eepass.runtime.step.data import Buffer, Buffers, Launch, Life, Step
from eepass.runtime.step.updates import NOTHING


def build_speculative_step(
    decoder: Decoder, rows: int, stop: tuple[int, ...], draws: bool, fuse: Fuse | None = None
) -> Step:
    """The step of ``decoder`` over ``rows`` rows, a row count it is split for; ``stop``: end
    tokens; ``draws``: tokens can be sampled."""
    return _Builder(decoder, rows, draws, fuse or (lambda update: update)).build(stop)


class _Builder:
    def __init__(self, decoder: Decoder, rows: int, draws: bool, fuse: Fuse) -> None:
        self.decoder, self.rows, self.draws, self.fuse = decoder, rows, draws, fuse
        self.buffers: dict[str, Buffer] = {}

    def build(self, stop: tuple[int, ...]) -> Step:
        self._make_buffers(stop)
        self._make_sides()
        items = (self._draft(), self._embed(), self._sides(), self._layers(), self._head(),
                 self._accept())  # fmt: skip
        constants = {name: t for name, t in self.decoder.tensors.items() if t.numel()}
        return Step(self.buffers, items, self._zeros(1, dtype=torch.bool), constants)

    def _add(self, name: str, tensor: Tensor, life: Life = "step") -> None:
        self.buffers[name] = Buffer(name, tensor, life)

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
        for name in ("ids", "positions", "rows", "tokens"):
            self._add(name, self._zeros(rows))
        self._add("known", self._zeros(1, dtype=torch.bool))
        self._add("best", self._zeros(rows, dtype=torch.float32))
        self._add("hidden", self._zeros(1, rows, decoder.hidden_size, dtype=decoder.dtype))
        for kind, tensors in (("keys", decoder.kv.keys), ("values", decoder.kv.values)):
            for layer, tensor in enumerate(tensors):
                name = f"{kind}.{layer}"
                self.buffers[name] = Buffer(name, tensor, "kept", "cache")

    def _make_sides(self) -> None:
        decoder, side_inputs = self.decoder, self.decoder.side_inputs
        if side_inputs.by_token:
            # creates the tables of what depends on tokens; the slots are scratch
            slots = decoder.kv.scratch + torch.arange(self.rows, device=decoder.device)
            decoder.embed(self._zeros(1, self.rows), self._zeros(1, self.rows), slots)
        like = side_inputs.span(0, self.rows).sides
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

    def _draft(self) -> Launch:
        reads = ("history", "position", "last position")
        writes = ("ids", "positions", "rows", "known")
        return self._launch("draft", speculating.draft, reads, (), writes)

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

        def run(b: Buffers) -> None:
            masks = side_inputs.masks_at(b["rows"])
            for name in self.sides:
                if name in masks:
                    value = masks[name]
                else:
                    table, dim = side_inputs.tables[name], side_inputs.row_dim[name]
                    value = table.index_select(dim, b["rows"])
                b[f"side {name}"].copy_(value)

        names = tuple(f"side {name}" for name in self.sides)
        return Launch("sides", run, ("rows", *stored), names)

    def _layers(self) -> Launch:
        decoder = self.decoder
        decoder.prepare(self.rows, captured=True)
        layers = range(decoder.num_layers)

        def run(b: Buffers) -> None:
            hidden = b["hidden"]
            place = Place(b["rows"], {name: b[f"side {name}"] for name in self.sides})
            for layer in layers:
                hidden = decoder.run_layer(layer, hidden, place, captured=True)
            b["hidden"].copy_(hidden)

        cache = tuple(f"{kind}.{layer}" for layer in layers for kind in ("keys", "values"))
        reads = ("hidden", "rows", *(f"side {name}" for name in self.sides), *cache)
        return Launch(f"layers 0–{len(layers)}, {self.rows} rows", run, reads, ("hidden", *cache))

    def _head(self) -> Launch:
        decoder = self.decoder
        options = (*drawing.OPTIONS, "rows", "layer.head") if self.draws else ()
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
        reads = ("ids", "known", "tokens", "best", "stop", "limit")
        changes = ("history", "position", "stopped", "counters")
        return self._launch("accept", speculating.accept, reads, changes, ("out",))
