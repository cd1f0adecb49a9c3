"""Decode steps: exits, the schedule, pending tokens, keys and values, against plain lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCABULARY, eager_compile
from plain import PlainEngine
from steps import BUCKETS, OrderedExits, PlainSteps, engine_for

from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.engine.engine import Engine

DEPTH = 4
PROMPT = [5, 9, 44, 7, 8]
OTHER = [61, 12, 90, 3, 3, 17, 101, 55, 4, 30, 31]


@pytest.fixture(scope="module")
def decoder(llama_splits):
    return Decoder(llama_splits, eager_compile)


@pytest.fixture(scope="module")
def plain(llama):
    return PlainEngine(llama)


def cache_of(decoder, count):
    return [k[:, :, :count].clone() for k in (*decoder.kv.keys, *decoder.kv.values)]


def dense_cache(decoder, ids):
    engine = Engine(decoder)
    engine.prefill(ids, lambda layer, hidden: None)
    return cache_of(decoder, len(ids))


def same_cache(decoder, ids):
    ours = cache_of(decoder, len(ids))
    return all(
        torch.allclose(a, b, atol=2e-5)
        for a, b in zip(ours, dense_cache(decoder, ids), strict=True)
    )


@st.composite
def orders(draw):
    count = draw(st.integers(1, 24))
    each = st.lists
    layers = draw(st.sets(st.integers(1, DEPTH), min_size=1))
    return {
        "layers": sorted(layers),
        "wanted": draw(each(st.sets(st.integers(1, DEPTH)), min_size=count, max_size=count)),
        "answers": draw(each(st.integers(3, VOCABULARY - 1), min_size=count, max_size=count)),
        "known": draw(each(st.integers(1, DEPTH + 1), min_size=count, max_size=count)),
        "pending": draw(st.integers(0, 7)),
        "ranking": draw(st.sampled_from([(), tuple(sorted(layers, reverse=True))])),
        "how": draw(st.sampled_from(["interpret", "predicated", "host", "late"])),
    }


@settings(max_examples=60, deadline=None)
@given(order=orders())
def test_any_exits_are_those_of_plain_lists_and_the_cache_is_dense(decoder, plain, order):
    exits = OrderedExits(order["layers"], order["wanted"], order["answers"], order["known"])
    how = order["how"]
    engine = engine_for(
        decoder,
        exits,
        how,
        pending=order["pending"],
        ranking=order["ranking"],
        one_size=how == "predicated",
        verify="always" if how == "late" else "wanted",
    )
    tokens = list(engine.generate(PROMPT, len(order["wanted"]) + 1))
    expected = PlainSteps(
        plain, PROMPT, tokens[0].token, DEPTH, order["layers"], order["pending"], order["ranking"]
    )
    assert tokens[0].token == plain.next_token(PROMPT)
    for step, *what in zip(
        tokens[1:], order["wanted"], order["answers"], order["known"], strict=True
    ):
        assert tuple(step) == expected.step(*what)
    statistics = engine.statistics
    assert {name: getattr(statistics, name) for name in expected.counts} == expected.counts
    assert statistics.exit_layers == [expected.exit_layers.count(n) for n in range(DEPTH + 1)]
    # at the end all pending tokens were caught up
    assert statistics.rows_caught_up == expected.caught_up + len(expected.pending)
    assert same_cache(decoder, expected.ids[:-1])


@pytest.mark.parametrize("how", ("interpret", "late"))
def test_a_captured_step_serves_every_token_and_prompt(decoder, plain, how):
    """One captured step runs 320 times, over prompts of different lengths in turns."""
    count, steps = 80, 320
    generator = torch.Generator().manual_seed(3)
    wanted = [
        set(torch.randperm(DEPTH + 2, generator=generator)[:1].tolist()) for _ in range(2 * steps)
    ]
    answers = torch.randint(3, VOCABULARY, (2 * steps,), generator=generator).tolist()
    exits = OrderedExits((1, 2, 3), wanted, answers, [1] * 2 * steps)
    engine = engine_for(decoder, exits, how)
    for prompt in (PROMPT, OTHER, OTHER[::-1], PROMPT[1:]):
        stream = engine.generate(prompt, count + 1)
        first = next(stream)
        expected = PlainSteps(plain, prompt, first.token, DEPTH, (1, 2, 3), 7)
        begin = exits.turn + 1
        assert first.token == plain.next_token(prompt)
        for at, step in enumerate(stream, begin):
            assert tuple(step) == expected.step(wanted[at], answers[at], 1)
        assert same_cache(decoder, expected.ids[:-1])
    assert engine.statistics.tokens == steps


@pytest.mark.parametrize("how", ("interpret", "predicated", "host", "late"))
def test_dense_steps_give_the_tokens_of_the_engine(decoder, how):
    tokens = [step.token for step in engine_for(decoder, None, how).generate(PROMPT, 40)]
    assert tokens == [step.token for step in Engine(decoder).generate(PROMPT, 40)]


@pytest.mark.parametrize("layer", range(1, DEPTH + 1))
def test_a_forced_exit_gives_the_heads_token_there(decoder, llama, layer):
    """The cut model's tokens over the dense cache; each eighth token runs through all layers."""
    ids = list(PROMPT)
    for step in engine_for(decoder, None, "host", force=layer).generate(PROMPT, 20):
        states = llama(
            input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True
        ).hidden_states
        state = states[step.exit_layer][:, -1:]
        # the last state comes normed
        z = state if step.exit_layer == DEPTH else llama.model.norm(state)
        assert step.token == int(llama.lm_head(z).argmax())
        ids.append(step.token)
    assert engine_for(decoder, None, "host", force=layer).step["buckets"][1, -1] <= BUCKETS[-1]


