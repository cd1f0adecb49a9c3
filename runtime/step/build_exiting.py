"""Build the speculative step with exits: a tree of draft tokens that may leave after a layer.

    begin, [fresh] draft from head, draft from text, lead, place, embed, sides, first segment, draft
    [active] predict, [wants_exit] verify,   at each exit point
    [go] segment,                            after each
    [go] head, settle, [full] follow, [moved] compact

In brackets: the flag of a conditional. All rows always run: a row costs little beside the weights.
Keys and values of tokens that exited are written when those run again (``exiting.py``).
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch

from eepass.exit_rule import SCHEDULE_WINDOW
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.step import drawing, exiting, updates
from eepass.runtime.step.build import Fuse
from eepass.runtime.step.build_speculative import SpeculativeBuilder
from eepass.runtime.step.data import Buffers, Conditional, Item, Launch, Step
from eepass.runtime.step.exit_points import ExitPoints
from eepass.runtime.step.head_drafts import HeadDrafts
from eepass.runtime.step.layout import StepOptions

FLAGS = ("go", "fresh", "wants_exit", "full", "moved")
# the tree, and what is decided about its rows
TREE = (
    "ids", "parents", "paths", "tree known", "pending", "limit", "root", "stop", "most", "tokens",
    "decided",
)  # fmt: skip


def build_exiting_step(
    decoder: Decoder,
    exits: ExitPoints | None,
    options: StepOptions,
    fuse: Fuse | None = None,
    head: HeadDrafts | None = None,
) -> Step:
    """The step of ``decoder`` over the rows of ``options.tree`` that exits at the points of
    ``exits``, bound for as many rows, or where ``options.force`` says."""
    fuse = fuse or (lambda update: update)
    return _ExitingBuilder(decoder, exits, options, fuse, head).build(options.stop)


class _ExitingBuilder(SpeculativeBuilder):
    tree = ("root", "tree ids", "tree parents")
    drafts_life = "kept"

    def __init__(
        self, decoder: Decoder, exits: ExitPoints | None, options: StepOptions, fuse: Fuse,
        head: HeadDrafts | None,
    ) -> None:  # fmt: skip
        assert options.tree is not None
        if options.kv != "defer":
            raise ValueError(
                f"kv={options.kv!r}: must be defer, where rows of a tree exit: the next pass runs "
                "them again and writes their keys and values"
            )
        super().__init__(decoder, options.tree, options.draws, fuse, head)
        self.options, self.exact, self.layers = options, options.exact, decoder.num_layers
        self.exits = exits if options.force is None else None
        points = (options.force,) if self.exits is None else self.exits.layers
        # after the last layer the LM head decides
        self.points = [layer for layer in points if layer is not None and layer < self.layers]
        self.most = min(options.pending, self.rows - 1)
        self.confirmed = min(self.confirmed + self.most, self.rows)
        # all exit points share their compiled updates
        self.predicted, self.verified = fuse(exiting.predicted), fuse(exiting.verified)
        self.draw = fuse(drawing.draw)

    def build(self, stop: tuple[int, ...]) -> Step:
        self._make_buffers(stop)
        self._make_sides()
        items: list[Item] = [self._begin()]
        if self.head is not None:
            items.append(Conditional("fresh", (self._draft_from_head(self.head),)))
        if self.shape.branches:
            items.append(self._draft_from_text())
        items += [self._lead(), self._place(), self._embed(), self._sides(), *self._segments()]
        items += [self._head(), self._settle()]
        if self.head is not None:
            items.append(Conditional("full", (self._follow(),)))
        if not self.shape.is_chain:
            items.append(Conditional("moved", (self._compact(),)))
        constants = dict(self.decoder.tensors)
        if self.exits is not None:
            constants |= {f"exit {name}": tensor for name, tensor in self.exits.tensors.items()}
        constants = {name: tensor for name, tensor in constants.items() if tensor.numel()}
        return Step(self.buffers, tuple(items), self.flags, constants)

    def _make_buffers(self, stop: tuple[int, ...]) -> None:
        super()._make_buffers(stop)
        options, layers, device = self.options, self.layers, self.decoder.device
        scheduled = bool(options.ranking) and options.force is None
        fixed = options.ranking[: options.always] if scheduled else self.points
        numbers = range(layers + 1)
        kept = {
            "pending": self._zeros(1),
            "most": self._zeros(1) + self.most,
            "ring": self._zeros(SCHEDULE_WINDOW) + updates.NEVER,
            "exits": torch.tensor([n in self.points for n in numbers], device=device),
            "fixed": torch.tensor([n in fixed for n in numbers], device=device),
            "counters": self._zeros(layers + 1 + len(exiting.COUNTED)),
            "out": self._zeros(self.rows + 2),
            **{f"layer.{n}": self._zeros(1) + n for n in self.points},
        }
        for name, tensor in kept.items():
            self._add(name, tensor, "kept")
        for name in ("ids", "parents"):
            self._add(f"tree {name}", self._zeros(self.rows - 1))
        self._add("tree known", self._zeros(self.rows - 1, dtype=torch.bool))
        for name in ("root", "exit_layer"):
            self._add(name, self._zeros(1))
        for name in ("decided", "wanted"):
            self._add(name, self._zeros(self.rows, dtype=torch.bool))
        k = self.exits.plan.draft_tokens if self.exits is not None else 1
        self._add("previous", self._zeros(self.rows, k, dtype=torch.float32))
        if self.exits is not None:
            self._add("drafts", self._zeros(self.rows, k))
            self._add("z", torch.zeros_like(self.buffers["hidden"].tensor))
        if self.draws:
            self._add("drawn", self._zeros(self.rows))

    def _make_flags(self) -> None:
        # contiguous, for a host that reads them all at once
        self.flags = self._zeros(len(FLAGS) + self.layers + 1, dtype=torch.bool)
        for at, name in enumerate(FLAGS):
            self._add(name, self.flags[at : at + 1])
        self._add("active", self.flags[len(FLAGS) :])
        for point in self.points:
            self._part(f"active.{point}", "active", point, point + 1)

    def _begin(self) -> Launch:
        reads = (
            "history", "position", "pending", "stopped", "limit", "stop", "ring", "exits", "fixed",
            "most",
        )  # fmt: skip
        writes = ("go", "active", "fresh", "exit_layer", "previous", "wants_exit")
        update = partial(exiting.begin, exact=self.exact)
        return self._launch("begin", update, reads, (), writes)

    def _lead(self) -> Launch:
        reads = (
            "history", "position", "pending", "fresh", "draft ids", "draft parents", "draft known",
        )  # fmt: skip
        writes = ("root", "tree ids", "tree parents", "tree known", "tokens", "best", "decided")
        update = partial(exiting.lead, named=self.shape.named)
        return self._launch("lead", update, reads, (), writes)

    def _segments(self) -> list[Item]:
        drafts = self.exits.plan.draft_layer if self.exits is not None else 0
        cuts = sorted({0, *self.points, self.layers} | ({drafts} & set(range(self.layers))))
        first, items = min(self.points, default=self.layers), list[Item]()
        for start, end in pairwise(cuts):
            segment = self._layers(start, end, "go")
            after = start >= first
            items.append(Conditional("go", (segment,), ahead=True) if after else segment)
            if self.exits is not None and end == drafts:
                items.append(self._draft(self.exits))
            if end in self.points:
                exits = self.exits
                items.append(self._force(end) if exits is None else self._exit(end, exits))
        return items

    def _draft(self, exits: ExitPoints) -> Launch:
        def run(b: Buffers) -> None:
            b["drafts"].copy_(exits.draft(b["hidden"]))

        return Launch("draft", run, ("hidden",), ("drafts",))

    def _force(self, layer: int) -> Conditional:
        """All rows exit here, with what the LM head gives."""
        names = (f"active.{layer}", f"layer.{layer}", "go", "active", "exit_layer")
        changed = ("go", "active", "exit_layer")

        def run(b: Buffers) -> None:
            exiting.exit_early(*(b[name] for name in names))

        return Conditional(f"active.{layer}", (Launch(f"exit {layer}", run, names, changed),))

    def _exit(self, layer: int, exits: ExitPoints) -> Conditional:
        active, number = f"active.{layer}", f"layer.{layer}"
        noted = (active, *TREE, "previous", "wanted", "wants_exit", "counters")
        changed = ("tokens", "decided", "go", "active", "exit_layer", "counters")
        taken = ("wanted", *TREE, number, "go", "active", "exit_layer", "counters")
        # where exits are exact their guesses are drawn as the token itself will be
        salt = "layer.head" if self.exact else number
        drawing_from = (*drawing.OPTIONS, "positions", salt) if self.draws else ()

        def predict(b: Buffers) -> None:
            wants, probabilities, z = exits.predict(layer, b["hidden"], b["drafts"], b["previous"])
            b["z"].copy_(z)
            self.predicted(wants, probabilities, *(b[name] for name in noted))

        def verify(b: Buffers) -> None:
            if self.draws:
                options = (b[name] for name in drawing_from)
                self.draw(exits.logits(b["z"]), *options, b["drawn"])
                token, drafted = exits.named(b["drawn"], b["drafts"])
            else:
                token, drafted = exits.verify(b["z"], b["drafts"])
            self.verified(token, drafted, *(b[name] for name in taken))

        reads = tuple(name for name in noted if name != "wanted")
        prediction = Launch(
            f"predict {layer}", predict, ("hidden", "drafts", *reads),
            ("z", "previous", "wanted", "wants_exit", "counters"),
        )  # fmt: skip
        drawn = ("drawn",) * self.draws
        reads = ("z", "drafts", *taken, *drawing_from)
        verification: Item = Launch(f"verify {layer}", verify, reads, (*changed, *drawn))
        return Conditional(active, (prediction, Conditional("wants_exit", (verification,))))

    def _head(self) -> Item:
        decoder, forced = self.decoder, self.options.force is not None
        update = partial(exiting.head_tokens, layers=self.layers, exact=self.exact)
        take = self.fuse(update)
        # a forced exit takes the head's token
        flag = "stopped" if forced else "go"
        options = (*drawing.OPTIONS, "positions", "layer.head") if self.draws else ()

        def run(b: Buffers) -> None:
            logits = decoder.logits(b["hidden"])[0]
            best, tokens = logits.max(-1)
            if self.draws:
                self.draw(logits, *(b[name] for name in options), b["drawn"])
                tokens = b["drawn"]
            computed = ~b[flag] if forced else b[flag]
            states = (b["decided"], b["exit_layer"], computed)
            take(tokens, best, *states, b["tokens"], b["best"], b["counters"])

        changed = ("tokens", "best", "counters")
        reads = ("hidden", "decided", "exit_layer", flag, *changed, *options)
        launch = Launch("head", run, reads, (*changed, *("drawn",) * self.draws))
        return launch if forced else Conditional("go", (launch,))

    def _settle(self) -> Launch:
        reads = (
            "ids", "parents", "paths", "tree known", "root", "tokens", "best", "stop", "limit",
            "most", "exit_layer",
        )  # fmt: skip
        changes = ("history", "position", "pending", "stopped", "ring", "counters")
        writes = ("path", "moved", "full", "out")
        update = partial(exiting.settle, exact=self.exact, layers=self.layers)
        return self._launch("settle", update, reads, changes, writes)

    def _follow(self) -> Launch:
        reads = ("full", "rows", "path", "position", "tokens", "features")
        changes = ("confirmed", "confirmed features", "first confirmed", "number confirmed")
        return self._launch("follow", exiting.follow, reads, changes)
