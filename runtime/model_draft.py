"""Drafts from a small language model of the same vocabulary: a chain, each token its likeliest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eepass.runtime.costs import seconds_of
from eepass.runtime.decoder import Decoder
from eepass.runtime.planner import Budget
from eepass.runtime.side_inputs import Row
from eepass.runtime.tree import Tree

MODEL = 2


class ModelDraft:
    """``decoder``: the small model; its cache serves one sequence at a time for each ``fresh``."""

    feature_layers: tuple[int, ...] | None = None
    expected: float = 2.0

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.tokens: list[int] = []
        # how many of them the cache holds
        self.run = 0
        self._next: Tensor | None = None

    def follow(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        self.tokens += tokens

    def propose(self, root: int, budget: Budget) -> Tree:
        tree = Tree([root])
        held = len(self.tokens)
        most = min(budget.most, self.decoder.capacity - held)
        node, joint = 0, 1.0
        drafted: list[int] = []
        for depth in range(most):
            logits = self._catch_up(drafted)
            best = logits.softmax(-1).max(-1)
            bin = (MODEL, min(depth, 4), budget.bin(float(best.values)))
            chance = budget.chance(bin, prior=float(best.values))
            joint *= chance
            drafted.append(int(best.indices))
            node = tree.add(drafted[-1], node, chance, bin)
            if not budget.worth_a_call([], [joint]):
                break
        # what was drafted lies past the tokens that hold, to be written over
        self.run = min(self.run, held)
        return tree

    def truncate(self, length: int) -> None:
        del self.tokens[length:]
        self.run = min(self.run, length)

    def call_seconds(self) -> float:
        place = self.decoder.side_inputs.span(0, 1)

        def once() -> None:
            hidden = self.decoder.embed(torch.tensor([[5]]), torch.tensor([[0]]), place.slots)
            for layer in range(self.decoder.num_layers):
                hidden = self.decoder.run_layer(layer, hidden, place)
            self.decoder.logits(hidden)

        once()
        return seconds_of(once)

    def fresh(self) -> ModelDraft:
        return ModelDraft(self.decoder)

    def _catch_up(self, drafted: list[int]) -> Tensor:
        """Run what the cache does not hold yet; logits [V] after the last token."""
        tokens = self.tokens + drafted
        hidden = torch.zeros(0)
        # at least the last token: its logits are wanted
        begin = min(self.run, len(tokens) - 1)
        largest = self.decoder.buckets[-1]
        while begin < len(tokens):
            chunk = tokens[begin : begin + largest]
            size = self.decoder.bucket(len(chunk))
            rows = [Row(0, at, at) for at in range(begin, begin + len(chunk))]
            place = self.decoder.place(rows, size, self.decoder.cache_length)
            positions = torch.arange(begin, begin + size).clamp(max=self.decoder.cache_length - 1)
            ids = torch.tensor([chunk + chunk[-1:] * (size - len(chunk))])
            hidden = self.decoder.embed(ids, positions[None], place.slots)
            for layer in range(self.decoder.num_layers):
                hidden = self.decoder.run_layer(layer, hidden, place)
            begin += len(chunk)
            hidden = hidden[:, len(chunk) - 1 : len(chunk)]
        self.run = len(tokens)
        return self.decoder.logits(hidden)[0, 0]
