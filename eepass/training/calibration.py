"""Choose thresholds: the cheapest that keep agreement with the dense model at a target.

And keep it on other text: agreement on the answers that thresholds were chosen by says little of
another kind of text. So thresholds are chosen on half of the held-out answers and tested on the
other half, from the safest on, until one fails (Learn then Test, Angelopoulos et al., 2021); the
test is a lower bound of the agreement on a kind of text that is not among those measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from eepass.checkpoints.artifact import Calibration
from eepass.exit_rule import wants_exit

TARGETS = (0.90, 0.94, 0.975, 0.98, 0.99)
NEVER = 2.0  # a threshold no probability passes
# prices of a wrong exit, in layers, from the safest thresholds to the cheapest
PRICES = tuple(10 ** (4 - step / 8) for step in range(41))
# how sure a bound is, and how many kinds of text say how much kinds differ
CONFIDENCE, FEWEST_KINDS = 0.9, 4


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
    probability; whether the verified token is a draft token; whether it is the dense one. And the
    numbers of each token's text and of that text's kind, [n] each."""

    layers: Sequence[int]
    probability: Tensor
    verified: Tensor
    right: Tensor
    text: Tensor
    kind: Tensor

    def part(self, which: Tensor) -> ExitScores:
        """Of the tokens of ``which``, bool [n]."""
        return ExitScores(
            self.layers, self.probability[:, which], self.verified[:, which], self.right[:, which],
            self.text[which], self.kind[which],
        )  # fmt: skip


def calibrate(
    exits: ExitScores, costs: Costs, targets: Sequence[float] = TARGETS
) -> list[Calibration]:
    """Thresholds for each target.

    A wrong exit is given a price, for which the best thresholds follow exit by exit, deepest first.
    Prices fall as long as the agreement's lower bound stays above the target.
    """
    # by place among the texts: numbers of texts may all be even
    place = exits.text.unique(return_inverse=True)[1]
    learn, test = exits.part(place % 2 == 0), exits.part(place % 2 == 1)
    tried = []
    for price in PRICES:
        thresholds = _at_price(learn, costs, price)
        _, _, correct = replay(test, thresholds, costs)
        tried.append((thresholds, agreement_bound(correct, test.text, test.kind)))
    return [_at_target(exits, test, costs, target, tried) for target in targets]


def agreement_bound(correct: Tensor, text: Tensor, kind: Tensor) -> float:
    """What the agreement on a kind of text that is not among these is at least.

    ``correct`` [n]: whether a token is the dense one, of texts and kinds by number [n]. With
    ``CONFIDENCE``: kinds are taken as drawn from one distribution, for one more of which there is
    Student's prediction interval. With fewer than ``FEWEST_KINDS``, it is the confidence interval
    of the mean over whole texts, since tokens of one text go wrong together. What has not gone
    wrong yet may: one text, or one token of a kind, is added that did.
    """
    right, sizes = _counts(correct, kind)
    if len(right) >= FEWEST_KINDS:
        shares = right / (sizes + 1)
        spread = float(shares.std()) * (1 + 1 / len(shares)) ** 0.5
        return float(shares.mean()) - _student(len(shares) - 1) * spread
    right, sizes = _counts(correct, text)
    if len(right) < 2:
        return 0.0
    right, sizes = (
        torch.cat([x, x.new_tensor([y])]) for x, y in ((right, 0), (sizes, sizes.mean()))
    )
    share = right.sum() / sizes.sum()
    off = (right - share * sizes).square().sum() * len(right) / (len(right) - 1)
    return float(share - _student(len(right) - 1) * off.sqrt() / sizes.sum())


def _counts(correct: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """The correct tokens of each group, and all of them, float64."""
    place = group.unique(return_inverse=True)[1]
    return torch.bincount(place, correct.double()), torch.bincount(place).double()


def _student(freedom: int) -> float:
    """The quantile of Student's distribution at ``CONFIDENCE``, by the series of Cornish and Fisher
    (Abramowitz and Stegun, 26.7.5)."""
    z = NormalDist().inv_cdf(CONFIDENCE)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


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


def _at_target(
    exits: ExitScores,
    test: ExitScores,
    costs: Costs,
    target: float,
    tried: Sequence[tuple[list[float], float]],
) -> Calibration:
    """``tried``: thresholds and their bounds on ``test``, the safest first."""
    thresholds = [NEVER] * len(exits.layers)
    for found, bound in tried:
        if bound < target:
            break
        thresholds = found
    exit_layer, cost, correct = replay(test, thresholds, costs)
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
