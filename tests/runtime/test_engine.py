"""The decode loop: the staircase of lengths, deferred catch-up, bounds and errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCABULARY, ForcedExits, eager_compile

from eepass.runtime.decoder import Decoder
from eepass.runtime.engine import Engine, EngineError

DEPTH = 4
PROMPT = [5, 9, 44, 7, 8]


@pytest.fixture(scope="module")
def decoder(llama_splits):
    return Decoder(llama_splits, eager_compile)


def dense_cache(decoder, ids):
    """Keys and values after ``ids`` went through all layers one by one."""
    engine = Engine(decoder)
    engine.reset()
    engine.prefill(ids[:1])
    for token in ids[1:]:
        engine.step(token)
    return [k[:, :, : len(ids)].clone() for k in (*decoder.kv.keys, *decoder.kv.values)]


def forced(decoder, orders, answers, **options):
    return Engine(decoder, ForcedExits(DEPTH, orders, answers), None, **options)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_after_any_exits_the_cache_is_the_dense_one(decoder, data):
    count = data.draw(st.integers(1, 30))
    orders = data.draw(st.lists(st.integers(1, DEPTH + 1), min_size=count, max_size=count))
    answers = data.draw(st.lists(st.integers(3, VOCABULARY - 1), min_size=count, max_size=count))
    limit = data.draw(st.integers(0, 7))
    engine = forced(decoder, orders, answers, pending_limit=limit)
    said = [step.token for step in engine.generate(PROMPT, count + 1)]
    assert engine.pending == 0 and decoder.kv.complete
    ids = [*PROMPT, *said[:-1]]
    assert decoder.kv.lengths == [len(ids)] * DEPTH
    ours = [k[:, :, : len(ids)].clone() for k in (*decoder.kv.keys, *decoder.kv.values)]
    for own, dense in zip(ours, dense_cache(decoder, ids), strict=True):
        assert torch.allclose(own, dense, atol=2e-5)


@settings(max_examples=25, deadline=None)
@given(orders=st.lists(st.integers(1, DEPTH + 1), min_size=1, max_size=40), limit=st.integers(0, 7))
def test_lengths_never_grow_with_depth_and_pending_is_bounded(decoder, orders, limit):
    engine = forced(decoder, orders, [9] * len(orders), pending_limit=limit)
    token = engine.start(PROMPT)
    for _ in orders:
        token, exit_layer = engine.step(token)
        lengths = decoder.kv.lengths
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] - lengths[-1] == engine.pending <= limit
        assert exit_layer <= DEPTH
    engine.catch_up()


def test_an_exit_runs_no_deeper_layer(decoder, monkeypatch):
    ran = []
    original = decoder.run_layer
    monkeypatch.setattr(
        decoder, "run_layer", lambda layer, *rest: ran.append(layer) or original(layer, *rest)
    )
    engine = forced(decoder, [2, 3], [11, 12])
    token = engine.start(PROMPT)
    ran.clear()
    assert engine.step(token) == (11, 2)
    assert ran == [0, 1]
    ran.clear()
    # layer 2 has not seen the token before: it goes along
    assert engine.step(11) == (12, 3)
    assert ran == [0, 1, 2]
    assert decoder.kv.lengths == [7, 7, 7, 5]


def test_switching_deferral_off_changes_the_cache(decoder):
    """``drop`` leaves holes, and what is said later knows it; ``defer`` says what dense says."""
    orders, answers = [1] * 6, [20, 21, 22, 23, 24, 25]
    after = {}
    for policy in ("defer", "propagate", "drop"):
        engine = forced(decoder, orders, answers, kv_policy=policy)
        token = engine.start(PROMPT)
        for _ in orders:
            token, _ = engine.step(token)
        engine.catch_up()
        hidden = torch.zeros(1, 1, 64)
        after[policy] = decoder.run_layer(DEPTH - 1, hidden, decoder.kv.lengths[-1], 11)
        after[policy + " lengths"] = list(decoder.kv.lengths)
    assert after["defer lengths"] == after["propagate lengths"] == [11] * DEPTH
    assert after["drop lengths"] == [11, 5, 5, 5]
    assert not torch.allclose(after["defer"], after["propagate"], atol=1e-4)
    assert not torch.allclose(after["defer"], after["drop"], atol=1e-4)


def test_prefill_in_chunks_equals_token_by_token(decoder):
    ids = list(range(3, 43))  # 16 + 16 + 8
    engine = Engine(decoder)
    engine.reset()
    engine.prefill(ids)
    ours = [k[:, :, : len(ids)].clone() for k in (*decoder.kv.keys, *decoder.kv.values)]
    for own, dense in zip(ours, dense_cache(decoder, ids), strict=True):
        assert torch.allclose(own, dense, atol=2e-5)


def test_an_empty_prompt_is_refused(decoder):
    with pytest.raises(EngineError, match="prompt is empty"):
        Engine(decoder).start([])


def test_a_prompt_longer_than_the_cache_is_refused(decoder):
    with pytest.raises(EngineError, match=f"room for {decoder.capacity}"):
        Engine(decoder).start([5] * (decoder.capacity + 1))


def test_a_full_cache_is_an_error_that_keeps_what_was_said(decoder):
    said = []
    with pytest.raises(EngineError, match="raise max_length"):
        for step in Engine(decoder).generate([5] * (decoder.capacity - 3), 100):
            said.append(step)
    assert len(said) == 4


def test_generation_stops_at_a_stop_token(decoder):
    engine = forced(decoder, [2, 2, 2], [30, 2, 31])
    said = [step.token for step in engine.generate(PROMPT, 50, frozenset({2}))]
    assert said[1:] == [30, 2]
    assert engine.pending == 0


def test_an_abandoned_generation_leaves_nothing_pending(decoder):
    engine = forced(decoder, [1] * 5, [30] * 5)
    stream = engine.generate(PROMPT, 50)
    for _ in range(4):
        next(stream)
    assert engine.pending == 3
    stream.close()
    assert engine.pending == 0 and decoder.kv.complete


def test_logits_that_are_not_finite_are_named(decoder):
    logits = torch.full((1, 1, VOCABULARY), float("nan"))
    with pytest.raises(EngineError, match="not finite"):
        Engine._argmax(logits)


def test_two_generations_in_a_row_are_like_the_first_alone(decoder):
    engine = forced(decoder, [2, 9, 1, 9, 3], [30, 31, 32, 33, 34])
    first = list(engine.generate(PROMPT, 6))
    list(Engine(decoder).generate([9, 9, 9], 10))
    engine.exits.turn = -1
    assert list(engine.generate(PROMPT, 6)) == first
