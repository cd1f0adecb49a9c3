"""Requests of any thread are decoded together, and each gets what it gets alone."""

import threading
import time

import pytest
import torch
from models import tiny_model

import eepass
from eepass.errors import EngineError
from eepass.runtime.engine.batch import Request, decode_batch
from eepass.runtime.engine.loop import EngineLoop
from eepass.runtime.sampling import GREEDY, Sampling


@pytest.fixture(scope="module")
def engine():
    return eepass.transform(tiny_model("llama"), max_length=256).engine


@pytest.fixture
def loop(engine):
    made = EngineLoop(engine)
    yield made
    until = time.monotonic() + 10
    while made._thread is not None and time.monotonic() < until:
        time.sleep(0.01)
    # it ends when nothing is left, and leaves nothing in the cache
    assert made._thread is None and engine.decoder.kv.unused


def request(number, limit=12, **options):
    ids = [(5 * number + 3 * place) % 50 + 3 for place in range(4 + number % 7)]
    return Request(ids, limit, frozenset(), Sampling(**options) if options else GREEDY)


def alone(engine, number, limit=12, **options):
    return [token for _, token in decode_batch(engine, [request(number, limit, **options)])]


def tokens(loop, *requests):
    found = {one: [] for one in requests}
    for one, token in loop.submit(requests):
        found[one].append(token)
    return list(found.values())


def test_threads_get_what_they_get_alone(engine, loop, monkeypatch):
    options = [{}, {"temperature": 0.9, "seed": 3}, {}, {"temperature": 1.3, "seed": 4}]
    asked = [(number, 8 + number % 5, options[number % 4]) for number in range(24)]
    wanted = [alone(engine, number, limit, **how) for number, limit, how in asked]
    found, together, step = {}, [], type(engine).step

    def counted(self, sequences=None):
        together.append(len(sequences))
        step(self, sequences)

    monkeypatch.setattr(type(engine), "step", counted)

    def ask(number, limit, how):
        (found[number],) = tokens(loop, request(number, limit, **how))

    threads = [threading.Thread(target=ask, args=one) for one in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[number] for number in range(24)] == wanted
    assert max(together) > 1


def test_requests_of_one_caller_come_as_they_are_confirmed(engine, loop):
    requests = [request(number, 3 + 2 * number) for number in range(5)]
    found = tokens(loop, *requests)
    assert found == [alone(engine, number, 3 + 2 * number) for number in range(5)]


def test_a_caller_that_leaves_frees_its_slots(engine, loop):
    stream = loop.submit([request(1, 200)])
    next(stream)
    assert not engine.decoder.kv.unused
    stream.close()
    assert engine.decoder.kv.unused


def test_a_caller_that_leaves_the_queue_waits_for_nobody(engine, loop):
    first = loop.submit([request(1, 240)])
    next(first)
    # no room beside the first one
    second = loop.submit([request(2, 240)])
    began = time.monotonic()
    second.close()
    assert len(engine.sequences) == 1 and time.monotonic() - began < 5
    # nor does anybody read this one
    loop.submit([request(3, 240)])
    first.close()


def test_a_request_that_has_enough_leaves_and_others_stay(engine, loop):
    short, long = request(1, 100), request(2, 100)
    found = []
    for one, token in loop.submit([short, long]):
        found.append((one, token))
        if one is short and sum(o is short for o, _ in found) == 5:
            short.enough = True
    assert [token for one, token in found if one is short] == alone(engine, 1, 5)
    assert [token for one, token in found if one is long] == alone(engine, 2, 100)


def test_errors_are_their_own_callers(engine, loop):
    def fails(context, logits):
        if len(context) > 12:
            raise RuntimeError("a processor's")
        return logits

    patient = loop.submit([request(2, 60)])
    next(patient)
    with pytest.raises(EngineError, match="the prompt is empty"):
        tokens(loop, Request([], 5, frozenset(), GREEDY))
    with pytest.raises(EngineError, match="at most"):
        tokens(loop, request(3, 10_000))
    with pytest.raises(RuntimeError, match="a processor's"):
        tokens(loop, request(4, 60, process=fails), request(5, 60))
    assert len(list(patient)) == 59


def test_a_process_that_asks_its_own_model_is_told_so(engine, loop):
    def asks(context, logits):
        next(loop.submit([request(7)]))
        return logits

    with pytest.raises(EngineError, match="wait for ever"):
        tokens(loop, request(6, process=asks))
    assert tokens(loop, request(5)) == [alone(engine, 5)]


def test_who_submits_leaves_the_processors_to_the_loop(engine):
    released = []
    made = EngineLoop(engine, lambda: released.append(threading.current_thread()))
    tokens(made, request(1))
    assert released == [threading.current_thread()]


def test_an_error_of_a_pass_reaches_everyone_and_the_loop_goes_on(engine, loop, monkeypatch):
    first = loop.submit([request(1, 100)])
    next(first)
    with monkeypatch.context() as patch:

        def broken(*arguments):
            raise EngineError("out of something")

        patch.setattr(type(engine), "step", broken)
        with pytest.raises(EngineError, match="out of something"):
            list(first)
    assert tokens(loop, request(2)) == [alone(engine, 2)]


def test_more_than_fit_wait_for_their_turn(engine, loop):
    requests = [request(number, 120) for number in range(6)]
    assert tokens(loop, *requests) == [alone(engine, number, 120) for number in range(6)]


def test_it_keeps_the_threads_that_were_asked_for(engine, loop, monkeypatch):
    before, seen = torch.get_num_threads(), []

    def look(context, logits):
        seen.append(torch.get_num_threads())
        return logits

    try:
        torch.set_num_threads(1)
        tokens(loop, request(1, 3, process=look))
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}
