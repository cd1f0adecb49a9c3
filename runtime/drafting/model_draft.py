"""Drafts from a small language model of the same vocabulary: a chain, each token its likeliest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eepass.runtime.decoder.costs import pass_seconds
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Row
from eepass.runtime.drafting.drafts import NgramDraft
from eepass.runtime.drafting.planner import Budget
from eepass.runtime.drafting.tree import Tree

MODEL = 2
# tokens look-up may name for one pass of the small model
GUESSES = 4


class ModelDraft:
    """``decoder``: the small model, its cache for one sequence at a time.

    Prompt look-up drafts for it: what look-up names is checked by one pass of the small model
    instead of a pass for each token (the vertical cascade of Chen et al., 2024).
    """

    feature_layers: tuple[int, ...] | None = None
    expected: float = 2.0

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.ngram = NgramDraft()
        # how many tokens the small model's cache holds
        self.run = 0

    def follow(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        self.ngram.follow(tokens)

    def propose(self, root: int, budget: Budget) -> Tree:
        tree = Tree([root])
        held = self.ngram.tokens
        most = min(budget.most, self.decoder.longest - len(held) - GUESSES)
        node, joint = 0, 1.0
        drafted: list[int] = []
        while len(drafted) < most:
            guessed, matched = self.ngram.continuation(drafted, GUESSES)
            guessed = guessed if matched > 1 else []
            best = self._run([*held, *drafted, *guessed], len(guessed) + 1).softmax(-1).max(-1)
            for place, (token, chance) in enumerate(
                zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ):
                bin = (MODEL, min(len(drafted), 4), budget.bin(chance))
                joint *= budget.chance(bin, prior=chance)
                node = tree.add(token, node, budget.chance(bin, prior=chance), bin)
                drafted.append(token)
                if len(drafted) >= most or guessed[place : place + 1] != [token]:
                    break
            # what it ran of a guess that was wrong is written over
            self.run = min(self.run, len(held) + len(drafted) - 1)
            if not budget.worth_a_call([], [joint]):
                break
        self.run = min(self.run, len(held))
        return tree

    def truncate(self, length: int) -> None:
        self.ngram.truncate(length)
        self.run = min(self.run, length)

    def call_seconds(self) -> float:
        return pass_seconds(self.decoder, [1], at=0)[1]

    def fresh(self) -> ModelDraft:
        return ModelDraft(self.decoder)

    def _run(self, tokens: list[int], last: int) -> Tensor:
        """Run what the cache does not hold of ``tokens``; logits [last, V] after the last ones."""
        hidden = torch.zeros(0)
        begin, largest = min(self.run, len(tokens) - last), self.decoder.buckets[-1]
        while begin < len(tokens):
            # the tokens whose logits are wanted go in one chunk
            ahead = len(tokens) - last - begin
            count = len(tokens) - begin if ahead + last <= largest else min(ahead, largest)
            rows = [Row(0, at, at) for at in range(begin, begin + count)]
            hidden = self.decoder.forward(
                tokens[begin : begin + count], rows, self.decoder.cache_length
            )
            begin += count
            hidden = hidden[:, -last:]
        self.run = len(tokens)
        padding = hidden[:, -1:].expand(-1, self.decoder.bucket(last) - last, -1)
        return self.decoder.logits(torch.cat([hidden, padding], 1))[0, :last]
