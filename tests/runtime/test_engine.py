"""The decode loop: the staircase of lengths, deferred catch-up, bounds and errors."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCABULARY, ForcedExits, eager_compile

from eepass.errors import EngineError
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.engine.engine import Engine
from eepass.runtime.engine.options import Options
from eepass.runtime.sampling import Sampling

DEPTH = 4
PROMPT = [5, 9, 44, 7, 8]


@pytest.fixture(scope="module")
def decoder(llama_splits):
    return Decoder(llama_splits, eager_compile)


def dense_cache(decoder, ids):
    """Keys and values after ``ids`` went through all layers one by one."""
    engine = Engine(decoder)
    sequence = engine.start(ids[:1])
    for token in ids[1:]:
        sequence.replace_last(token)
        engine.step()
    engine.reset()
    return [k[:, :, : len(ids)].clone() for k in (*decoder.kv.keys, *decoder.kv.values)]


def forced(decoder, orders, answers, pending_limit=7, kv_policy="defer"):
    options = Options("approximate", kv_policy, pending_limit, ("exits",))
    return Engine(decoder, ForcedExits(DEPTH, orders, answers), options=options)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_after_any_exits_the_cache_is_the_dense_one(decoder, data):
    count = data.draw(st.integers(1, 30))
    orders = data.draw(st.lists(st.integers(1, DEPTH + 1), min_size=count, max_size=count))
    answers = data.draw(st.lists(st.integers(3, VOCABULARY - 1), min_size=count, max_size=count))
    limit = data.draw(st.integers(0, 7))
    engine = forced(decoder, orders, answers, limit)
    generated = [step.token for step in engine.generate(PROMPT, count + 1)]
    ids = [*PROMPT, *generated[:-1]]
    ours = [k[:, :, : len(ids)].clone() for k in (*decoder.kv.keys, *decoder.kv.values)]
    for own, dense in zip(ours, dense_cache(decoder, ids), strict=True):
        assert torch.allclose(own, dense, atol=2e-5)


@settings(max_examples=25, deadline=None)
@given(orders=st.lists(st.integers(1, DEPTH + 1), min_size=1, max_size=40), limit=st.integers(0, 7))
def test_lengths_never_grow_with_depth_and_pending_is_bounded(decoder, orders, limit):
    engine = forced(decoder, orders, [9] * len(orders), limit)
    sequence = engine.start(PROMPT)
    for _ in orders:
        engine.step()
        lengths = sequence.lengths(DEPTH)
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] - lengths[-1] == sequence.num_pending <= limit
        assert sequence.exit_layers[-1] <= DEPTH
    engine.catch_up()
    assert sequence.lengths(DEPTH) == [len(PROMPT) + len(orders)] * DEPTH
    engine.reset()


def test_an_exit_runs_no_deeper_layer(decoder, monkeypatch):
    ran = []
    original = decoder.run_layer
    monkeypatch.setattr(
        decoder, "run_layer", lambda layer, *rest: ran.append(layer) or original(layer, *rest)
    )
    engine = forced(decoder, [2, 3], [11, 12])
    sequence = engine.start(PROMPT)
    ran.clear()
    engine.step()
    assert (sequence.tokens[-1], sequence.exit_layers[-1]) == (11, 2)
    assert ran == [0, 1]
    ran.clear()
    # layer 2 has not run the token before: it goes along
    engine.step()
    assert (sequence.tokens[-1], sequence.exit_layers[-1]) == (12, 3)
    assert ran == [0, 1, 2]
    assert sequence.lengths(DEPTH) == [7, 7, 7, 5]
    engine.reset()


def test_switching_deferral_off_changes_the_cache(decoder):
    """``drop`` leaves zeros, ``propagate`` fills in projections; later tokens attend to them."""
    orders, answers = [1] * 6, [20, 21, 22, 23, 24, 25]
    after = {}
    for policy in ("defer", "propagate", "drop"):
        engine = forced(decoder, orders, answers, kv_policy=policy)
        engine.start(PROMPT)
        for _ in orders:
            engine.step()
        engine.catch_up()
        after[policy] = decoder.kv.keys[-1][:, :, : len(PROMPT) + 6].clone()
        engine.reset()
    assert (after["drop"][:, :, len(PROMPT) :] == 0).all()
    assert after["propagate"].abs().sum((0, 1, 3)).min() > 0
    assert not torch.allclose(after["defer"], after["propagate"], atol=1e-4)
    assert torch.equal(after["defer"][:, :, : len(PROMPT)], after["drop"][:, :, : len(PROMPT)])


def test_prefill_in_chunks_equals_token_by_token(decoder):
    ids = list(range(3, 43))  # 16 + 16 + 8
    Engine(decoder).prefill(ids, lambda layer, hidden: None)
    ours = [k[:, :, : len(ids)].clone() for k in (*decoder.kv.keys, *decoder.kv.values)]
    for own, dense in zip(ours, dense_cache(decoder, ids), strict=True):
        assert torch.allclose(own, dense, atol=2e-5)


def test_a_sequence_anywhere_in_the_cache_is_the_same(decoder):
    engine = Engine(decoder)
    alone = engine.start(PROMPT, capacity=20)
    engine.start([9, 8, 7], capacity=30)
    other = engine.start(PROMPT, capacity=25)
    assert (alone.first_slot, other.first_slot) == (0, 50)
    for _ in range(8):
        engine.step([alone])
        engine.step([other])
    assert alone.tokens == other.tokens
    for keys in decoder.kv.keys:
        assert torch.allclose(keys[:, :, :13], keys[:, :, 50:63], atol=2e-5)
    engine.reset()


def test_slots_are_freed_and_refused_when_there_are_none(decoder):
    engine = Engine(decoder)
    first = engine.start(PROMPT, capacity=decoder.capacity - 10)
    with pytest.raises(EngineError, match="no 20 free slots"):
        engine.start(PROMPT, capacity=20)
    engine.end(first)
    assert engine.start(PROMPT, capacity=20).first_slot == 0
    engine.reset()


def test_an_empty_prompt_is_refused(decoder):
    with pytest.raises(EngineError, match="prompt is empty"):
        Engine(decoder).start([])


def test_a_prompt_longer_than_the_cache_is_refused(decoder):
    with pytest.raises(EngineError, match=f"room for {decoder.capacity}"):
        Engine(decoder).start([5] * (decoder.capacity + 1))


def test_a_full_cache_is_an_error_that_keeps_what_was_generated(decoder):
    generated = []
    with pytest.raises(EngineError, match="raise max_length"):
        for step in Engine(decoder).generate([5] * (decoder.capacity - 3), 100):
            generated.append(step)
    assert len(generated) == 4


def test_generation_stops_at_a_stop_token(decoder):
    engine = forced(decoder, [2, 2, 2], [30, 2, 31])
    generated = [step.token for step in engine.generate(PROMPT, 50, frozenset({2}))]
    assert generated[1:] == [30, 2]
    assert engine.sequences == []


def test_an_abandoned_generation_leaves_nothing_behind(decoder):
    engine = forced(decoder, [1] * 5, [30] * 5)
    stream = engine.generate(PROMPT, 50)
    for _ in range(4):
        next(stream)
    (sequence,) = engine.sequences
    assert sequence.num_pending == 3
    stream.close()
    assert sequence.num_pending == 0 and engine.sequences == []


def test_logits_that_are_not_finite_are_named(decoder, monkeypatch):
    bad = torch.full((1, 1, VOCABULARY), float("nan"))
    monkeypatch.setattr(decoder, "logits", lambda hidden: bad)
    with pytest.raises(EngineError, match="not finite"):
        Engine(decoder).start(PROMPT)
    monkeypatch.undo()
    # the slots were freed
    assert Engine(decoder).start(PROMPT).first_slot == 0
    decoder.kv.release(0)


def test_two_generations_in_a_row_are_like_the_first_alone(decoder):
    engine = forced(decoder, [2, 9, 1, 9, 3], [30, 31, 32, 33, 34])
    first = list(engine.generate(PROMPT, 6))
    list(Engine(decoder).generate([9, 9, 9], 10))
    engine.exits.turn = -1
    assert list(engine.generate(PROMPT, 6)) == first


def test_a_penalty_that_exits_cannot_apply_is_refused(decoder):
    engine = Engine(decoder, exits=SimpleNamespace(), options=Options("approximate"))
    with pytest.raises(EngineError, match="repetition_penalty"):
        engine.start(PROMPT, sampling=Sampling(repetition_penalty=1.2))


def test_the_engine_observes_what_its_dense_passes_cost(transformed):
    from eepass.runtime.drafting.planner import Planner
    from eepass.runtime.engine.engine import Engine

    found = {}
    for measured in (True, False):
        planner = Planner({1: 100.0, 4: 200.0, 8: 300.0})
        engine = Engine(transformed.decoder, planner=(lambda p=planner: p) if measured else None)
        list(engine.generate([5, 9, 40], 6))
        found[measured] = dict(engine.planner.costs)
    assert found[True][1] < 10
    # the others as far from what was measured as that one
    assert found[True][8] == pytest.approx(3 * found[True][1])
    assert set(found[False].values()) == {1.0}
