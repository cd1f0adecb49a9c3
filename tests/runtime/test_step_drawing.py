"""Tokens sampled on a device: the host's distribution, and the same for the same seed."""

import pytest
import torch

from eepass.errors import EngineError
from eepass.runtime.sampling import Sampling, probabilities
from eepass.runtime.step.drawing import OPTIONS, draw, option_values, uniform

COUNT = 2000


def options(sampling):
    values = option_values(sampling)
    kinds = {"top_k": torch.long, "seed": torch.long}
    return [torch.tensor([values[n]], dtype=kinds.get(n, torch.float64)) for n in OPTIONS]


def drawn(logits, sampling, position, salt=0):
    found = torch.zeros(1, dtype=torch.long)
    draw(logits, *options(sampling), torch.tensor([position]), torch.tensor([salt]), found)
    return int(found)


@pytest.mark.parametrize(
    "sampling",
    (
        Sampling(temperature=1.0, seed=5),
        Sampling(temperature=0.7, top_k=5, seed=5),
        Sampling(temperature=1.5, top_p=0.7, seed=5),
        Sampling(temperature=1.0, min_p=0.2, seed=5),
        Sampling(temperature=1.2, top_k=8, top_p=0.8, min_p=0.05, seed=5),
    ),
    ids=("all", "top-k", "top-p", "min-p", "together"),
)
def test_tokens_have_the_distribution_of_the_hosts(sampling):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    # a tie at the edge of top-k: both stay
    order = logits[0].argsort(descending=True)
    logits[0, order[5]] = logits[0, order[4]]
    expected = probabilities(logits, sampling)[0].double()
    counts = torch.zeros(12, dtype=torch.double)
    for position in range(COUNT):
        counts[drawn(logits, sampling, position)] += 1
    assert not counts[expected == 0].any()
    possible = expected > 0
    wanted = COUNT * expected[possible]
    freedom = float(possible.sum() - 1)
    chi = float(((counts[possible] - wanted).square() / wanted).sum())
    # five standard deviations
    assert chi < freedom + 5 * (2 * freedom) ** 0.5 + 5


def test_random_numbers_are_uniform_and_distinct():
    seeds = torch.arange(64)[:, None].expand(64, 64).reshape(-1)
    numbers = torch.arange(64).repeat(64)
    found = uniform(seeds, numbers)
    assert (found >= 0).all() and (found < 1).all() and len(found.unique()) == 4096
    assert torch.histc(found, 16, 0, 1).sub(256).abs().max() < 80
    largest = torch.tensor([2**63 - 1])
    assert 0 <= float(uniform(largest, largest)) < 1


def test_exits_and_the_head_of_a_step_use_different_numbers():
    logits = torch.zeros(1, 500)
    sampling = Sampling(temperature=1.0, seed=1)
    assert len({drawn(logits, sampling, 7, salt) for salt in range(20)}) > 15
    assert drawn(logits, sampling, 7, 3) == drawn(logits, sampling, 7, 3)


def test_temperature_zero_is_the_argmax():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert drawn(logits, Sampling(), 3) == 1


def test_what_a_step_cannot_do_is_refused():
    with pytest.raises(EngineError, match="no repetition_penalty and no process"):
        option_values(Sampling(temperature=1.0, repetition_penalty=1.2))
    seeds = {option_values(Sampling(temperature=1.0))["seed"] for _ in range(4)}
    assert len(seeds) == 4
