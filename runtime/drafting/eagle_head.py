"""The draft head at run time: its keys and values, and the trees it grows on top of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import pad

from eepass.runtime.drafting.eagle_steps import (
    BEAM,
    RING,
    SPARE,
    TREE,
    trace_begin,
    trace_extend,
    trace_further,
)
from eepass.runtime.drafting.eagle_weights import HeadWeights, Layout
from eepass.segments import GraphToMake

Compiled = Callable[[list[Tensor]], Sequence[Tensor]]
# traces a step, given how weights are stored and examples of its inputs
Make = Callable[[Layout, Sequence[Tensor]], GraphModule]
# Levels of a tree's first call and of each further one. Another call costs little beside a level,
# and the third level rarely gets a row of a small pass
LEVELS, FURTHER = 2, 2
# draft tokens named below each that is expanded
WIDTH = 6
# rows of confirmed tokens that begin a tree, and of others that go before
ROWS, MOST_ROWS = (4, 8), 64


class Frontier(NamedTuple):
    """The draft tokens that go on to be expanded: tokens [B], the states before them [B, H],
    log-probabilities of their paths [B], which slots of the tree those see [B, TREE]."""

    tokens: Tensor
    states: Tensor
    joint: Tensor
    seen: Tensor


@dataclass(slots=True)
class Level:
    """Draft tokens [n * WIDTH], those below each of the n that were expanded side by side;
    ``above``: which of the level before those are, ``scores``: their log-probabilities."""

    above: list[int]
    tokens: list[int]
    scores: list[float]


class EagleHead:
    """The draft head of one sequence: its confirmed tokens in a line, a tree of drafts after them.

    ``tensors``: ``eagle.*``, with ``eagle.hot.ids`` and ``eagle.hot.head``, those rows of the LM
    head. ``embedding``: the model's [V, H]. ``compile`` turns a graph into a function from the list
    of its inputs to its outputs, when that is first needed; a compiler that only loads what is
    compiled needs no graph (``trace`` false).
    ``bits`` says, when it is first run, of how many bits its weights are; None: as they are.
    ``frontier``: which draft tokens of the tree's last level go on to be expanded.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        embedding: Tensor,
        compile: Callable[..., Compiled],
        trace: bool = True,
        bits: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._weights = HeadWeights(tensors, embedding, bits)
        self.hot_ids, self.dtype = self._weights.hot_ids, embedding.dtype
        self.feature_layers: tuple[int, ...] = tuple(tensors["eagle.features"].tolist())
        # the width of the features of one token, read or not: F * H
        self.feature_size = (1 + len(self.feature_layers)) * embedding.shape[1]
        self._compile, self._traces = compile, trace
        self.length = 0
        width = 2 * len(self._weights.frequencies)
        groups = tensors["eagle.k"].shape[0] // width
        keys = torch.zeros(groups, TREE + RING, width, dtype=self.dtype)
        self._state = [self._empty_slots(), keys, torch.zeros_like(keys)]
        self._steps: dict[str, Compiled] = {}
        self._frontier: Frontier | None = None
        self.frontier: list[int] = []
        # slots of the tree that are taken, and the depth of the frontier's tokens
        self._taken = self.levels = 0

    @property
    def memory(self) -> tuple[list[Tensor], list[Tensor], Layout]:
        """Positions, keys and values of its slots, and its weights, as ``eagle_steps.Step`` takes
        them, one after the other; how the weights are stored."""
        weights, layout = self._weights.packed
        return self._state, weights, layout

    @staticmethod
    def _empty_slots() -> Tensor:
        """Position of the token in each slot; later than any where there is none."""
        return torch.full((TREE + RING,), torch.iinfo(torch.long).max)

    def prepare(self, levels: int = LEVELS, width: int = WIDTH) -> None:
        """Compile all steps, and call none: code of one is built while the next is lowered."""
        empty = torch.zeros(1, self.feature_size, dtype=self.dtype)
        self._step("extend", self._confirmed([0], empty, MOST_ROWS), trace_extend)
        for rows in ROWS:
            inputs = [*self._confirmed([0], empty, rows), torch.tensor([0])]
            self._step(f"begin.{levels}.{width}", inputs, partial(trace_begin, levels, width))
        if levels == LEVELS:
            hidden = self._weights.embedding.shape[1]
            frontier = Frontier(
                torch.zeros(BEAM, dtype=torch.long), empty.new_zeros(BEAM, hidden),
                torch.zeros(BEAM), torch.zeros(BEAM, TREE, dtype=torch.bool),
            )  # fmt: skip
            place = torch.zeros(3, dtype=torch.long)
            self._step("further", [*frontier, place], partial(trace_further, FURTHER, WIDTH))

    def extend(self, tokens: Sequence[int], features: Tensor) -> None:
        """Add confirmed tokens; features [n, F * H]: those of the token before each."""
        for begin in range(0, len(tokens), MOST_ROWS):
            chunk = tokens[begin : begin + MOST_ROWS]
            inputs = self._confirmed(chunk, features[begin : begin + MOST_ROWS], MOST_ROWS)
            self._run("extend", inputs, trace_extend)
            self.length += len(chunk)
        self._frontier = None

    def begin(
        self, tokens: Sequence[int], features: Tensor, levels: int = LEVELS, width: int = WIDTH
    ) -> list[Level]:
        """Add confirmed tokens, at least one, and grow a tree of ``levels`` after the last."""
        if not tokens:
            raise ValueError("tokens is empty: there is nothing to grow a tree on")
        before = max(len(tokens) - ROWS[-1], 0)
        self.extend(tokens[:before], features[:before])
        tokens, features = tokens[before:], features[before:]
        size = next(rows for rows in ROWS if rows >= len(tokens))
        inputs = self._confirmed(tokens, features, size)
        last = torch.tensor([len(tokens) - 1])
        name = f"begin.{levels}.{width}"
        make = partial(trace_begin, levels, width)
        found = self._run(name, [*inputs, last], make)
        self.length += len(tokens)
        self._taken, self.levels = (levels - 1) * BEAM, levels
        return self._levels(found, [1] + [BEAM] * (levels - 1))

    def further(self) -> list[Level]:
        """``FURTHER`` more levels of the tree; none where it has no more room."""
        if self._frontier is None:
            raise ValueError("there is no tree: call begin first")
        if self._taken + FURTHER * BEAM > SPARE:
            return []
        last = self.length - 1
        place = torch.tensor([last + self.levels, self._taken, last])
        make = partial(trace_further, FURTHER, WIDTH)
        found = self._run("further", [*self._frontier, place], make)
        self._taken += FURTHER * BEAM
        self.levels += FURTHER
        return self._levels(found, [BEAM] * FURTHER)

    def skip(self, count: int) -> None:
        """Count ``count`` confirmed tokens without running them: no row will attend to them."""
        self.length += count
        self._frontier = None

    def truncate(self, length: int) -> None:
        """Forget the tree, and the confirmed tokens beyond ``length``."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length={length}: there are {self.length} confirmed tokens")
        self.length, self._frontier = length, None

    def fresh(self) -> EagleHead:
        """The same head for another sequence; what is compiled is shared."""
        other = copy(self)
        other._state = [self._empty_slots(), *(torch.zeros_like(x) for x in self._state[1:])]
        other.length, other._frontier = 0, None
        return other

    def _confirmed(self, tokens: Sequence[int], features: Tensor, size: int) -> list[Tensor]:
        """The inputs of ``size`` rows that begin with confirmed ``tokens``."""
        padding = size - len(tokens)
        positions = range(self.length, self.length + size)
        slots = [TREE + position % RING for position in positions[: len(tokens)]]
        numbers = [[*tokens, *[0] * padding], list(positions), [*slots, *[SPARE] * padding]]
        # few operations: a tree begins with this
        ids, place, slot = torch.tensor(numbers).unbind(0)
        given = pad(features, (0, 0, 0, padding)) if padding else features
        return [ids, given, place, slot]

    def _levels(self, found: Sequence[Tensor], expanded: Sequence[int]) -> list[Level]:
        """The levels in what a step returned: ids, scores and picks of all, then the frontier."""
        ids, scores, picks = (part.tolist() for part in found[:3])
        self._frontier = Frontier(*found[3:])
        width = len(ids) // sum(expanded)
        levels, begin, above = [], 0, self.frontier if expanded[0] > 1 else [0]
        for place, count in enumerate(expanded):
            end = begin + count * width
            levels.append(Level(above, ids[begin:end], scores[begin:end]))
            begin, above = end, picks[place * BEAM : (place + 1) * BEAM]
        self.frontier = above
        return levels

    def _run(self, name: str, inputs: list[Tensor], make: Make) -> Sequence[Tensor]:
        state, weights, _ = self.memory
        return self._step(name, inputs, make)([*inputs, *state, *weights])

    def _step(self, name: str, inputs: list[Tensor], make: Make) -> Compiled:
        state, weights, layout = self.memory
        fixed = [*state, *weights]
        key = f"{name}.{len(inputs[0])}"
        if key not in self._steps:
            # a trace takes one tensor given twice for one input
            examples = [x.clone() for x in inputs] + fixed
            shapes = [tuple(x.shape) for x in examples]
            structure = f"eagle.{key}.{shapes}.{self.dtype}.{layout.structure}"
            graph = GraphToMake(partial(make, layout, examples)) if self._traces else None
            self._steps[key] = self._compile(graph, structure, examples, logits=False)
        return self._steps[key]
