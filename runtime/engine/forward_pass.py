"""One pass: the rows of some sequences, through as many layers as their answers take.

A sequence brings its drafts as a tree, and at the layer where they wait the tokens that left
early before. After each exit point drafts that can no longer be right are dropped; a sequence
whose likeliest path is answered from end to end leaves (T3 of SpecEE, arXiv 2504.08850, 6: the
exit layer of a path is the largest of its tokens'), the others go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Place, Row
from eepass.runtime.drafting.tree import Tree
from eepass.runtime.engine.sequence import PendingTokens
from eepass.runtime.engine.sequence import Sequence as Decoding
from eepass.runtime.exits.exits import Choose, Exits, RowState
from eepass.runtime.statistics import Statistics


@dataclass(slots=True, eq=False)
class Part:
    """What one sequence brings to a pass (``tree`` None: only what waits), and what became of it.

    ``answers``: what follows each node that is known; ``path``: the nodes that hold, root first;
    ``tokens``: what the sequence grows by; ``layer``: layers run; ``keep``: how many tokens of
    the sequence hold, if some are taken back.
    """

    sequence: Decoding
    tree: Tree | None
    active: frozenset[int] = frozenset()
    choose: Choose | None = None
    path: list[int] = field(default_factory=list)
    answers: dict[int, int] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    layer: int = 0
    keep: int | None = None
    # positions of tokens that waited and have now reached the last boundary
    caught_up: list[int] = field(default_factory=list)
    # by node: the normed state [H] where it left early, the last boundary [H] where it did not,
    # and the states [H] at boundaries a draft wants
    z: dict[int, Tensor] = field(default_factory=dict)
    last: dict[int, Tensor] = field(default_factory=dict)
    features: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def alive(self) -> list[int]:
        """Nodes that may still be right, given the answers so far."""
        assert self.tree is not None
        found = [0]
        for node in range(1, len(self.tree)):
            parent = self.tree.parents[node]
            fits = parent not in self.answers or self.answers[parent] == self.tree.tokens[node]
            if parent in found and fits:
                found.append(node)
        return found

    def roll_back(self, position: int, answer: int) -> None:
        """The token after ``position`` was a wrong guess: it is ``answer``."""
        self.keep, self.path, self.tokens = position + 1, [], [answer]

    def settle(self) -> None:
        """Name the tokens the path leads to, up to where the answer ends."""
        sequence = self.sequence
        if self.keep is None:
            self.tokens = [self.answers[node] for node in self.path]
        count = (len(sequence.tokens) if self.keep is None else self.keep) - sequence.prompt_length
        for index, token in enumerate(self.tokens, 1):
            if token in sequence.stop or count + index >= sequence.limit:
                self.tokens, self.path = self.tokens[:index], self.path[:index]
                return

    def states(self, layers: Sequence[int]) -> Tensor:
        """What a draft wants of the path's nodes: z and the boundaries ``layers`` [n, F·H]."""
        wanted = [torch.stack([self.z[node] for node in self.path])]
        for layer in layers:
            # a boundary a node did not reach is stood in for by the last it did
            wanted.append(torch.stack([self._at(node, layer) for node in self.path]))
        return torch.cat(wanted, -1)

    def _at(self, node: int, layer: int) -> Tensor:
        if (node, layer) in self.features:
            return self.features[node, layer]
        reached = [n for (owner, n) in self.features if owner == node]
        return self.features[node, max(reached)] if reached else self.z[node]


def norm_paths(parts: Sequence[Part], exits: Exits) -> None:
    """Give the nodes of all paths that went all the way their z, in one call."""
    ended = [(part, node) for part in parts for node in part.path if node in part.last]
    if ended:
        rows = torch.stack([part.last[node] for part, node in ended])
        for (part, node), z in zip(ended, exits.final(rows[None])[0], strict=True):
            part.z[node] = z


@dataclass(frozen=True, slots=True, eq=False)
class _At:
    """A row on its way: a node of its part's tree, or a token that waited (node -1)."""

    part: Part
    node: int
    position: int
    row: Row


