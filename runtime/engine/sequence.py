"""One sequence being decoded: its tokens, its slots in the cache, and its pending tokens."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from eepass.runtime.cache.feature_cache import FeatureCache
from eepass.runtime.drafting.draft import Draft
from eepass.runtime.drafting.features import Features
from eepass.runtime.exits.scheduler import PredictorSchedule
from eepass.runtime.sampling import Sampling


class DecodedToken(NamedTuple):
    """A generated token, and the number of layers that were run to decide it."""

    token: int
    exit_layer: int


class PendingTokens(NamedTuple):
    """Tokens from ``position`` on that exited after ``layer`` layers, with their hidden states
    [1, n, H] there."""

    layer: int
    position: int
    hidden: Tensor

    @property
    def end(self) -> int:
        return self.position + int(self.hidden.shape[1])


class Attended(NamedTuple):
    """Positions int32 [n] that a pass attended to most, ascending, of those before ``latest``."""

    positions: Tensor
    latest: int


@dataclass(slots=True, eq=False)
class Sequence:
    """``tokens`` are the prompt and the answer so far; the last of them has not been run yet.

    It has ``capacity`` slots of the cache, from ``first_slot`` on; none while it is suspended. As
    long as its prompt is being run, or its text anew, ``num_prefilled`` tokens are in the cache.
    The first ``num_confirmed`` tokens are final, later ones may be rolled back. ``pending`` is a
    stack with the deepest layer first: tokens that exited after fewer layers are always later ones.
    """

    tokens: list[int]
    prompt_length: int
    first_slot: int
    capacity: int
    max_new_tokens: int
    stop: frozenset[int]
    sampling: Sampling
    generator: torch.Generator | None
    draft: Draft | None
    schedule: PredictorSchedule | None
    # the draft's features of the tokens whose slots they lie by
    features: FeatureCache | None
    # whether it may begin with what another text left in the cache, and leave its own
    shares: bool = False
    num_prefilled: int | None = 0
    # of the prompt's tokens, how many the draft knows
    num_followed: int = 0
    num_confirmed: int = 0
    num_delivered: int = 0
    pending: list[PendingTokens] = field(default_factory=list)
    # of a long text, what to attend to in a pass that drafts
    attended: Attended | None = None
    # by token after the prompt
    exit_layers: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """How many tokens have been run, which is the position of the next row."""
        return len(self.tokens) - 1

    @property
    def in_prompt(self) -> bool:
        """Whether its prompt, or its text anew, is still to be run."""
        return self.num_prefilled is not None

    @property
    def generated(self) -> bool:
        """Whether its prompt has been run: what is run after that, because it was suspended, its
        draft knows already."""
        return len(self.tokens) > self.prompt_length

    @property
    def num_to_prefill(self) -> int:
        """The prompt's tokens; of an answer that was suspended, all but the last token."""
        return max(self.prompt_length, self.position)

    @property
    def num_pending(self) -> int:
        return sum(group.hidden.shape[1] for group in self.pending)

    @property
    def num_drafted(self) -> int:
        """The pending tokens that have run no layer with all keys yet."""
        return sum(group.hidden.shape[1] for group in self.pending if not group.layer)

    @property
    def finished(self) -> bool:
        """Whether the confirmed tokens are the whole answer."""
        count = self.num_confirmed - self.prompt_length
        ended = count > 0 and self.tokens[self.num_confirmed - 1] in self.stop
        return ended or count >= self.max_new_tokens

    @property
    def at_its_end(self) -> bool:
        """Whether nothing can follow the last token, confirmed or not."""
        count = len(self.tokens) - self.prompt_length
        return self.tokens[-1] in self.stop or count >= self.max_new_tokens

    def lengths(self, num_layers: int) -> list[int]:
        """How many tokens each layer has run: a staircase, non-increasing with depth."""
        return [
            min((p.position for p in self.pending if p.layer <= layer), default=self.position)
            for layer in range(num_layers)
        ]

    def num_in_cache(self, num_layers: int) -> int:
        """The first tokens whose keys and values are in the cache in all layers."""
        if self.num_prefilled is not None:
            return self.num_prefilled
        return self.lengths(num_layers)[-1]

    def features_at(self, position: int, count: int) -> Features:
        """The draft's features of ``count`` tokens from ``position`` on."""
        assert self.features is not None
        return self.features.read(self.first_slot + position, count)

    def append(self, tokens: SequenceOf[int], exit_layer: int) -> None:
        """Add generated tokens."""
        if not tokens:
            return
        self.tokens += tokens
        self.exit_layers += [exit_layer] * len(tokens)
        if self.schedule is not None:
            for _ in tokens:
                self.schedule.record(exit_layer)
        if self.draft is not None:
            self.draft.follow(tokens)

    def roll_back(self, count: int) -> None:
        """Keep the first ``count`` tokens and forget, everywhere, what followed them."""
        dropped = len(self.tokens) - count
        if self.draft is not None:
            self.draft.truncate(count)
        del self.tokens[count:]
        del self.exit_layers[count - self.prompt_length :]
        self.pending.clear()
        if self.schedule is not None:
            self.schedule.forget(dropped)

    def replace_last(self, token: int) -> None:
        """Continue with another last token (teacher forcing)."""
        if token == self.tokens[-1]:
            return
        self.tokens[-1] = token
        if self.draft is not None:
            self.draft.truncate(len(self.tokens) - 1)
            self.draft.follow([token])

    def trim_pending(self) -> None:
        """Forget pending tokens that were not accepted (those after the answer's end)."""
        while self.pending and self.pending[-1].end > self.position:
            group = self.pending.pop()
            if group.position < self.position:
                kept = group.hidden[:, : self.position - group.position]
                self.pending.append(PendingTokens(group.layer, group.position, kept))

    def decoded(self, begin: int, end: int) -> list[DecodedToken]:
        """The generated ones of the tokens from ``begin`` to ``end``, with their exit layers."""
        shift = self.prompt_length
        return [
            DecodedToken(self.tokens[i], self.exit_layers[i - shift])
            for i in range(max(begin, shift), end)
        ]

    def take_confirmed(self) -> list[DecodedToken]:
        """Confirmed tokens that were not delivered yet."""
        begin = self.prompt_length + self.num_delivered
        found = self.decoded(begin, self.num_confirmed)
        self.num_delivered += len(found)
        return found
