"""Choose thresholds: the cheapest that keep agreement with the dense model at a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eepass.checkpoints.artifact import Calibration

TARGETS = (0.90, 0.94, 0.975, 0.98, 0.99)
NEVER = 2.0  # a threshold no probability passes


@dataclass(frozen=True, slots=True)
class Costs:
    """What a step is made of, in layers: one row through one layer is 1."""

    num_layers: int
    head: float
    draft: float
    predictor: float
    verify: float
    # where the draft is taken its likeliest token is the verified one
    draft_layer: int = 0
    # a row more in a layer that runs anyway: what catching up a token costs there
    row: float = 0.1

    def verify_at(self, layer: int) -> float:
        return 0.0 if layer == self.draft_layer else self.verify

    @property
    def dense(self) -> float:
        return self.num_layers + self.head


def calibrate(
    layers: Sequence[int],
    scores: Tensor,
    verified: Tensor,
    right: Tensor,
    costs: Costs,
    targets: Sequence[float] = TARGETS,
) -> list[Calibration]:
    """Thresholds per target from scores, verified, right [exits, n] of held-out tokens.

    A wrong exit is given a price; for each price the best thresholds follow exit by exit, deepest
    first; the price is bisected until agreement meets the target.
    """
    return [_at_target(layers, scores, verified, right, costs, target) for target in targets]


def replay(
    layers: Sequence[int],
    thresholds: Sequence[float],
    scores: Tensor,
    verified: Tensor,
    right: Tensor,
    costs: Costs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Exit layer, cost in layers and rightness of each token under ``thresholds``, [n] each."""
    count = scores.shape[1]
    here = torch.ones(count, dtype=torch.bool)
    cost = torch.full((count,), costs.draft if any(t < 1 for t in thresholds) else 0.0)
    exit_layer = torch.full((count,), costs.num_layers)
    correct = torch.ones(count, dtype=torch.bool)
    left_any = torch.zeros(count, dtype=torch.bool)
    for index, layer in enumerate(layers):
        if thresholds[index] > 1:
            continue
        cost += here * costs.predictor
        tries = here & (scores[index] > thresholds[index])
        cost += tries * costs.verify_at(layer)
        leaves = tries & verified[index]
        exit_layer[leaves] = layer
        correct[leaves] = right[index][leaves]
        left_any |= leaves
        here &= ~leaves
    cost += exit_layer + (costs.num_layers - exit_layer) * costs.row
    cost += ~left_any * costs.head
    return exit_layer, cost, correct


def _at_target(
    layers: Sequence[int],
    scores: Tensor,
    verified: Tensor,
    right: Tensor,
    costs: Costs,
    target: float,
) -> Calibration:
    cheap, dear = 0.0, 1e5
    thresholds = [NEVER] * len(layers)
    for _ in range(24):
        price = (cheap * dear) ** 0.5 if cheap > 0 else 1.0 if dear > 1 else dear / 2
        tried = _at_price(layers, scores, verified, right, costs, price)
        _, _, correct = replay(layers, tried, scores, verified, right, costs)
        if correct.float().mean() >= target:
            thresholds, dear = tried, price
        else:
            cheap = price
    exit_layer, cost, correct = replay(layers, thresholds, scores, verified, right, costs)
    used = [layer for layer, t in zip(layers, thresholds, strict=True) if t <= 1]
    counts = {layer: int((exit_layer == layer).sum()) for layer in used}
    return Calibration(
        target=target,
        thresholds={
            layer: round(t, 5) for layer, t in zip(layers, thresholds, strict=True) if t <= 1
        },
        ranking=tuple(sorted(used, key=lambda layer: -counts[layer])),
        agreement=float(correct.float().mean()),
        mean_exit_layer=float(exit_layer.float().mean()),
        speedup=costs.dense / float(cost.mean()),
    )


def _at_price(
    layers: Sequence[int],
    scores: Tensor,
    verified: Tensor,
    right: Tensor,
    costs: Costs,
    price: float,
) -> list[float]:
    """The thresholds that make cost plus ``price`` per wrong token least."""
    thresholds = [0.5] * len(layers)
    for _ in range(4):
        reaching = _reaching(thresholds, scores, verified)
        # what a token will yet cost from here, the thresholds after this exit given
        ahead = torch.full((scores.shape[1],), costs.num_layers + costs.head)
        for index in reversed(range(len(layers))):
            layer = layers[index]
            leave = layer + (costs.num_layers - layer) * costs.row + price * ~right[index]
            change = costs.verify_at(layer) + verified[index] * (leave - ahead)
            thresholds[index], gain = _best_threshold(
                scores[index][reaching[index]], change[reaching[index]]
            )
            if gain <= costs.predictor * int(reaching[index].sum()):
                thresholds[index] = NEVER
            else:
                tries = scores[index] > thresholds[index]
                ahead = ahead + costs.predictor + tries * change
    return thresholds


def _reaching(thresholds: Sequence[float], scores: Tensor, verified: Tensor) -> list[Tensor]:
    here = torch.ones(scores.shape[1], dtype=torch.bool)
    reaching = []
    for index, threshold in enumerate(thresholds):
        reaching.append(here)
        here = here & ~((scores[index] > threshold) & verified[index])
    return reaching


def _best_threshold(score: Tensor, change: Tensor) -> tuple[float, float]:
    """The threshold above which the changes in cost add up to least, and what that gains."""
    if not len(score):
        return NEVER, 0.0
    order = score.argsort(descending=True)
    total = change[order].cumsum(0)
    best = int(total.argmin())
    if total[best] >= 0:
        return NEVER, 0.0
    after = score[order[best + 1]] if best + 1 < len(score) else torch.tensor(0.0)
    return float((score[order[best]] + after) / 2), -float(total[best])
