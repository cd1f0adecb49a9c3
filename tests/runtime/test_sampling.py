"""Drawn tokens follow the distribution they are drawn from; options as in transformers."""

from math import erfc, inf, nan, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eepass.runtime import sampling as module
from eepass.runtime.sampling import Sampling, draw, greedy, probabilities

DRAWS = 200_000
# the smallest p-value that passes: with fewer than 50 comparisons, one wrong alarm in 200 runs
SMALLEST = 1e-4
P = torch.tensor([0.3, 0.2, 0.0, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02, 0.0])
GOOD = torch.tensor([0.25, 0.25, 0.02, 0.1, 0.12, 0.1, 0.06, 0.05, 0.03, 0.02])
BAD = torch.tensor([0.005, 0.005, 0.9, 0.005, 0.005, 0.005, 0.005, 0.005, 0.005, 0.06])


def p_value(tokens: Tensor, p: Tensor) -> float:
    """Of the chi-square test that ``tokens`` were drawn from ``p`` (Wilson and Hilferty)."""
    counts = torch.bincount(tokens, minlength=len(p)).double()
    if counts[p == 0].any():
        return 0.0
    expected = (p.double() / p.sum() * len(tokens))[p > 0]
    statistic = float(((counts[p > 0] - expected) ** 2 / expected).sum())
    spread = 2 / (9 * (len(expected) - 1))
    z = ((statistic / (len(expected) - 1)) ** (1 / 3) - (1 - spread)) / sqrt(spread)
    return erfc(z / sqrt(2)) / 2


def test_rows_have_their_own_distributions():
    generator = Sampling(seed=0).generator()
    tokens = draw(torch.stack([P, GOOD, BAD]).repeat(50_000, 1), generator)
    for row, target in enumerate((P, GOOD, BAD)):
        assert p_value(tokens[row::3], target) > SMALLEST
    # and the test would notice another distribution
    assert p_value(tokens[::3], GOOD) < 1e-9


@pytest.mark.parametrize("vocabulary", (1, 7, 512, 513, 1000, 49152))
def test_draws_follow_p_and_never_give_zero_probability(vocabulary):
    generator = Sampling(seed=vocabulary).generator()
    p = torch.rand(vocabulary, generator=generator) ** 8
    p[torch.rand(vocabulary, generator=generator) < 0.5] = 0
    p[vocabulary // 2 :: 3] += 0.1
    p[1:2], p[2:3] = 0.1, 0
    tokens = draw(p.expand(DRAWS if vocabulary < 10 else 4000, -1), generator)
    assert (p[tokens] > 0).all()
    if vocabulary > 1:
        cells = torch.arange(vocabulary) * 5 // vocabulary
        mass = torch.zeros(5).index_add(0, cells, p)
        assert p_value(cells[tokens], mass) > SMALLEST
    ends = module._invert(p.expand(3, -1), torch.tensor([0.0, 1 - 2**-53, 1.0]).double())
    possible = p.nonzero()[:, 0]
    assert ends.tolist() == [possible[0], possible[-1], possible[-1]]


def test_a_vocabulary_past_the_limit_of_multinomial():
    p = torch.zeros(1, 2**24 + 300)
    p[0, -3] = 1e-30
    assert draw(p, Sampling().generator()).item() == 2**24 + 297


def test_a_seed_repeats_the_tokens():
    def tokens(seed):
        return draw(GOOD.expand(100, -1), Sampling(seed=seed).generator()).tolist()

    assert tokens(3) == tokens(3) != tokens(4)
    assert tokens(None) != tokens(None)


def as_transformers(model, logits, options, context):
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=True, **options)
    processors = model._get_logits_processor(config, input_ids_seq_length=context.shape[1])
    return processors(context, logits.clone()).softmax(-1)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32),
    vocabulary=st.sampled_from((1, 2, 31, 1000, 4000)),
    spread=st.sampled_from((0.1, 3.0, 20.0)),
    temperature=st.sampled_from((0.1, 0.7, 1.0, 1.9)),
    top_k=st.sampled_from((0, 1, 5, 50, 5000)),
    top_p=st.sampled_from((0.0, 0.05, 0.5, 0.9, 0.99, 1.0)),
    min_p=st.sampled_from((0.0, 0.01, 0.3, 1.0)),
    repetition_penalty=st.sampled_from((0.7, 1.0, 1.3)),
)
def test_options_mean_what_they_mean_in_transformers(llama, seed, vocabulary, spread, **options):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocabulary, generator=generator) * spread
    context = torch.randint(vocabulary, (3, 9), generator=generator)
    kept = logits.clone()
    found = probabilities(logits, Sampling(**options), context.tolist())
    expected = as_transformers(llama, logits, options, context)
    assert torch.equal(logits, kept) and found.dtype == torch.float32
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_top_k_keeps_all_that_equal_the_last(llama):
    logits = torch.tensor([[3.0, 1, 2, 2, 2, 0], [5, 4, 3, 2, 1, 0], [-inf, 1, -inf, -inf, 0, 0]])
    found = probabilities(logits, Sampling(1.0, top_k=2))
    expected = as_transformers(llama, logits, {"top_k": 2}, torch.zeros(3, 1, dtype=torch.long))
    torch.testing.assert_close(found, expected)
    assert (found > 0).sum(-1).tolist() == [4, 2, 3]