class ForwardPass:
    """One pass of ``parts`` through ``decoder``; ``run`` fills them in.

    ``feature_layers``: boundaries whose states are kept for a draft.
    """

    def __init__(
        self,
        decoder: Decoder,
        exits: Exits | None,
        statistics: Statistics,
        feature_layers: Sequence[int] = (),
        kv_policy: str = "defer",
    ) -> None:
        self.decoder, self.exits, self.statistics = decoder, exits, statistics
        self.feature_layers = frozenset(feature_layers)
        self.kv_policy = kv_policy
        self._rows: list[_At] = []
        self._hidden: Tensor | None = None
        self._place: Place | None = None
        self._state: RowState | None = None

    def run(self, parts: Sequence[Part], drafts: Tensor | None = None) -> None:
        """``drafts`` [R, K]: draft tokens of the new rows for the predictors, if they come from no
        boundary."""
        self._embed(parts, drafts)
        first = 0 if self._rows else min(p.sequence.waiting[-1].layer for p in parts)
        for layer in range(first, self.decoder.num_layers):
            self._join(parts, layer)
            if self._hidden is None:
                return
            if self._place is None:
                self._settle()
            assert self._place is not None
            self._hidden = self.decoder.run_layer(layer, self._hidden, self._place)
            boundary = layer + 1
            if boundary in self.feature_layers:
                self._keep_features(boundary)
            if self.exits is not None:
                self._ask(boundary)
            if not self._rows:
                return
        self._end()

    @property
    def ended(self) -> tuple[Tensor | None, list[tuple[Part, int, int]]]:
        """Last boundaries [1, R, H] (padded) and whose they are: part, node, position."""
        return self._hidden, [(at.part, at.node, at.position) for at in self._rows]

    def _end(self) -> None:
        """Note which rows went all the way."""
        assert self._hidden is not None
        for index, at in enumerate(self._rows):
            at.part.layer = self.decoder.num_layers
            if at.node < 0:
                at.part.caught_up.append(at.position)
            else:
                at.part.last[at.node] = self._hidden[0, index]

    def _embed(self, parts: Sequence[Part], drafts: Tensor | None) -> None:
        for part in parts:
            if part.tree is None:
                continue
            sequence, root = part.sequence, part.sequence.position
            for node in range(len(part.tree)):
                path = part.tree.path(node)
                position, slot = root + len(path), sequence.first + root + node
                over = tuple(sequence.first + root + n for n in path)
                self._rows.append(
                    _At(part, node, position, Row(sequence.first, position, slot, over))
                )
        if not self._rows:
            return
        self._settle()
        assert self._place is not None
        size = len(self._place.slots)
        padding = [0] * (size - len(self._rows))
        ids = [at.part.tree.tokens[at.node] for at in self._rows if at.part.tree is not None]
        positions = [at.position for at in self._rows]
        last = positions[-1]
        positions += [min(last + 1 + i, self.decoder.positions - 1) for i in range(len(padding))]
        self._hidden = self.decoder.embed(
            torch.tensor([ids + [ids[-1]] * len(padding)]),
            torch.tensor([positions]),
            self._place.slots,
        )
        if self.exits is not None:
            if drafts is not None and size > len(drafts):
                drafts = torch.cat([drafts, drafts[-1:].expand(size - len(drafts), -1)])
            self._state = self.exits.begin(size, drafts)

    def _settle(self) -> None:
        """Find the place of the rows as they stand."""
        size = self.decoder.bucket(len(self._rows))
        sequences = {at.part.sequence for at in self._rows}
        # several regions are never neighbours
        end = max(s.first + s.room for s in sequences) if len(sequences) == 1 else 0
        self._place = self.decoder.place([at.row for at in self._rows], size, end)

    def _join(self, parts: Sequence[Part], layer: int) -> None:
        """Put the states waiting at ``layer`` before the rows on their way; fill up to a bucket."""
        joined: list[Tensor] = []
        rows: list[_At] = []
        for part in parts:
            waiting = part.sequence.waiting
            here = part.tree is None or any(at.part is part for at in self._rows)
            while here and waiting and waiting[-1].layer == layer:
                group = waiting.pop()
                joined.insert(0, group.hidden)
                first = part.sequence.first
                rows[:0] = [
                    _At(part, -1, at, Row(first, at, first + at))
                    for at in range(group.position, group.end)
                ]
        if not rows:
            return
        self.statistics.rows_caught_up += len(rows)
        self._take(rows + self._rows, joined, count=len(rows))

    def _take(self, rows: list[_At], joined: list[Tensor], count: int) -> None:
        """Make ``rows`` the rows on their way: ``joined`` states of ``count`` rows go first."""
        carried = self._rows
        self._rows, self._place = rows, None
        size = self.decoder.bucket(len(rows))
        states = [*joined]
        if carried:
            assert self._hidden is not None
            states.append(self._hidden[:, : len(carried)])
        if padding := size - len(rows):
            states.append(states[-1][:, -1:].expand(-1, padding, -1))
        self._hidden = torch.cat(states, 1) if len(states) > 1 else states[0]
        if self._state is not None:
            # rows that waited have no drafts; they are not asked
            index = [0] * count + list(range(len(carried))) + [0] * padding
            self._state = self._state.select(torch.tensor(index))

    def _drop(self, keep: list[int]) -> None:
        """Go on with the rows numbered ``keep``; smaller buckets only where that is one."""
        if len(keep) == len(self._rows):
            return
        assert self._hidden is not None
        rows = [self._rows[index] for index in keep]
        if not rows:
            self._rows, self._hidden = [], None
            return
        size = self.decoder.bucket(len(rows))
        index = torch.tensor(keep + keep[-1:] * (size - len(rows)))
        self._rows, self._place = rows, None
        self._hidden = self._hidden[:, index]
        if self._state is not None:
            self._state = self._state.select(index)

    def _keep_features(self, boundary: int) -> None:
        assert self._hidden is not None
        for index, at in enumerate(self._rows):
            if at.node >= 0:
                at.part.features[at.node, boundary] = self._hidden[0, index]

    def _ask(self, boundary: int) -> None:
        assert self.exits is not None
        asked = [
            index
            for index, at in enumerate(self._rows)
            if at.node >= 0 and boundary in at.part.active and at.node not in at.part.answers
        ]
        wants_draft = boundary == self.exits.plan.draft_layer and any(
            at.part.active for at in self._rows
        )
        if not asked and not wants_draft:
            return
        assert self._hidden is not None and self._state is not None
        if wants_draft:
            self._state = self.exits.draft_from(self._hidden, self._state, self.statistics)
        if not asked:
            return
        choose = self._rows[asked[0]].part.choose
        found, self._state = self.exits.check(
            boundary, self._hidden, self._state, asked, self.statistics, choose
        )
        for index, answer in found.answers.items():
            at = self._rows[index]
            at.part.answers[at.node] = answer
            at.part.z[at.node] = found.z[0, index]
        if found.answers:
            self._leave({self._rows[index].part for index in found.answers}, boundary)

    def _leave(self, answered: set[Part], boundary: int) -> None:
        """Drop what can no longer be right; take out the sequences whose path is complete."""
        gone: set[Part] = set()
        alive = {part: part.alive() for part in answered}
        for part, nodes in alive.items():
            if all(node in part.answers for node in nodes):
                part.path, part.layer = nodes, boundary
                self._set_aside(part, boundary)
                gone.add(part)
        keep = [
            index
            for index, at in enumerate(self._rows)
            if at.part not in gone
            and (at.node < 0 or at.part not in alive or at.node in alive[at.part])
        ]
        self._drop(keep)

    def _set_aside(self, part: Part, boundary: int) -> None:
        """The states of a part that leaves wait for the deeper layers, or what else the KV policy
        does with them."""
        depth = self.decoder.num_layers
        if boundary == depth:
            return
        assert self._hidden is not None
        if self.kv_policy != "defer":
            assert self._place is not None and len(self._rows) == 1
            for layer in range(boundary, depth):
                if self.kv_policy == "propagate":
                    self.decoder.fill_kv(layer, self._hidden, self._place)
                else:
                    self.decoder.kv.blank(layer, self._place.slots)
            return
        mine = [
            index
            for index, at in enumerate(self._rows)
            if at.part is part and (at.node < 0 or at.node in part.path)
        ]
        mine.sort(key=lambda index: self._rows[index].position)
        hidden = self._hidden[:, torch.tensor(mine)]
        part.sequence.waiting.append(PendingTokens(boundary, self._rows[mine[0]].position, hidden))
