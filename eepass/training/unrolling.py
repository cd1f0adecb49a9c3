"""The draft head over whole sequences, unrolled: it reads its own states from step two on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eepass.runtime.drafting.eagle_form import WINDOW, form_of
from eepass.runtime.drafting.eagle_layer import eagle_layer, for_head, mixed, plain, rotary


class Lines(NamedTuple):
    """Sequences end to end: token [n]; features [n, F * H] of the same position, z first; place
    [n], the position in its sequence."""

    token: Tensor
    features: Tensor
    place: Tensor

    def spans(self) -> list[tuple[int, int]]:
        starts = (self.place == 0).nonzero()[:, 0].tolist()
        return [*zip(starts, [*starts[1:], len(self.place)], strict=True)]

    def rows(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Where the tokens of each sequence lie, except its first, which has no features before it;
        these tokens [1, T]; the features [1, T, F * H] before each."""
        for begin, end in self.spans():
            where = slice(begin + 1, end)
            yield where, self.token[None, where].long(), self.features[None, begin : end - 1]


def unroll(
    tokens: Tensor, before: Tensor, embedding: Tensor, weights: Mapping[str, Tensor], steps: int
) -> list[Tensor]:
    """What the LM head reads of the states of each step [B, T, H]; tokens [B, T], before
    [B, T, F * H], embedding [V, H] the model's.

    At step s a row follows s - 1 draft tokens: it sees the accepted rows before those, and of each
    draft token the row that its own step made.
    """
    length, form = tokens.shape[1], form_of(weights)
    embedded, linear = weights.get("embedding", embedding)[tokens], plain(weights)
    cos, sin = rotary(torch.arange(length), weights["rotary"], embedded.dtype)
    feature = mixed(before, weights, linear, form)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    states: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys.append(k)
        values.append(v)
        seen = _seen(length, len(keys))
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, torch.cat(keys, 2), torch.cat(values, 2), seen, enable_gqa=grouped
        )

    for _ in range(steps):
        state = eagle_layer(embedded, feature, cos, sin, attend, weights, linear, form)
        states.append(for_head(state, weights, form))
        feature = F.pad(state[:, :-1], (0, 0, 1, 0))
    return states


@torch.no_grad()
def draft_states(weights: Mapping[str, Tensor], lines: Lines, embedding: Tensor) -> Tensor:
    """The draft head's states [n, H], zero at the first token of each line."""
    width = len(weights["norm"])
    states = torch.zeros(len(lines.token), width, dtype=embedding.dtype)
    for where, tokens, before in lines.rows():
        states[where] = unroll(tokens, before, embedding, weights, 1)[0][0]
    return states


@torch.no_grad()
def draft_hits(
    weights: Mapping[str, Tensor],
    lines: Lines,
    label: Tensor,
    embedding: Tensor,
    hot_ids: Tensor,
    hot_head: Tensor,
    steps: int,
) -> list[dict[str, float]]:
    """How often the head ranks the dense token first, and among the first four, at each step.

    ``label`` [n]: the dense token after each position, or -1 where it does not count. From the
    second step on the draft tokens before are the dense ones, and the states the head's own.
    """
    found: list[list[Tensor]] = [[] for _ in range(steps)]
    for where, tokens, before in lines.rows():
        for step, state in enumerate(unroll(tokens, before, embedding, weights, steps)):
            best = hot_ids[(state[0, step:] @ hot_head.T).topk(4, -1).indices]
            known = label[where][step:]
            found[step].append((best == known[:, None])[known >= 0])
    hits = [torch.cat(parts).float() for parts in found]
    return [{"top1": float(hit[:, 0].mean()), "top4": float(hit.sum(1).mean())} for hit in hits]


def _seen(length: int, step: int) -> Tensor:
    """What a row sees [T, step * T] of the rows of all steps so far, at step ``step`` from 1."""
    row, column = torch.arange(length)[:, None], torch.arange(length)[None]
    parts = [(column <= row - step + 1) & (column > row - WINDOW)]
    parts += [column == row - step + drafted for drafted in range(2, step + 1)]
    return torch.cat(parts, 1)