def test_every_eighth_token_catches_the_others_up(decoder):
    engine = engine_for(decoder, None, "interpret", force=2)
    layers = [step.exit_layer for step in engine.generate(PROMPT, 25)]
    assert layers == [DEPTH, *([2] * 7 + [DEPTH]) * 3]
    assert engine.statistics.rows_caught_up == 21


@pytest.mark.parametrize("how", ("interpret", "predicated", "host", "late"))
@pytest.mark.parametrize("kv", ("propagate", "drop"))
def test_without_deferral_the_cache_is_the_engines(decoder, kv, how):
    wanted = [{1}, {3}, set(), {2}, {1}, {1}, set(), {3}]
    answers = [20, 21, 22, 23, 24, 25, 26, 27]
    exits = OrderedExits((1, 2, 3), wanted, answers, [1] * 8)
    engine = engine_for(decoder, exits, how, kv=kv, one_size=how == "predicated")
    tokens = [tuple(step) for step in engine.generate(PROMPT, 9)]
    ours = cache_of(decoder, len(PROMPT) + 8)
    from models import ForcedExits

    from eepass.runtime.engine.options import Options

    orders_ = [min(layers, default=DEPTH + 1) for layers in wanted]
    options = Options("approximate", kv, 7, ("exits",))
    other = Engine(decoder, ForcedExits(DEPTH, orders_, answers), options=options)
    # the engine counts turns from its first pass
    assert tokens == [tuple(step) for step in other.generate(PROMPT, 9)]
    for a, b in zip(ours, cache_of(decoder, len(PROMPT) + 8), strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_deferral_is_what_keeps_the_cache_whole(decoder):
    """Switched off, deeper layers lack keys and values of tokens that exited."""
    caches = {}
    for kv in ("defer", "propagate", "drop"):
        exits = OrderedExits((1,), [{1}] * 6, [20, 21, 22, 23, 24, 25], [1] * 6)
        ids = PROMPT + [
            step.token for step in engine_for(decoder, exits, kv=kv).generate(PROMPT, 7)
        ]
        caches[kv] = same_cache(decoder, ids[:-1])
    assert caches == {"defer": True, "propagate": False, "drop": False}


def test_teacher_forcing_follows_the_answer(decoder, plain):
    answer = [plain.next_token(PROMPT), 40, 41, 42, 43, 44]
    wanted = [{2}, set(), {1}, {2}, set()]
    exits = OrderedExits((1, 2), wanted, [9] * 5, [1] * 5)
    found = engine_for(decoder, exits, "host", stop=(9,)).follow(PROMPT, answer)
    ids = [*PROMPT, *answer]
    assert [step.exit_layer for step in found] == [2, DEPTH, 1, 2, DEPTH]
    for index, step in enumerate(found):
        dense = plain.next_token(ids[: len(PROMPT) + index + 1])
        assert step.token == (9 if step.exit_layer < DEPTH else dense)
    assert same_cache(decoder, ids[:-1])
