"""Slots are given in blocks, sequences move and share beginnings; answers stay the same."""

from random import Random

import pytest
import torch
from models import tiny_model

import eepass
from eepass.errors import EngineError
from eepass.runtime.cache.regions import Regions, common
from eepass.runtime.decoder.decoder import LEAST_CHUNK
from eepass.runtime.engine.batch import Batch, Request, decode_batch
from eepass.runtime.engine.engine import Engine
from eepass.runtime.engine.placement import BLOCK, LEAST_SHARED, Placement
from eepass.runtime.sampling import GREEDY, Sampling

SLOTS = 512


@pytest.fixture(scope="module")
def transformed():
    return eepass.transform(tiny_model("llama", max_position_embeddings=1024), max_length=SLOTS)


@pytest.fixture
def engine(transformed):
    engine = transformed.engine
    yield engine
    left = list(engine.placement.sequences)
    for sequence in left:
        engine.end(sequence)
    assert not left and transformed.decoder.kv.unused
    engine.decoder.kv.regions.forget()


def text(number, length):
    return [(7 * number + 3 * place + place * place % 11) % 90 + 3 for place in range(length)]


def request(ids, limit, shares=False, sampling=GREEDY):
    return Request(list(ids), limit, frozenset(), sampling, shares)


def answers(engine, requests, most=None):
    found = {one: [] for one in requests}
    for one, token in decode_batch(engine, requests, most):
        found[one].append(token)
    return list(found.values())


def counting(monkeypatch, owner, name):
    calls, original = [], getattr(owner, name)

    def counted(*args, **options):
        result = original(*args, **options)
        calls.append(result)
        return result

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_regions():
    regions = Regions(100)
    assert [regions.allocate(30), regions.allocate(30), regions.allocate(41)] == [0, 30, None]
    assert regions.extend(30, 70) and not regions.extend(0, 31)
    regions.release(30)
    assert regions.allocate(20, top=True) == 80 and regions.free == 50
    # a kept text is spared where there is room elsewhere, and goes where there is none
    regions.keep(0, list(range(30)))
    assert regions.allocate(40) == 30 and len(regions.kept) == 1
    assert regions.allocate(25) == 0 and not regions.kept
    assert regions.free == 15


def test_of_kept_texts_the_oldest_goes_first():
    regions = Regions(90)
    for first in (0, 30, 60):
        assert regions.allocate(30) == first
    for first in (30, 0, 60):
        regions.keep(first, [first] * 30)
    regions.touch(regions.kept[0])
    assert regions.allocate(10) == 0 and [text.first for text in regions.kept] == [60, 30]
    # one that begins with another holds it
    regions.release(0)
    regions.keep(0, [60] * 30 + [1])
    assert [text.first for text in regions.kept] == [30, 0]


def test_common():
    assert common([1, 2, 3], [1, 2, 4, 5]) == 2 and common([], [1]) == 0
    assert common([1, 2], [1, 2, 3]) == 2 and common([2], [1]) == 0
    chance = Random(0)
    for _ in range(200):
        one = [chance.randrange(2) for _ in range(12)]
        other = [chance.randrange(2) for _ in range(chance.randrange(14))]
        slow = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        assert common(one, other) == (min(len(one), len(other)) if slow is None else slow)


def test_many_short_answers_fit_where_few_long_ones_would(engine):
    """Each may come to need 300 slots of 512."""
    batch = Batch(engine, 8)
    for number in range(3):
        one = request(text(number, 20), 280)
        assert batch.has_room(one)
        batch.start(one)
    batch.run_prompts()
    batch.step()
    assert len(engine.sequences) == 3
    batch.end()


def test_answers_that_outgrow_the_cache_are_the_same(engine, monkeypatch):
    requests = [
        request(text(number, 20 + number), 150 + 20 * number, sampling=sampling)
        for number, sampling in enumerate([GREEDY, Sampling(temperature=1.0, seed=5), GREEDY])
    ]
    alone = [answers(engine, [one])[0] for one in requests]
    suspended = counting(monkeypatch, Engine, "suspend")
    moved = counting(monkeypatch, Placement, "_copy")
    assert answers(engine, requests) == alone
    assert suspended and moved
    assert [len(answer) for answer in alone] == [150, 170, 190]


def test_one_that_ends_frees_its_slots_for_those_that_wait(engine):
    requests = [request(text(number, 100), 20 + 8 * number) for number in range(9)]
    alone = [answers(engine, [one])[0] for one in requests]
    assert answers(engine, requests, most=9) == alone


