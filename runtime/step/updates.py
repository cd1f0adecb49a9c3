"""How a decode step updates its own state: small operators over buffers, without a host.

The window holds the last R tokens, the newest in row 0; a row's ``depth`` is how many layers its
token has been through. Pending tokens are the rows after row 0 whose depth is less than the
model's. A segment runs every row whose depth is at most the segment's first layer, so its rows are
always the first ones of the window. Rows that do not run write to scratch slots.

Numbers come as tensors: a captured launch cannot copy anything from the host.

Shapes: R rows, S segments, B buckets of rows, L layers. All flags are bool.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eepass.exit_rule import near_last_exits

# in place of a token: the logits were not finite; there is no token
NOT_FINITE, NOTHING = -1, -2
# in the ring of exit layers before the first token: far from every layer
NEVER = -100
COUNTED = ("predictors_run", "wanted", "refused", "full_heads", "rows_caught_up", "passes")


def begin(
    stopped: Tensor, position: Tensor, ring: Tensor, exits: Tensor, fixed: Tensor, starts: Tensor,
    buckets: Tensor, hidden: Tensor, depth: Tensor,
    run: Tensor, rows: Tensor, active: Tensor, go: Tensor, more: Tensor, live: Tensor,
    slots: Tensor, fill: Tensor, needs_head: Tensor, previous: Tensor, answer: Tensor,
    exit_layer: Tensor,
    *, pending: int, scratch: int,
) -> None:  # fmt: skip
    """Make room for a token in row 0, and find the layers that it and the pending tokens need.

    After the end of the sequence there is no new token: the step only catches up pending ones.
    ``ring`` [W]: the last exit layers. ``exits``, ``fixed`` [L + 1]: the exit points, and those
    that are always active. ``starts`` [S]: the first layer of each segment. ``buckets`` [2, B]: a
    bucket is for more rows than the first and at most the second. ``pending``: how many tokens may
    be pending; −1 where tokens are not deferred.
    """
    layers, count = exits.numel() - 1, depth.numel()
    running = ~stopped
    run.copy_(running)
    fresh = torch.cat([torch.zeros_like(depth[:1]), depth[:-1]])
    # without deferral all layers are done with a token after its step
    now = torch.where(running, fresh, depth if pending >= 0 else torch.full_like(depth, layers))
    if count > 1:
        hidden.copy_(torch.where(running, hidden.roll(1, 1), hidden))
    depth.copy_(now)
    positions = position - stopped.long() - torch.arange(count, device=depth.device)
    rows.copy_(positions.clamp_min(0))
    alive = now[None] <= starts[:, None]  # [S, R]
    live.copy_(alive)
    _place(slots, rows, alive, scratch)
    number = alive.sum(1)[:, None]
    go.copy_((number > buckets[:1]) & (number <= buckets[1:]))
    more.copy_(number[:, 0] > buckets[1, 0])
    fill.zero_()
    needs_head.copy_(running)
    previous.zero_()
    answer.fill_(NOTHING)
    exit_layer.fill_(layers)
    layer = torch.arange(layers + 1, device=depth.device)
    scheduled = fixed | near_last_exits(layer, ring) | (ring < 0).all()
    evaluated = exits & scheduled & running
    if pending >= 0:
        deferred = (now < layers).sum() - 1
        evaluated = evaluated & ((deferred < pending) | (layer == layers))
    active.copy_(evaluated)


def _place(slots: Tensor, rows: Tensor, alive: Tensor, scratch: int) -> None:
    """Set ``slots`` [S, R] (or a column more): those of ``rows`` [R] where they are ``alive``
    [S, R], else scratch."""
    count = rows.numel()
    spare = scratch + torch.arange(count, device=rows.device)
    chosen = torch.where(alive, rows[None], spare[None])
    slots.copy_(F.pad(chosen, (0, slots.shape[1] - count), value=scratch))


def predicted(
    wants: Tensor, probabilities: Tensor, active: Tensor, previous: Tensor, wants_exit: Tensor,
    counters: Tensor,
) -> None:  # fmt: skip
    """Note what a predictor gives where it is ``active``: whether the token ``wants`` to exit [1],
    and its draft tokens' ``probabilities`` [1, K]."""
    wants_exit.copy_(active & wants)
    previous.copy_(torch.where(active, probabilities, previous))
    _count(counters, "predictors_run", active)


def verified(
    token: Tensor, drafted: Tensor, needs_head: Tensor, answer: Tensor, counters: Tensor,
    wants_exit: Tensor, *where: Tensor, scratch: int, fills: bool,
) -> None:  # fmt: skip
    """Exit where the verified ``token`` [1] is one of the draft tokens; ``where``: as for
    ``exit_early``."""
    accepted = wants_exit & drafted
    exit_early(accepted, *where, scratch=scratch, fills=fills)
    needs_head.copy_(needs_head & ~accepted)
    answer.copy_(torch.where(accepted, token, answer))
    _count(counters, "wanted", wants_exit)
    _count(counters, "refused", wants_exit & ~drafted)


def exit_early(
    accepted: Tensor, layer: Tensor, starts: Tensor, rows: Tensor, active: Tensor, go: Tensor,
    more: Tensor, live: Tensor, slots: Tensor, fill: Tensor, exit_layer: Tensor,
    *, scratch: int, fills: bool,
) -> None:  # fmt: skip
    """Exit after ``layer`` [1] where ``accepted`` [1]: nothing deeper runs in this step but KV
    fills."""
    stays = ~accepted
    active.copy_(active & stays)
    go.copy_(go & stays)
    more.copy_(more & stays)
    alive = live & stays
    live.copy_(alive)
    _place(slots, rows, alive, scratch)
    if fills:
        fill.copy_(fill | ((starts >= layer) & accepted))
    exit_layer.copy_(torch.where(accepted, layer, exit_layer))


def head_token(
    token: Tensor, best: Tensor, needs_head: Tensor, answer: Tensor, counters: Tensor
) -> None:
    """Take the LM head's ``token`` [1], with logit ``best`` [1], where no exit gave one."""
    checked = torch.where(torch.isfinite(best), token, torch.full_like(token, NOT_FINITE))
    answer.copy_(torch.where(needs_head, checked, answer))
    _count(counters, "full_heads", needs_head)


def commit(
    run: Tensor, answer: Tensor, exit_layer: Tensor, stop: Tensor,
    token: Tensor, position: Tensor, stopped: Tensor, depth: Tensor, ring: Tensor,
    counters: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Commit the step's token: ``out`` is the token (or why there is none) and its exit layer."""
    caught_up = ((depth < exit_layer).sum() - run.long()).reshape(1)
    _count(counters, "rows_caught_up", caught_up)
    _count(counters, "passes", torch.ones_like(run))
    layers = torch.arange(counters.numel(), device=counters.device)
    counters.add_(((layers == exit_layer) & run).long())
    depth.copy_(torch.maximum(depth, exit_layer))
    ring.copy_(torch.where(run, torch.cat([ring[1:], exit_layer]), ring))
    # a step may follow before the host has seen that there is no token
    token.copy_(torch.where(run, answer.clamp_min(0), token))
    position.copy_(position + run.long())
    stopped.copy_(stopped | (run & (answer[:, None] == stop[None]).any(1)))
    token_out = torch.where(run, answer, torch.full_like(answer, NOTHING))
    out.copy_(torch.cat([token_out, exit_layer]))


def _count(counters: Tensor, name: str, by: Tensor) -> None:
    place = counters.numel() - len(COUNTED) + COUNTED.index(name)
    counters[place : place + 1] += by.long()
