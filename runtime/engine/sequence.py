"""One sequence being decoded: its tokens, its region of the cache, and what waits."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from eepass.runtime.drafting.drafts import Draft
from eepass.runtime.exits.scheduler import PredictorSchedule
from eepass.runtime.sampling import Sampling


class DecodedToken(NamedTuple):
    """A token of the answer, and after how many layers it was known."""

    token: int
    exit_layer: int


class PendingTokens(NamedTuple):
    """Tokens from ``position`` on whose states [1, n, H] have gone through ``layer`` layers."""

    layer: int
    position: int
    hidden: Tensor

    @property
    def end(self) -> int:
        return self.position + int(self.hidden.shape[1])


@dataclass(slots=True, eq=False)
class Sequence:
    """``tokens`` are the prompt and the answer so far; the last of them has not been run.

    ``confirmed`` of them are final, the rest are guesses. ``waiting`` is a stack, its deepest
    boundary first: tokens with shallower boundaries are always later ones.
    """

    tokens: list[int]
    prompt_length: int
    first: int
    room: int
    limit: int
    stop: frozenset[int]
    sampling: Sampling
    generator: torch.Generator | None
    draft: Draft | None
    schedule: PredictorSchedule | None
    confirmed: int = 0
    given: int = 0
    waiting: list[PendingTokens] = field(default_factory=list)
    # layers run for each token after the prompt
    exit_layers: list[int] = field(default_factory=list)
    # what a draft wants of tokens whose answer may yet change, [F·H] by position
    states: dict[int, Tensor] = field(default_factory=dict)

    @property
    def position(self) -> int:
        """How many tokens have been run; the next row's position."""
        return len(self.tokens) - 1

    @property
    def pending(self) -> int:
        return sum(group.hidden.shape[1] for group in self.waiting)

    @property
    def trunk(self) -> int:
        """Position of the first waiting token, or of the next row."""
        return self.waiting[0].position if self.waiting else self.position

    @property
    def finished(self) -> bool:
        """Whether the confirmed answer ends here."""
        count = self.confirmed - self.prompt_length
        ended = count > 0 and self.tokens[self.confirmed - 1] in self.stop
        return ended or count >= self.limit

    @property
    def at_its_end(self) -> bool:
        """Whether nothing can follow the last token, be it confirmed or a guess."""
        count = len(self.tokens) - self.prompt_length
        return self.tokens[-1] in self.stop or count >= self.limit

    def lengths(self, num_layers: int) -> list[int]:
        """Tokens each layer has seen: a staircase, non-increasing with depth."""
        return [
            min((w.position for w in self.waiting if w.layer <= layer), default=self.position)
            for layer in range(num_layers)
        ]

    def extend(self, tokens: SequenceOf[int], exit_layer: int) -> None:
        self.tokens += tokens
        self.exit_layers += [exit_layer] * len(tokens)
        if self.schedule is not None:
            for _ in tokens:
                self.schedule.record(exit_layer)

    def roll_back(self, count: int) -> None:
        """Keep the first ``count`` tokens; whatever followed is forgotten everywhere."""
        gone = len(self.tokens) - count
        if self.draft is not None:
            self.draft.truncate(count)
        del self.tokens[count:]
        del self.exit_layers[count - self.prompt_length :]
        self.waiting.clear()
        if self.schedule is not None:
            self.schedule.forget(gone)

    def replace_last(self, token: int) -> None:
        """Say another last token (teacher forcing)."""
        if token == self.tokens[-1]:
            return
        self.tokens[-1] = token
        if self.draft is not None:
            self.draft.truncate(len(self.tokens) - 1)
            state = self.states.get(len(self.tokens) - 2)
            self.draft.follow([token], None if state is None else state[None])

    def keep_states(self, states: Tensor) -> None:
        """Remember ``states`` [n, F·H] of the last tokens run, as long as they may be asked for."""
        begin = len(self.tokens) - 1
        self.states |= {begin + index: state for index, state in enumerate(states)}
        for position in [p for p in self.states if p < min(self.trunk, begin)]:
            del self.states[position]

    def cut_waiting(self) -> None:
        """Drop waiting states of tokens that did not come to hold (after the answer's end)."""
        while self.waiting and self.waiting[-1].end > self.position:
            group = self.waiting.pop()
            if group.position < self.position:
                kept = group.hidden[:, : self.position - group.position]
                self.waiting.append(PendingTokens(group.layer, group.position, kept))

    def steps(self, begin: int, end: int) -> list[DecodedToken]:
        """Tokens ``begin`` to ``end`` of the sequence with their exit layers."""
        shift = self.prompt_length
        return [
            DecodedToken(self.tokens[i], self.exit_layers[i - shift])
            for i in range(max(begin, shift), end)
        ]

    def take(self) -> list[DecodedToken]:
        """Confirmed tokens not taken yet."""
        begin = self.prompt_length + self.given
        found = self.steps(begin, self.confirmed)
        self.given += len(found)
        return found
