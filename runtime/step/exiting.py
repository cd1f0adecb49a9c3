"""How a speculative step with exits updates its own state.

Tokens that came from an exit are *pending*: deeper layers have not run them. They are the first
rows of the next tree, a chain that the last token follows and then its draft tokens, and go through
all layers again, whose keys and values they write anew. So nothing is kept of a pass that exits but
its tokens, and a pass that goes through all layers leaves the keys and values of every row that is
kept. There is no window of hidden states as in ``updates.py``.

A row is *decided* once an exit has given what follows it, or it is a pending token before the last.
It is live as long as decided rows lead to it (``speculating.live_rows``); the others are dead
paths, for which nothing is evaluated. The pass exits when all live rows are decided (T3 of SpecEE,
arXiv 2504.08850, section 6). Where exits are ``exact`` their tokens are guesses: draft tokens of
the next pass, which the first pass through all layers accepts or rejects as it does others.

Shapes: R rows, L layers, K draft tokens of an exit, W exit layers in the ring. All flags are bool.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eepass.exit_rule import near_last_exits
from eepass.runtime.step import updates
from eepass.runtime.step.speculating import live_rows, walk
from eepass.runtime.step.updates import NOT_FINITE, NOTHING

COUNTED = (*updates.COUNTED, "rollbacks")


def begin(
    history: Tensor, position: Tensor, pending: Tensor, stopped: Tensor, limit: Tensor,
    stop: Tensor, ring: Tensor, exits: Tensor, fixed: Tensor, most: Tensor,
    go: Tensor, active: Tensor, fresh: Tensor, exit_layer: Tensor, previous: Tensor,
    wants_exit: Tensor,
    *, exact: bool,
) -> None:  # fmt: skip
    """Find the exit points that are evaluated: those scheduled, where another token may be pending
    (``most`` [1]). ``ring`` [W], ``exits`` and ``fixed`` [L + 1] as for ``updates.begin``.

    ``fresh`` [1]: no token is pending.
    """
    layer = torch.arange(exits.numel(), device=exits.device)
    scheduled = fixed | near_last_exits(layer, ring) | (ring < 0).all()
    allowed = ~stopped & (pending < most)
    if exact:
        # nothing can follow the last guess: it is to be confirmed
        last = history.gather(0, position)
        allowed = allowed & ~((last[:, None] == stop[None]).any(1) | (position >= limit))
    active.copy_(exits & scheduled & allowed)
    go.copy_(~stopped)
    fresh.copy_(pending == 0)
    exit_layer.fill_(exits.numel() - 1)
    previous.zero_()
    wants_exit.zero_()


def lead(
    history: Tensor, position: Tensor, pending: Tensor, fresh: Tensor, draft_ids: Tensor,
    draft_parents: Tensor, draft_known: Tensor,
    root: Tensor, ids: Tensor, parents: Tensor, known: Tensor, tokens: Tensor, best: Tensor,
    decided: Tensor,
    *, named: int,
) -> None:  # fmt: skip
    """Put the ``pending`` [1] tokens and the last one before the draft tokens, as many of those as
    there are rows for: ``ids``, ``parents`` and ``known`` [R - 1] of the rows after ``root`` [1].

    The first ``named`` draft tokens are those of a draft head, which has not seen pending tokens.
    """
    row = torch.arange(len(tokens), device=tokens.device)
    first = position - pending
    after, is_draft = row[1:], row[1:] > pending
    draft = (after - pending - 1).clamp_min(0)
    found = draft_known & (fresh | (row[: len(draft_known)] >= named))
    text = history.gather(0, first + after)
    ids.copy_(torch.where(is_draft, draft_ids[draft], text))
    parents.copy_(torch.where(is_draft, draft_parents[draft] + pending, after - 1))
    known.copy_(torch.where(is_draft, found[draft], torch.ones_like(found)))
    root.copy_(first)
    given = row < pending
    following = history.gather(0, first + row + 1)
    tokens.copy_(torch.where(given, following, torch.full_like(row, NOTHING)))
    decided.copy_(given)
    best.zero_()


def _live(
    ids: Tensor, parents: Tensor, paths: Tensor, known: Tensor, pending: Tensor, limit: Tensor,
    root: Tensor, stop: Tensor, most: Tensor, tokens: Tensor, decided: Tensor,
) -> Tensor:  # fmt: skip
    """The live rows [R] of a pass that may exit: after it at most ``most`` tokens are pending."""
    row = torch.arange(len(ids), device=ids.device)
    ends = (tokens[:, None] == stop[None]).any(1) & (row >= pending)
    room = torch.minimum(limit - root, most)
    return live_rows(ids, parents, paths, known, tokens, ends, room, decided)


def predicted(wants: Tensor, probabilities: Tensor, active: Tensor, *tree: Tensor) -> None:
    """Note which rows a predictor wants to exit, ``wants`` [R], where it is ``active`` [1]: of the
    live ones that are not decided. ``probabilities`` [R, K]: their draft tokens'.

    ``tree``: as for ``_live``; then ``previous``, ``wanted`` [R], ``wants_exit`` and ``counters``.
    """
    *rows, previous, wanted, wants_exit, counters = tree
    evaluated = active & _live(*rows) & ~rows[-1]
    wanted.copy_(wants & evaluated)
    wants_exit.copy_(wanted.any())
    previous.copy_(torch.where(active, probabilities, previous))
    _count(counters, "predictors_run", evaluated)
    _count(counters, "wanted", wanted)


def verified(token: Tensor, drafted: Tensor, wanted: Tensor, *tree: Tensor) -> None:
    """Decide the rows that ``wanted`` to exit [R] and whose verified ``token`` [R] is one of their
    draft tokens; exit where that decides all live rows.

    ``tree``: as for ``_live``; then ``layer`` [1], ``go``, ``active``, ``exit_layer`` and
    ``counters``.
    """
    *rows, layer, go, active, exit_layer, counters = tree
    tokens, decided = rows[-2:]
    accepted = wanted & drafted
    tokens.copy_(torch.where(accepted, token, tokens))
    decided.copy_(decided | accepted)
    # nothing may have been evaluated here
    exits = accepted.any() & (decided | ~_live(*rows)).all()
    exit_early(exits, layer, go, active, exit_layer)
    _count(counters, "refused", wanted & ~drafted)


def exit_early(
    exits: Tensor, layer: Tensor, go: Tensor, active: Tensor, exit_layer: Tensor
) -> None:
    """Exit after ``layer`` [1] where ``exits``: nothing deeper runs in this pass."""
    exit_layer.copy_(torch.where(go & exits, layer, exit_layer))
    go.copy_(go & ~exits)
    # which ``exits`` may be part of
    active.copy_(active & ~exits)


def head_tokens(
    token: Tensor, logit: Tensor, decided: Tensor, exit_layer: Tensor, computed: Tensor,
    tokens: Tensor, best: Tensor, counters: Tensor,
    *, layers: int, exact: bool,
) -> None:  # fmt: skip
    """Take the LM head's ``token`` [R] with its ``logit`` [R], where they are ``computed`` [1], for
    rows that are not decided; where exits are ``exact``, after the last layer for all."""
    takes = ~decided & computed
    if exact:
        takes = takes | ((exit_layer == layers) & computed)
    tokens.copy_(torch.where(takes, token, tokens))
    best.copy_(torch.where(takes, logit, best))
    _count(counters, "full_heads", takes)


def settle(
    ids: Tensor, parents: Tensor, paths: Tensor, known: Tensor, root: Tensor, tokens: Tensor,
    best: Tensor, stop: Tensor, limit: Tensor, most: Tensor, exit_layer: Tensor,
    history: Tensor, position: Tensor, pending: Tensor, stopped: Tensor, ring: Tensor,
    counters: Tensor,
    path: Tensor, moved: Tensor, full: Tensor, out: Tensor,
    *, exact: bool, layers: int,
) -> None:  # fmt: skip
    """Keep ``tokens`` [R] along the longest path, as ``speculating.accept`` does; after an exit as
    pending ones, at most ``most`` [1] of them.

    ``full`` [1]: the rows of ``path`` have been through all layers. ``out`` [R + 2]: how many
    tokens are final by this pass and were not before, the tokens, and the exit layer.
    """
    row = torch.arange(len(ids), device=ids.device)
    early, running = exit_layer < layers, ~stopped
    # pending tokens are final, or all of the text that a pass confirms is new
    given = torch.zeros_like(pending) if exact else pending
    finite = torch.isfinite(best)
    ends = ((tokens[:, None] == stop[None]).any(1) | ~finite) & (row >= given)
    room = torch.where(early, torch.minimum(limit - root, most), limit - root)
    walked, number = walk(paths, live_rows(ids, parents, paths, known, tokens, ends, room))
    number = number.masked_fill(stopped | (root >= limit), 0)
    is_kept = row < number
    walked = torch.where(is_kept, walked, row)
    taken, good, end = tokens[walked], finite[walked], ends[walked]
    target = root + 1 + row
    before = history.gather(0, target)
    wrong = (is_kept & (row < pending) & (taken != before)).any()
    history.index_copy_(0, target, torch.where(is_kept, taken, before))
    shown = (number - given).clamp_min(0)
    if exact:
        shown = shown.masked_fill(early, 0)
    at = (row + given).clamp_max(len(row) - 1)
    text = taken.masked_fill(~good, NOT_FINITE)[at].masked_fill(row >= shown, NOTHING)
    out.copy_(torch.cat([shown, text, exit_layer]))
    path.copy_(walked)
    full.copy_(running & ~early)
    moved.copy_((walked != row).any() & ~early)
    reached = torch.where(number > 0, root + number, position)
    ended = (is_kept & end).any() | (reached >= limit)
    if exact:
        # guesses end nothing
        ended = ended & ~early
        _count(counters, "rollbacks", running & ~early & wrong)
    _count(counters, "passes", running)
    _count(counters, "rows_caught_up", pending.masked_fill(early | stopped, 0))
    counters.index_add_(0, torch.full_like(exit_layer, layers) if exact else exit_layer, shown)
    _record(ring, exit_layer, reached - position)
    position.copy_(reached)
    pending.copy_(number.masked_fill(~early, 0))
    stopped.copy_(stopped | ended)


def _record(ring: Tensor, exit_layer: Tensor, tokens: Tensor) -> None:
    """Note the ``exit_layer`` [1] of so many new ``tokens`` [1]; those rolled back stay in it."""
    turn = torch.arange(len(ring), device=ring.device) + tokens.clamp(0, len(ring))
    ring.copy_(torch.cat([ring, exit_layer.expand(len(ring))]).gather(0, turn))


def follow(
    full: Tensor, rows: Tensor, path: Tensor, position: Tensor, tokens: Tensor, features: Tensor,
    confirmed: Tensor, before: Tensor, first: Tensor, number: Tensor,
) -> None:  # fmt: skip
    """``speculating.follow`` after a pass that was ``full`` [1]; what one before it has left stays
    after others."""
    kept = path[: len(confirmed)]
    confirmed.copy_(torch.where(full, tokens[kept].clamp_min(0), confirmed))
    before.copy_(torch.where(full, features[kept], before))
    first.copy_(torch.where(full, rows[:1] + 1, first))
    number.copy_(torch.where(full, position - rows[:1], number))


def _count(counters: Tensor, name: str, by: Tensor) -> None:
    place = counters.numel() - len(COUNTED) + COUNTED.index(name)
    counters[place : place + 1] += by.long().sum()
