"""What a decode step does to its own state: small operators over buffers, without a host.

The window holds the last R tokens, the newest in row 0; a row's ``depth`` is how many layers its
token has been through. Tokens that left early are the rows after row 0 whose depth is not yet that
of the model: a segment takes along every row whose depth is no more than where it starts, so the
rows of a segment are always the first ones of the window. Slots no token may write are scratch.

Numbers come as tensors: in a captured launch nothing may be sent from the host.

Shapes: R rows, S segments, B buckets of rows, L layers. All flags are bool.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# tokens, wherever they stand for none
NOT_FINITE, NOTHING = -1, -2
# what the ring holds before there were tokens: far from every layer
NEVER = -100
COUNTED = ("predictors_run", "wanted", "refused", "full_heads", "rows_caught_up", "passes")


def begin(
    stopped: Tensor, position: Tensor, ring: Tensor, exits: Tensor, fixed: Tensor, starts: Tensor,
    buckets: Tensor, hidden: Tensor, depth: Tensor,
    run: Tensor, rows: Tensor, ask: Tensor, go: Tensor, more: Tensor, live: Tensor, slots: Tensor,
    fill: Tensor, need: Tensor, previous: Tensor, answer: Tensor, exit_layer: Tensor,
    *, pending: int, scratch: int,
) -> None:  # fmt: skip
    """Make room for a token in row 0 and find what it and those that wait have to go through.

    After the answer's end there is no token: the step takes what waits through all layers.
    ``exits``, ``fixed`` [L + 1]: where tokens may leave, and where that is always asked. ``starts``
    [S]: layers before each segment. ``buckets`` [2, B]: more rows than the first, at most the
    second. ``pending``: so many tokens may wait; −1 where none ever do.
    """
    layers, count = exits.numel() - 1, depth.numel()
    running = ~stopped
    run.copy_(running)
    fresh = torch.cat([torch.zeros_like(depth[:1]), depth[:-1]])
    # without deferral nothing waits
    now = torch.where(running, fresh, depth if pending >= 0 else torch.full_like(depth, layers))
    if count > 1:
        hidden.copy_(torch.where(running, hidden.roll(1, 1), hidden))
    depth.copy_(now)
    at = position - stopped.long() - torch.arange(count, device=depth.device)
    rows.copy_(at.clamp_min(0))
    alive = now[None] <= starts[:, None]  # [S, R]
    live.copy_(alive)
    _place(slots, rows, alive, scratch)
    number = alive.sum(1)[:, None]
    go.copy_((number > buckets[:1]) & (number <= buckets[1:]))
    more.copy_(number[:, 0] > buckets[1, 0])
    fill.zero_()
    need.copy_(running)
    previous.zero_()
    answer.fill_(NOTHING)
    exit_layer.fill_(layers)
    number_of = torch.arange(layers + 1, device=depth.device)
    near = ((number_of[:, None] - ring[None]).abs() <= 2).any(1)
    active = exits & (fixed | near | (ring < 0).all()) & running
    if pending >= 0:
        waiting = (now < layers).sum() - 1
        active = active & ((waiting < pending) | (number_of == layers))
    ask.copy_(active)


def _place(slots: Tensor, rows: Tensor, alive: Tensor, scratch: int) -> None:
    """Slots [S, R] (or a column more) of ``rows`` [R] that are ``alive`` [S, R]."""
    count = rows.numel()
    spare = scratch + torch.arange(count, device=rows.device)
    found = torch.where(alive, rows[None], spare[None])
    slots.copy_(F.pad(found, (0, slots.shape[1] - count), value=scratch))


def predicted(
    wants: Tensor, now: Tensor, ask: Tensor, previous: Tensor, want: Tensor, counters: Tensor
) -> None:
    """Note what a predictor said where it was asked: ``wants`` [1], probabilities ``now``
    [1, K]."""
    want.copy_(ask & wants)
    previous.copy_(torch.where(ask, now, previous))
    _count(counters, "predictors_run", ask)


def verified(
    token: Tensor, known: Tensor, want: Tensor, layer: Tensor, starts: Tensor, rows: Tensor,
    ask: Tensor, go: Tensor, more: Tensor, live: Tensor, slots: Tensor, fill: Tensor,
    exit_layer: Tensor, need: Tensor, answer: Tensor, counters: Tensor,
    *, scratch: int, fills: bool,
) -> None:  # fmt: skip
    """Let the token leave after ``layer`` [1] if it is ``known`` [1]."""
    accepted = want & known
    _leave(accepted, layer, starts, rows, ask, go, more, live, slots, fill, exit_layer,
           scratch=scratch, fills=fills)  # fmt: skip
    need.copy_(need & ~accepted)
    answer.copy_(torch.where(accepted, token, answer))
    _count(counters, "wanted", want)
    _count(counters, "refused", want & ~known)


def forced(
    want: Tensor, layer: Tensor, starts: Tensor, rows: Tensor,
    ask: Tensor, go: Tensor, more: Tensor, live: Tensor, slots: Tensor, fill: Tensor,
    exit_layer: Tensor,
    *, scratch: int, fills: bool,
) -> None:  # fmt: skip
    """Let the token leave after ``layer`` [1] where that is wanted; the head says its answer."""
    _leave(want, layer, starts, rows, ask, go, more, live, slots, fill, exit_layer,
           scratch=scratch, fills=fills)  # fmt: skip


def _leave(
    accepted: Tensor, layer: Tensor, starts: Tensor, rows: Tensor, ask: Tensor, go: Tensor,
    more: Tensor, live: Tensor, slots: Tensor, fill: Tensor, exit_layer: Tensor,
    *, scratch: int, fills: bool,
) -> None:  # fmt: skip
    stays = ~accepted
    ask.copy_(ask & stays)
    go.copy_(go & stays)
    more.copy_(more & stays)
    alive = live & stays
    live.copy_(alive)
    _place(slots, rows, alive, scratch)
    if fills:
        fill.copy_(fill | ((starts >= layer) & accepted))
    exit_layer.copy_(torch.where(accepted, layer, exit_layer))


def headed(token: Tensor, best: Tensor, need: Tensor, answer: Tensor, counters: Tensor) -> None:
    """The head's word, where it is needed: ``token`` [1] with logit ``best`` [1]."""
    said = torch.where(torch.isfinite(best), token, torch.full_like(token, NOT_FINITE))
    answer.copy_(torch.where(need, said, answer))
    _count(counters, "full_heads", need)


