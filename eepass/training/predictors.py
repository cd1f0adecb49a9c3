"""Train the predictors on what they will see in use.

The label is corrected against the paper's code: leaving is right when the argmax at that boundary,
as verification computes it, equals the dense argmax and is among the draft tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eepass.ops import exits as exit_ops

WIDTH = 512
PASSES = 8
BATCH = 1024
RATE = 2e-3


@dataclass(slots=True)
class ExitViews:
    """What each exit shows of n tokens: ``logits[e]`` [n, K] of the draft tokens, ``verified[e]``
    [n] whether verification would let the token go, ``right[e]`` [n] whether that token is the
    dense one."""

    layers: tuple[int, ...]
    logits: dict[int, Tensor]
    verified: dict[int, Tensor]
    right: dict[int, Tensor]


@torch.no_grad()
def view_exits(
    states: Callable[[int], Tensor],
    layers: Sequence[int],
    draft: Tensor,
    label: Tensor,
    lm_head: Tensor,
    verify_ids: Tensor | None,
    transform: Callable[[Tensor], Tensor],
    chunk: int = 2048,
) -> ExitViews:
    """Look at every exit: ``states(layer)`` gives the normed (translated) states [n, H].

    draft [n, K] token ids, label [n]; verification is over ``verify_ids`` or all of ``lm_head``.
    """
    rows_of_head = lm_head if verify_ids is None else lm_head[verify_ids]
    views = ExitViews(tuple(layers), {}, {}, {})
    for layer in layers:
        z = states(layer)
        logits, verified, right = [], [], []
        for begin in range(0, len(z), chunk):
            part, ids = z[begin : begin + chunk], draft[begin : begin + chunk]
            logits.append(transform(exit_ops.draft_logits(part, lm_head, None, ids)))
            best = (part @ rows_of_head.T).topk(4, -1).indices
            exact = torch.einsum("nh,nkh->nk", part.float(), rows_of_head[best].float())
            answer = best.gather(1, exact.argmax(-1, keepdim=True))[:, 0]
            if verify_ids is not None:
                answer = verify_ids[answer]
            verified.append((answer[:, None] == ids).any(-1))
            right.append(answer == label[begin : begin + chunk])
        views.logits[layer] = torch.cat(logits)
        views.verified[layer] = torch.cat(verified)
        views.right[layer] = torch.cat(right)
    return views


def fit_predictors(
    views: ExitViews, progress: Callable[[int], None], passes: int = PASSES
) -> dict[int, dict[str, Tensor]]:
    """One MLP per exit: ``w1`` [W, 3K], ``b1`` [W], ``w2`` [W], ``b2`` [1], float32.

    The predictor before this one in a step is whichever was active: each example draws it from the
    earlier exits, or none.
    """
    generator = torch.Generator().manual_seed(0)
    probabilities = {layer: views.logits[layer].softmax(-1) for layer in views.layers}
    fitted = {}
    for index, layer in enumerate(views.layers):
        logits, now = views.logits[layer], probabilities[layer]
        count, k = logits.shape
        label = (views.verified[layer] & views.right[layer]).float()
        w1 = (torch.randn(WIDTH, 3 * k, generator=generator) * (3 * k) ** -0.5).requires_grad_()
        b1 = torch.zeros(WIDTH, requires_grad=True)
        w2 = (torch.randn(WIDTH, generator=generator) * WIDTH**-0.5).requires_grad_()
        b2 = torch.zeros(1, requires_grad=True)
        parameters = [w1, b1, w2, b2]
        optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.01)
        # the rate falls to nothing, so that the last epoch's scores stand still
        steps = passes * -(-count // BATCH)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        earlier = torch.stack(
            [torch.zeros_like(now)] + [probabilities[other] for other in views.layers[:index]]
        )
        for _ in range(passes):
            for rows in torch.randperm(count, generator=generator).split(BATCH):
                # the nearest exits before this one are the likeliest to have been active
                back = torch.empty(len(rows)).exponential_(0.7, generator=generator).long()
                chosen = (index - back).clamp_min(0)
                previous = earlier[chosen, rows]
                with torch.enable_grad():
                    probability, _ = exit_ops.predict_exit(logits[rows], previous, *parameters)
                    loss = F.binary_cross_entropy(probability, label[rows])
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
                schedule.step()
                progress(len(rows))
        names = ("w1", "b1", "w2", "b2")
        fitted[layer] = {n: p.detach() for n, p in zip(names, parameters, strict=True)}
    return fitted


@torch.no_grad()
def scores(views: ExitViews, fitted: Mapping[int, Mapping[str, Tensor]]) -> Tensor:
    """Each predictor's probability [exits, n], the exit before it taken as the active one."""
    rows = []
    previous = torch.zeros_like(views.logits[views.layers[0]])
    for layer in views.layers:
        mlp = [fitted[layer][name] for name in ("w1", "b1", "w2", "b2")]
        probability, previous = exit_ops.predict_exit(views.logits[layer], previous, *mlp)
        rows.append(probability)
    return torch.stack(rows)
