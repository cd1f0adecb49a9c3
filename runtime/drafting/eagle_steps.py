"""The draft head's steps as graphs: rows of confirmed tokens, and all levels of a tree at once.

A level names ``WIDTH`` tokens after each of its rows. Of all it names the ``BEAM`` likeliest paths
go on: they are the rows of the next level, each attending to confirmed tokens and its own path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import eepass.ops.fused  # noqa: F401  the operators must be defined before they are called
from eepass.ops.packed import INT8
from eepass.private_names import FakeTensorMode
from eepass.runtime.drafting.eagle_form import WINDOW
from eepass.runtime.drafting.eagle_layer import (
    JOINED,
    entered,
    finished,
    for_head,
    mixed,
    projected,
    rotary,
)  # fmt: skip
from eepass.runtime.drafting.eagle_weights import Layout

# the cache: first a slot for each draft token that is expanded (the last one takes what padding
# rows write), then a ring of slots for confirmed tokens, a window and the largest chunk that is
# being added
TREE = 32
SPARE = TREE - 1
RING = WINDOW + 64
# draft tokens of a level that are expanded
BEAM = 4


class Step:
    """The head within a graph, over ``state`` (positions, keys and values of the slots) and weights
    in the order ``HeadWeights`` gives them."""

    def __init__(self, layout: Layout, given: Sequence[Tensor]) -> None:
        self.layout, self.form = layout, layout.form
        self.positions, self.keys, self.values, *fixed = given
        names = (*JOINED, "head", *self.form.norms, "rotary", "embedding", "hot_ids")
        self.weights = dict(zip(names, fixed, strict=True))

    def linear(self, x: Tensor, name: str) -> Sequence[Tensor]:
        weight, (outputs, form) = self.weights[name], self.layout.matrices[name]
        if form is None:
            made = F.linear(x, weight)
        else:
            made = torch.ops.eepass.packed_linear(x, weight, form, sum(outputs), None, INT8)
        return made.split(outputs, -1)

    def logits(self, states: Tensor) -> Tensor:
        """Of the hot vocabulary, float32 [R, N]."""
        weight, (outputs, form) = self.weights["head"], self.layout.matrices["head"]
        states, ops = for_head(states, self.weights, self.form), torch.ops.eepass
        if form is None:
            return ops.logits_rows(states, weight, None)
        return ops.packed_logits(states, weight, form, sum(outputs), None, INT8)

    def confirmed(
        self, tokens: Tensor, features: Tensor, place: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As ``keep``, of confirmed tokens [R] with ``features`` [R, F * H]."""
        self.positions.index_copy_(0, slots, place)
        feature = mixed(features, self.weights, self.linear, self.form)
        return self.keep(tokens, feature, place, slots)

    def keep(
        self, tokens: Tensor, feature: Tensor, place: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keep keys and values of ``tokens`` [R] at positions ``place`` [R] in their slots; their
        queries [heads, R, D], and the hidden state [R, H] that attention is added to."""
        embedded = self.weights["embedding"][tokens]
        x, hidden = entered(embedded, feature, self.weights, self.form)
        angles = rotary(place, self.weights["rotary"], self.keys.dtype)
        q, k, v = (part[0] for part in projected(x[None], *angles, self.linear))
        self.keys.index_copy_(1, slots, k)
        self.values.index_copy_(1, slots, v)
        return q, hidden

    def states(self, q: Tensor, hidden: Tensor, attended: Tensor) -> Tensor:
        """States [R, H] of rows with queries ``q`` [heads, R, D], whose keys and values are kept;
        they attend to the slots ``attended`` [R, TREE + RING]."""
        mask = torch.where(attended, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
        scale = self.layout.head_width**-0.5
        seen = torch.ops.eepass.attend_rows(q, self.keys, self.values, mask, scale)
        return finished(hidden[None], seen[None], self.weights, self.linear, self.form)[0]

    def line(self, last: Tensor) -> Tensor:
        """Slots [RING] of confirmed tokens that drafts after position ``last`` [1] attend to."""
        ring = self.positions[TREE:]
        return (ring <= last) & (ring > last - WINDOW)


class Growing:
    """Levels of a tree as they are named: ids, scores and picks, and the frontier."""

    def __init__(self, step: Step, width: int, keeps_logits: bool = True) -> None:
        """``keeps_logits``: not in one operator, which a GPU has a kernel for."""
        self.step, self.width, self.keeps_logits = step, width, keeps_logits
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def begin(
        self, levels: int, tokens: Tensor, features: Tensor, place: Tensor, slots: Tensor,
        last: Tensor,
    ) -> None:  # fmt: skip
        """``levels`` levels after confirmed tokens [R]; the last is number ``last`` [1]."""
        head = self.step
        q, hidden = head.confirmed(tokens, features, place, slots)
        position = place[last]
        none = torch.zeros(1, TREE, dtype=torch.bool, device=tokens.device)
        attended = torch.cat([none, head.line(position)[None]], 1)
        state = head.states(q[:, last], hidden[last], attended)
        self.name(state, state.new_zeros(1, dtype=torch.float32), none)
        self.grow(levels - 1, position + 1, torch.zeros_like(position), position)

    def name(self, states: Tensor, joint: Tensor, seen: Tensor) -> None:
        """Name ``width`` tokens after each state [R, H], whose paths have log-probabilities
        ``joint`` [R] and see slots ``seen`` [R, TREE]; set the frontier."""
        scores, ids = self._named(states)
        ids = ids.flatten()
        paths = (joint[:, None] + scores).flatten()
        best, pick = (x[0] for x in torch.ops.eepass.top_logits(paths[None], BEAM))
        above = pick // self.width
        self.parts.append((ids, scores.flatten(), pick))
        self.frontier = (ids[pick], states[above], best, seen[above])

    def _named(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest tokens after ``states``: log-probabilities and ids [R, width]."""
        hot_ids = self.step.weights["hot_ids"]
        if not self.keeps_logits:
            z = for_head(states, self.step.weights, self.step.form)
            head = self.step.weights["head"]
            form = (hot_ids, self.width, 1.0, 0.0)
            found: tuple[Tensor, Tensor] = torch.ops.eepass.draft_topk(z, head, None, None, *form)
            return found
        logits = self.step.logits(states)
        values, index = torch.ops.eepass.top_logits(logits, self.width)
        return values - logits.logsumexp(-1, keepdim=True), hot_ids[index]

    def grow(self, levels: int, position: Tensor, slot: Tensor, last: Tensor) -> None:
        """``levels`` more levels, the first at ``position`` [1] and in slots from ``slot`` [1] on,
        after confirmed tokens up to position ``last`` [1]."""
        line = self.step.line(last)[None].expand(BEAM, -1)
        for level in range(levels):
            tokens, before, joint, seen = self.frontier
            slots = slot + level * BEAM + torch.arange(BEAM, device=tokens.device)
            seen = seen | (torch.arange(TREE, device=tokens.device) == slots[:, None])
            place = (position + level).expand(BEAM)
            q, hidden = self.step.keep(tokens, before, place, slots)
            attended = torch.cat([seen, line], 1)
            self.name(self.step.states(q, hidden, attended), joint, seen)

    def results(self) -> tuple[Tensor, ...]:
        ids, scores, picks = (torch.cat(parts) for parts in zip(*self.parts, strict=True))
        return ids, scores, picks, *self.frontier

    def likeliest(self, count: int) -> tuple[Tensor, Tensor]:
        """The ids of the ``count`` draft tokens with the likeliest paths, each after the one that
        it follows, and the rows [count] those stand in, from 1 on; 0 for the root."""
        _, scores, pick = self.parts[0]
        joint, above, number = scores.new_zeros(1), torch.full_like(pick[:1], -1), 0
        paths, parents = [], []
        for _, scores, pick in self.parts:
            # rounding must not make a path likelier than its beginning
            path = (joint[:, None] + scores.view(-1, self.width).clamp_max(0)).flatten()
            paths.append(path)
            parents.append(above.repeat_interleave(self.width))
            joint, above, number = path[pick], number + pick, number + len(path)
        best = torch.ops.eepass.top_logits(torch.cat(paths)[None], count)[1][0]
        chosen = best.sort().values
        parent = torch.cat(parents)[chosen]
        # how many of the chosen come before a parent is its row, less one
        rows = (chosen < parent[:, None]).sum(1) + (parent >= 0).long()
        return torch.cat([ids for ids, _, _ in self.parts])[chosen], rows


def trace_extend(layout: Layout, examples: Sequence[Tensor]) -> GraphModule:
    """Rows of confirmed tokens: tokens [R], features [R, F * H], positions [R], slots [R]."""

    def step(*given: Tensor) -> tuple[Tensor]:
        _, hidden = Step(layout, given[4:]).confirmed(*given[:4])
        return (hidden[:1],)

    return _traced(step, examples)


def trace_begin(levels: int, width: int, layout: Layout, examples: Sequence[Tensor]) -> GraphModule:
    """Rows of confirmed tokens, the last of them number ``last`` [1], then a tree after it."""

    def step(
        tokens: Tensor, features: Tensor, place: Tensor, slots: Tensor, last: Tensor, *given: Tensor
    ) -> tuple[Tensor, ...]:
        growing = Growing(Step(layout, given), width)
        growing.begin(levels, tokens, features, place, slots, last)
        return growing.results()

    return _traced(step, examples)


def trace_tree(
    levels: int, width: int, count: int, layout: Layout, examples: Sequence[Tensor]
) -> GraphModule:
    """``number`` [1] confirmed tokens, the first of rows [R] at positions from ``begin`` [1] on,
    then the ``count`` likeliest draft tokens of a tree after the last: their ids, and the rows they
    follow, where row 0 is the last confirmed token."""

    def step(
        tokens: Tensor, features: Tensor, begin: Tensor, number: Tensor, *given: Tensor
    ) -> tuple[Tensor, Tensor]:
        row = torch.arange(len(tokens), device=tokens.device)
        place = begin + row
        slots = (TREE + place % RING).masked_fill(row >= number, SPARE)
        packed = layout.matrices["head"].form is not None
        growing = Growing(Step(layout, given), width, keeps_logits=packed)
        last = (number - 1).clamp_min(0)
        growing.begin(levels, tokens, features, place, slots, last)
        return growing.likeliest(count)

    return _traced(step, examples)


def trace_further(
    levels: int, width: int, layout: Layout, examples: Sequence[Tensor]
) -> GraphModule:
    """More levels after a frontier, whose tokens are at position ``place[0]``; ``place[1]``: the
    first free slot, ``place[2]``: the last confirmed position."""

    def step(
        tokens: Tensor, states: Tensor, joint: Tensor, seen: Tensor, place: Tensor, *given: Tensor
    ) -> tuple[Tensor, ...]:
        growing = Growing(Step(layout, given), width)
        growing.frontier = (tokens, states, joint, seen)
        growing.grow(levels, place[:1], place[1:2], place[2:])
        return growing.results()

    return _traced(step, examples)


def _traced(step: Callable[..., object], examples: Sequence[Tensor]) -> GraphModule:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x) for x in examples]
    with torch.no_grad():
        return make_fx(step, pre_dispatch=True)(*fakes)