def rows_run(monkeypatch, engine):
    rows, forward = [], engine.decoder.forward

    def counted(tokens, *args, **options):
        rows.append(len(tokens))
        return forward(tokens, *args, **options)

    monkeypatch.setattr(engine.decoder, "forward", counted)
    return rows


def cache_of(engine, sequence, count):
    kv, first = engine.decoder.kv, sequence.first_slot
    return [t[:, :, first : first + count].clone() for t in (*kv.keys, *kv.values)]


def test_what_texts_begin_with_is_computed_once(engine, monkeypatch):
    system = text(1, 90)
    asked = [request([*system, *text(9 + number, 7)], 12, shares=True) for number in range(3)]
    alone = [answers(engine, [request(one.ids, 12)])[0] for one in asked]
    assert answers(engine, asked[:1]) == alone[:1]
    rows = rows_run(monkeypatch, engine)
    assert answers(engine, asked[1:]) == alone[1:]
    assert rows == [7, 7]
    # nobody else finds it, and nobody finds what did not share
    assert answers(engine, [request(asked[1].ids, 12)]) == alone[1:2]
    assert sum(rows) == 14 + len(asked[1].ids)


def test_keys_and_values_that_are_shared_are_those_of_a_prompt(engine):
    ids = text(2, 150)
    first = engine.start(ids, 40, capacity=200)
    wanted = cache_of(engine, first, 150)
    while not first.finished:
        engine.advance(first)
    whole = [*first.tokens]
    engine.end(first)
    shared = list(decode_batch(engine, [request(ids, 40, shares=True)]))
    assert [token for _, token in shared] == whole[150:]
    # the answer is kept as well: its keys and values are those that a prompt has
    longer = [*whole[:-1], 5, 6, 7]
    again = engine.admit(longer, 8, capacity=300, shares=True)
    assert engine.run_prompt(again)
    found = cache_of(engine, again, 189)
    engine.end(again)
    plain = engine.start(longer, 8, capacity=300)
    for one, other in zip(found, cache_of(engine, plain, 189), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(wanted, cache_of(engine, plain, 150), strict=True):
        assert torch.equal(one, other)
    engine.end(plain)


def test_a_text_that_goes_on_takes_the_place_of_the_kept_one(engine, monkeypatch):
    """A conversation of more than half the cache does not fit into it twice."""
    rows = rows_run(monkeypatch, engine)
    ids = text(3, 300)
    (answer,) = answers(engine, [request(ids, 20, shares=True)])
    rows.clear()
    ids = [*ids, *answer, *text(4, 30)]
    (answer,) = answers(engine, [request(ids, 20, shares=True)])
    assert sum(rows) == 31
    assert [answer] == answers(engine, [request(ids, 20)])


def test_what_is_being_decoded_is_shared_too(engine, monkeypatch):
    system = text(5, 100)
    asked = [request([*system, *text(6 + number, 9)], 20, shares=True) for number in range(4)]
    alone = [answers(engine, [request(one.ids, 20)])[0] for one in asked]
    engine.decoder.kv.regions.forget()
    rows = rows_run(monkeypatch, engine)
    assert answers(engine, asked) == alone
    assert sum(rows) == len(asked[0].ids) + 3 * 9


def test_little_in_common_is_not_shared(engine, monkeypatch):
    common = text(7, LEAST_SHARED - 1)
    rows = rows_run(monkeypatch, engine)
    for number in range(2):
        answers(engine, [request([*common, 50 + number, 60, 70], 4, shares=True)])
    # all of it is run, in two chunks
    assert rows == [LEAST_CHUNK, LEAST_SHARED + 2 - LEAST_CHUNK] * 2


def test_slots_are_given_in_blocks(engine):
    batch = Batch(engine, 4)
    one = request(text(8, 30), 400)
    batch.start(one)
    assert one.sequence.capacity == 30 + BLOCK
    batch.run_prompts()
    seen = set()
    while batch.running:
        batch.step()
        seen.add(one.sequence.capacity)
        batch.catch_up()
        list(batch.confirmed())
    # with room for padding behind the last token, as far as the cache goes
    assert seen == {94, 158, 222, 286, 350, 414, 446}


def test_slots_that_are_others_are_not_waited_for(engine):
    """Whoever has them does not give them back here."""
    kv, one = engine.decoder.kv, request(text(8, 30), 400)
    batch = Batch(engine, 4)
    batch.start(one)
    others = kv.allocate(kv.regions.free)
    batch.run_prompts()
    with pytest.raises(EngineError, match="free slots in the cache"):
        while batch.running:
            batch.run_prompts()
            batch.step()
    batch.end()
    kv.release(others)