@pytest.mark.parametrize("spread", (0.0, 0.01, 0.1, 1.0))
def test_a_wide_nucleus_is_the_smallest_that_suffices(spread):
    logits = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0)) * spread
    found, p = probabilities(logits, Sampling(1.0, top_p=0.9)), logits.double().softmax(-1)
    for kept, row in zip(found > 0, p, strict=True):
        assert 0.9 - 1e-6 <= row[kept].sum() < 0.9 + row[kept].min() + 1e-6
        assert row[kept].min() >= row[~kept].max() - 1e-12


def test_greedy_takes_the_first_of_the_best():
    logits = torch.zeros(2, 49152)
    logits[0, [7, 30_000, 49_000]] = 2.0
    logits[1, [40_000, 45_000]] = 1.5
    assert greedy(logits, Sampling()).tolist() == [7, 40_000]
    penalised = Sampling(repetition_penalty=1.5)
    best = greedy(logits, penalised, [[7, 7], [40_000, 60_000]])
    assert best.tolist() == [30_000, 45_000]
    p = probabilities(logits, penalised, [[7, 7], [40_000, 60_000]])
    assert torch.equal(p.nonzero()[:, 1], best) and (p.sum(-1) == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"temperature": -1.0}, r"temperature=-1.0: must be 0 \(greedy\)"),
        ({"temperature": 1e-9}, "at least 1e-05"),
        ({"temperature": inf}, "finite"),
        ({"temperature": "1"}, "temperature='1': must be a number"),
        ({"top_k": -1}, "top_k=-1: must be 0"),
        ({"top_k": 2.5}, "positive integer"),
        ({"top_p": 1.1}, "top_p=1.1: must be from 0 to 1"),
        ({"min_p": nan}, "min_p=nan: must be from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0: must be finite and above 0"),
        ({"seed": -5}, "seed=-5: must be None or an integer"),
        ({"seed": 1.5}, "seed=1.5"),
    ),
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(("context", "given"), ((None, "none"), ([[1]], "1")))
def test_a_penalty_needs_the_tokens_of_every_row(context, given):
    with pytest.raises(ValueError, match=f"needs the tokens of 2 rows, {given} given"):
        probabilities(torch.zeros(2, 4), Sampling(1.0, repetition_penalty=1.2), context)


def test_random_numbers_go_where_the_probabilities_are():
    """A seed gives the same numbers on every device; a generator of one cannot fill another's."""
    from eepass.runtime.sampling import _uniform

    p = torch.empty(3, 7, device="meta")
    with torch.device("meta"):
        generator = Sampling(seed=4).generator()
        assert _uniform((3,), p, generator).device == p.device
        assert draw(p, generator).device == p.device