def commit(
    run: Tensor, answer: Tensor, exit_layer: Tensor, stop: Tensor,
    token: Tensor, position: Tensor, stopped: Tensor, depth: Tensor, ring: Tensor,
    counters: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Write down what the step found: ``out`` is the token (or why there is none) and its layer."""
    caught = ((depth < exit_layer).sum() - run.long()).reshape(1)
    _count(counters, "rows_caught_up", caught)
    _count(counters, "passes", torch.ones_like(run))
    layers = torch.arange(counters.numel(), device=counters.device)
    counters.add_(((layers == exit_layer) & run).long())
    depth.copy_(torch.maximum(depth, exit_layer))
    ring.copy_(torch.where(run, torch.cat([ring[1:], exit_layer]), ring))
    # a step may follow before the host has seen that there is no token
    token.copy_(torch.where(run, answer.clamp_min(0), token))
    position.copy_(position + run.long())
    stopped.copy_(stopped | (run & (answer[:, None] == stop[None]).any(1)))
    said = torch.where(run, answer, torch.full_like(answer, NOTHING))
    out.copy_(torch.cat([said, exit_layer]))


def _count(counters: Tensor, name: str, by: Tensor) -> None:
    place = counters.numel() - len(COUNTED) + COUNTED.index(name)
    counters[place : place + 1] += by.long()


def counts(counters: Sequence[int]) -> tuple[list[int], dict[str, int]]:
    """How often tokens left after each layer, and the other counts by name."""
    values = list(counters)
    cut = len(values) - len(COUNTED)
    return values[:cut], dict(zip(COUNTED, values[cut:], strict=True))
