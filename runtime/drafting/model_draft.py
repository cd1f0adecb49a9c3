"""Draft tokens from a small language model of the same vocabulary: its greedy continuation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eepass.runtime.decoder.costs import pass_seconds
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Row
from eepass.runtime.drafting.budget import Budget
from eepass.runtime.drafting.draft import MODEL
from eepass.runtime.drafting.features import ReadFeatures
from eepass.runtime.drafting.suffix import SuffixDraft
from eepass.runtime.drafting.tree import Tree

# draft tokens from the text for one pass of the small model
LOOK_UP = 4


class ModelDraft:
    """``decoder``: the small model; its cache holds one sequence at a time.

    Text drafts go in for the small model, which verifies these tokens in one pass instead of
    one pass a token (the vertical cascade of Chen et al., 2024).
    """

    feature_layers: tuple[int, ...] | None = None
    expected: float = 2.0
    calls: float = 2.5

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.text = SuffixDraft()
        # how many tokens the small model's cache holds
        self.num_cached = 0

    def follow(self, tokens: Sequence[int]) -> None:
        self.text.follow(tokens)

    def propose(self, root: int, budget: Budget, read: ReadFeatures | None = None) -> Tree:
        tree = Tree([root])
        self.add_to(tree, budget)
        return tree

    def add_to(self, tree: Tree, budget: Budget, read: ReadFeatures | None = None) -> None:
        """Add its continuation to ``tree``, which may hold draft tokens of other sources."""
        text = self.text.text.tokens
        most = min(budget.most, self.decoder.max_sequence_length - len(text) - LOOK_UP)
        node, joint = 0, 1.0
        drafted: list[int] = []
        while len(drafted) < most:
            found, matched = self.text.continuation(drafted, LOOK_UP)
            found = found if matched > 1 else []
            logits = self._run([*text, *drafted, *found], len(found) + 1)
            chances, tokens = logits.softmax(-1).max(-1)
            for index, (token, likely) in enumerate(
                zip(tokens.tolist(), chances.tolist(), strict=True)
            ):
                bin = (MODEL, min(len(drafted), 4), budget.bin(likely))
                chance = budget.chance(bin, prior=likely)
                joint *= chance
                node = tree.add(token, node, chance, bin)
                drafted.append(token)
                if len(drafted) >= most or found[index : index + 1] != [token]:
                    break
            # the cache's slots after a rejected token are overwritten
            self.num_cached = min(self.num_cached, len(text) + len(drafted) - 1)
            if not budget.worth_a_call(tree.joint()[1:], [joint]):
                break
        self.num_cached = min(self.num_cached, len(text))

    def truncate(self, length: int) -> None:
        self.text.truncate(length)
        self.num_cached = min(self.num_cached, length)

    def call_seconds(self) -> float:
        # every row count is compiled here, not while a sequence waits
        self.decoder.prepare_passes(self.decoder.buckets[-1])
        return pass_seconds(self.decoder, [1], at=0)[1]

    def fresh(self) -> ModelDraft:
        return ModelDraft(self.decoder)

    def _run(self, tokens: list[int], last: int) -> Tensor:
        """Run the tokens that are not cached yet; logits [last, V] after the last ``last`` ones."""
        hidden = torch.zeros(0)
        begin, largest = min(self.num_cached, len(tokens) - last), self.decoder.buckets[-1]
        while begin < len(tokens):
            # the rows whose logits are returned go in one chunk
            ahead = len(tokens) - last - begin
            count = len(tokens) - begin if ahead + last <= largest else min(ahead, largest)
            rows = [Row(0, at, at) for at in range(begin, begin + count)]
            hidden = self.decoder.forward(
                tokens[begin : begin + count], rows, self.decoder.cache_length
            )
            begin += count
            hidden = hidden[:, -last:]
        self.num_cached = len(tokens)
        return self.decoder.logits(hidden)[0]
