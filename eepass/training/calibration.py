"""Choose thresholds: the cheapest that keep agreement with the dense model at a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eepass.checkpoints.artifact import Calibration
from eepass.exit_rule import wants_exit

TARGETS = (0.90, 0.94, 0.975, 0.98, 0.99)
NEVER = 2.0  # a threshold no probability passes


@dataclass(frozen=True, slots=True)
class Costs:
    """What the parts of a decode step cost, in layers: one row through one layer is 1."""

    num_layers: int
    head: float
    draft: float
    predictor: float
    verify: float
    # the likeliest draft token there is the verified token
    draft_layer: int = 0
    # one more row in a layer that runs anyway, as when a pending token catches up
    row: float = 0.1

    def verify_at(self, layer: int) -> float:
        return 0.0 if layer == self.draft_layer else self.verify

    @property
    def dense(self) -> float:
        return self.num_layers + self.head


@dataclass(frozen=True, slots=True)
class ExitScores:
    """What the exits after ``layers`` do with n held-out tokens, [exits, n] each: the predictor's
    probability; whether the verified token is a draft token; whether it is the dense one."""

    layers: Sequence[int]
    probability: Tensor
    verified: Tensor
    right: Tensor


def calibrate(
    exits: ExitScores, costs: Costs, targets: Sequence[float] = TARGETS
) -> list[Calibration]:
    """Thresholds for each target: a wrong exit is given a price, for which the best thresholds
    follow exit by exit, deepest first; it is bisected until agreement meets the target."""
    return [_at_target(exits, costs, target) for target in targets]


def replay(
    exits: ExitScores, thresholds: Sequence[float], costs: Costs
) -> tuple[Tensor, Tensor, Tensor]:
    """Exit layer, cost in layers and rightness of each token under ``thresholds``, [n] each."""
    count = exits.probability.shape[1]
    running = torch.ones(count, dtype=torch.bool)
    cost = torch.full((count,), costs.draft if any(t < 1 for t in thresholds) else 0.0)
    exit_layer = torch.full((count,), costs.num_layers)
    correct = torch.ones(count, dtype=torch.bool)
    for index, layer in enumerate(exits.layers):
        if thresholds[index] > 1:
            continue
        cost += running * costs.predictor
        tries = running & wants_exit(exits.probability[index], thresholds[index])
        cost += tries * costs.verify_at(layer)
        leaves = tries & exits.verified[index]
        exit_layer[leaves] = layer
        correct[leaves] = exits.right[index][leaves]
        running &= ~leaves
    cost += exit_layer + (costs.num_layers - exit_layer) * costs.row
    cost += running * costs.head
    return exit_layer, cost, correct


def _at_target(exits: ExitScores, costs: Costs, target: float) -> Calibration:
    low, high = 0.0, 1e5
    thresholds = [NEVER] * len(exits.layers)
    for _ in range(24):
        price = (low * high) ** 0.5 if low > 0 else 1.0 if high > 1 else high / 2
        tried = _at_price(exits, costs, price)
        _, _, correct = replay(exits, tried, costs)
        if correct.float().mean() >= target:
            thresholds, high = tried, price
        else:
            low = price
    exit_layer, cost, correct = replay(exits, thresholds, costs)
    used = {layer: t for layer, t in zip(exits.layers, thresholds, strict=True) if t <= 1}
    return Calibration(
        target=target,
        thresholds={layer: round(t, 5) for layer, t in used.items()},
        ranking=tuple(sorted(used, key=lambda layer: -int((exit_layer == layer).sum()))),
        agreement=float(correct.float().mean()),
        mean_exit_layer=float(exit_layer.float().mean()),
        speedup=costs.dense / float(cost.mean()),
    )


def _at_price(exits: ExitScores, costs: Costs, price: float) -> list[float]:
    """The thresholds with the least cost where each wrong token costs ``price`` more."""
    thresholds = [0.5] * len(exits.layers)
    for _ in range(4):
        exit_layer, _, _ = replay(exits, thresholds, costs)
        # what each token costs from here on, given the thresholds of the deeper exits
        ahead = torch.full(exit_layer.shape, costs.dense)
        for index in reversed(range(len(exits.layers))):
            layer, score = exits.layers[index], exits.probability[index]
            here = exit_layer >= layer  # the tokens that reach this exit
            leave = layer + (costs.num_layers - layer) * costs.row + price * ~exits.right[index]
            change = costs.verify_at(layer) + exits.verified[index] * (leave - ahead)
            thresholds[index], gain = _best_threshold(score[here], change[here])
            if gain <= costs.predictor * int(here.sum()):
                thresholds[index] = NEVER
            else:
                tries = wants_exit(score, thresholds[index])
                ahead = ahead + costs.predictor + tries * change
    return thresholds


def _best_threshold(score: Tensor, change: Tensor) -> tuple[float, float]:
    """The threshold above which the changes in cost sum to the least, and what that saves."""
    if not len(score):
        return NEVER, 0.0
    order = score.argsort(descending=True)
    total = change[order].cumsum(0)
    best = int(total.argmin())
    if total[best] >= 0:
        return NEVER, 0.0
    after = score[order[best + 1]] if best + 1 < len(score) else torch.tensor(0.0)
    return float((score[order[best]] + after) / 2), -float(total[best])
