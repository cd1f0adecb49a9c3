"""How a speculative step updates its own state: the rows of a tree, and the accept walk.

A step runs the last token, which has not been through the model, and draft tokens after it, a tree:
row 0 is the last token, every other row follows the row above it. Row i writes keys and values to
slot ``position`` + i; its position goes by its depth in the tree. It attends to what was there
before the tree and to the rows on its path from row 0, which bit fields say: bit j of a row's field
is set where row j is on its path, itself included.

What a row computes is kept if all draft tokens up to it were right. Rows that are not kept have
written keys and values behind the last token, which the next step overwrites: there is nothing to
roll back. Keys and values of the rows that are kept move together, to where their positions are.

Numbers come as tensors: a captured launch cannot copy anything from the host.

Shapes: C slots of the cache, R rows, at most ``MOST_ROWS``. All flags are bool.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eepass.masks import first_seen
from eepass.runtime.step.updates import NOT_FINITE, NOTHING

# a row's bit field is an int64
MOST_ROWS = 63
COUNTED = ("passes", "tokens")


def place(
    history: Tensor, position: Tensor, last_position: Tensor, draft_ids: Tensor,
    draft_parents: Tensor, ids: Tensor, parents: Tensor, paths: Tensor, positions: Tensor,
    rows: Tensor,
) -> None:  # fmt: skip
    """The rows of the tree of ``draft_ids`` [R - 1], which follow the rows ``draft_parents``
    [R - 1]: ``ids`` [R], ``parents`` [R] (row 0's is itself), bit fields ``paths`` [R],
    ``positions`` [R], and slots ``rows`` [R].

    A row comes after the one it follows. ``last_position`` [1]: the last one the model knows.
    """
    row = torch.arange(ids.numel(), device=ids.device)
    above = torch.cat([torch.zeros_like(position), draft_parents])
    # whatever made the draft tokens, a row follows one before it
    above = torch.minimum(above, (row - 1).clamp_min(0))
    path = _paths(above)
    ids.copy_(torch.cat([history.gather(0, position), draft_ids]))
    parents.copy_(above)
    paths.copy_(path)
    rows.copy_(position + row)
    # draft tokens past the end are not kept
    positions.copy_(torch.minimum(position + depths(path), last_position))


def _paths(parents: Tensor) -> Tensor:
    row = torch.arange(len(parents), device=parents.device)
    path, above, known = torch.ones_like(row) << row, parents, 1
    # each turn doubles how far up a path is known
    while known < len(parents):
        path, above, known = path | path[above], above[above], 2 * known
    return path


def depths(paths: Tensor) -> Tensor:
    """How many rows are above each, by its bit field [R]."""
    return _bits(paths).sum(1) - 1


def _bits(paths: Tensor) -> Tensor:
    """Bit fields [N] as [N, R], 0 or 1."""
    return (paths[:, None] >> torch.arange(len(paths), device=paths.device)) & 1


def tree_mask(mask: Tensor, position: Tensor, paths: Tensor) -> Tensor:
    """``mask`` [..., R, C] by slots, of one by positions: rows of the tree after ``position`` [1]
    see what lies before it and the rows on their ``paths`` [R].

    A slot's value goes by the position of the token in it (biases, windows). The last slot is one
    that no row sees.
    """
    slot = torch.arange(mask.shape[-1], device=mask.device)
    node = (slot - position).clamp(0, len(paths) - 1)
    before, within = slot < position, (slot >= position) & (slot < position + len(paths))
    on_path = ((paths[:, None] >> node) & 1).bool()
    values = mask.index_select(-1, torch.where(within, position + depths(paths)[node], slot))
    return torch.where(before | (within & on_path), values, mask[..., -1:])


def tree_spans(
    rows: Tensor, positions: Tensor, paths: Tensor, spans: Tensor, *, window: int | None
) -> None:
    """``tree_mask`` of a causal mask as ``spans`` [R, 3] (``eepass.masks``): ``rows`` [R], slots of
    a tree, see ``window`` tokens back from their ``positions`` [R]: before it, and on their
    ``paths`` [R]."""
    first = first_seen(positions, window)
    near = (rows[0] + depths(paths))[None] >= first[:, None]
    row = torch.arange(len(paths), device=paths.device)
    seen = paths & (near.long() << row).sum(1)
    spans.copy_(torch.stack([first, rows[:1].expand(len(paths)), seen], 1))


def accept(
    ids: Tensor, parents: Tensor, paths: Tensor, known: Tensor, tokens: Tensor, best: Tensor,
    stop: Tensor, limit: Tensor, history: Tensor, position: Tensor, stopped: Tensor,
    counters: Tensor, path: Tensor, moved: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Keep ``tokens``, what follows each row [R], along the longest path of right draft tokens, up
    to its first end token or position ``limit`` [1]; ``best`` [R]: their logits; ``known`` [R - 1]:
    which rows after row 0 hold a draft token.

    ``path`` [R]: the rows that are kept, in order; beyond them its own numbers. ``moved`` [1]:
    whether their keys and values lie elsewhere than at their positions. ``out`` [R + 1]: how many
    are kept, and the tokens; −1 in place of one from logits that are not finite.
    """
    row = torch.arange(len(ids), device=ids.device)
    finite = torch.isfinite(best)
    ends = (tokens[:, None] == stop[None]).any(1) | ~finite
    kept = live_rows(ids, parents, paths, known, tokens, ends, limit - position)
    walked, number = walk(paths, kept)
    number = number.masked_fill(stopped | (position >= limit), 0)
    walked = torch.where(row < number, walked, row)
    taken, good, end = tokens[walked], finite[walked], ends[walked]
    is_kept = row < number
    target = position + 1 + row
    history.index_copy_(0, target, torch.where(is_kept, taken, history.gather(0, target)))
    shown = taken.masked_fill(~good, NOT_FINITE).masked_fill(~is_kept, NOTHING)
    out.copy_(torch.cat([number, shown]))
    path.copy_(walked)
    moved.copy_((walked != row).any())
    counters.add_(torch.cat([(~stopped).long(), number]))
    position.copy_(position + number)
    stopped.copy_(stopped | (is_kept & end).any() | (position >= limit))


def live_rows(
    ids: Tensor, parents: Tensor, paths: Tensor, known: Tensor, tokens: Tensor, ends: Tensor,
    room: Tensor, decided: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The rows [R] that right draft tokens lead to, of the first ``room`` [1] positions of a path:
    each equals what follows the row above, ``tokens`` [R], where that does not end the text
    (``ends`` [R]) and is ``decided`` [R]; all are by default."""
    leads = (tokens[parents] == ids) & ~ends[parents]
    if decided is not None:
        leads = leads | ~decided[parents]
    follows = leads & (depths(paths) < room)
    follows = torch.cat([torch.ones_like(follows[:1]), follows[1:] & known])
    wrong = ((~follows).long() << torch.arange(len(ids), device=ids.device)).sum()
    return (paths & wrong) == 0


def walk(paths: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The longest path over ``kept`` rows [R], in order (row 0 beyond its end), and its length [1];
    of equally long ones, which hold the same tokens, the first."""
    row, depth = torch.arange(len(paths), device=paths.device), depths(paths)
    last = (depth * len(paths) - row).masked_fill(~kept, -len(paths)).argmax(0, keepdim=True)
    on_path = ((paths[last] >> row) & 1).bool()
    placed = (on_path & (depth == row[:, None])).long() * row
    return placed.sum(1), depth[last] + 1


def follow(
    rows: Tensor, path: Tensor, out: Tensor, features: Tensor,
    tokens: Tensor, before: Tensor, first: Tensor, number: Tensor,
) -> None:  # fmt: skip
    """What a pass has confirmed, for the draft head: ``tokens`` [M], the features ``before`` [M, F]
    each, the position of the ``first`` [1] and their ``number`` [1]; ``features`` [R, F]: those of
    all rows."""
    confirmed = path[: len(tokens)]
    tokens.copy_(out[1 : len(tokens) + 1].clamp_min(0))
    before.copy_(features[confirmed])
    first.copy_(rows[:1] + 1)
    number.copy_(out[:1])
