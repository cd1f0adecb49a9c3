"""What a load test draws, how an answer's events are read, and the figures that follow."""

import json
import random

import numpy as np
import pytest

pytest.importorskip("httpx2", reason="the extra 'serve' is not installed")

from benchmarks.under_load import client, figures, work
from benchmarks.under_load.figures import Block
from benchmarks.under_load.work import Answer, Load


def answer(index=0, sent=0.0, chunks=((1.0, "ab"), (2.0, "cd")), tokens=4, failure=""):
    return Answer(index, tokens, sent, chunks[-1][0], list(chunks), tokens, True, 7, failure)


def block(*answers, window=2.0):
    return Block(answers, window, 100.0, 0.01)


def decode(ids):
    return " ".join(map(str, ids))


TEXTS = [[0, 1, 2], [10, 11, 12, 13], list(range(100, 600))]


def test_requests_are_as_long_as_said_and_end_with_a_whole_text():
    requests = work.draw_requests(TEXTS, decode, 300, random.Random(1))
    lengths = [len(request.prompt.split()) for request in requests]
    assert min(lengths) in range(20, 30) and max(lengths) in range(390, 401)
    answers = [request.max_tokens for request in requests]
    assert min(answers) in range(64, 70) and max(answers) in range(186, 193)
    assert {request.prompt.split()[-1] for request in requests} == {"2", "13", "599"}
    assert requests == work.draw_requests(TEXTS, decode, 300, random.Random(1))
    assert requests != work.draw_requests(TEXTS, decode, 300, random.Random(2))


def test_half_a_character_is_not_sent():
    (request,) = work.draw_requests(TEXTS, lambda ids: "\ufffd why?\n\n", 1, random.Random(1))
    assert request.prompt == "why?"


def test_arrivals_are_poisson():
    moments = work.draw_arrivals(5.0, 1000.0, None, random.Random(1))
    between = np.diff(moments)
    assert moments[0] == 0 and moments[-1] <= 1000 and (between > 0).all()
    # the deviation of exponential times is their mean
    assert between.mean() == pytest.approx(0.2, rel=0.05)
    assert between.std() == pytest.approx(0.2, rel=0.05)
    assert work.draw_arrivals(5.0, None, 7, random.Random(1)) == moments[:7]
    assert work.draw_arrivals(0.001, 1.0, None, random.Random(1)) == [0]


def test_orders_by_load():
    timed = work.draw_order(Load(clients=3), TEXTS, decode, 2.0, None, "a")
    assert timed["clients"] == 3 and timed["arrivals"] == [] and len(timed["requests"]) > 40
    arriving = work.draw_order(Load(rate=4.0), TEXTS, decode, 5.0, None, "a")
    assert len(arriving["requests"]) == len(arriving["arrivals"]) > 0
    counted = work.draw_order(Load(rate=4.0), TEXTS, decode, None, 6, "a")
    assert len(counted["requests"]) == len(counted["arrivals"]) == 6
    assert counted != work.draw_order(Load(rate=4.0), TEXTS, decode, None, 6, "b")
    assert (Load(clients=3).name, Load(rate=0.5).name) == ("3", "0.5/s")


def test_percentiles_are_those_of_numpy():
    values = random.Random(1).choices(range(1000), k=37)
    for percent in (0, 25, 50, 95, 99, 100):
        assert figures.percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert figures.percentile([3.0], 99) == 3.0 and figures.percentile([], 50) is None


def test_tokens_are_counted_until_the_window_ends():
    long = answer(chunks=((1.0, "ab"), (2.0, "cd"), (3.0, "efgh")), tokens=16)
    assert figures.tokens_until(long, 0.5) == 0
    assert figures.tokens_until(long, 2.0) == 8
    assert figures.tokens_until(long, 9.0) == 16
    one = block(answer(), long, answer(failure="status 429"), window=2.0)
    assert one.tokens_per_s == (4 + 8) / 2
    # the one that failed and the one that went on do not count
    assert one.requests_per_s == 1 / 2


def test_times_of_an_answer():
    chunks = ((1.0, "a"), (2.0, "b"), (2.0, "at once"), (4.0, "c"))
    one = answer(sent=0.5, chunks=chunks, tokens=7)
    found = figures.figures_of([block(one, answer(failure="no"))])
    assert found["first_token_ms"] == {"50": 500.0, "95": 500.0, "99": 500.0}
    assert found["ms_per_token"]["50"] == 500.0
    assert (found["gap_ms"]["50"], found["gap_ms"]["95"]) == (1500.0, 1950.0)
    assert (found["requests"], found["failed"], found["failure"]) == (2, 1, "no")
    assert (found["tokens"], found["prompt_tokens"], found["peak_mb"]) == (7, 7, 100)


def test_ratios_are_those_of_one_round():
    slow = [block(answer(tokens=n)) for n in (4, 8, 40)]
    fast = [block(answer(tokens=n, chunks=((0.5, "ab"), (1.0, "cd")))) for n in (8, 8, 20)]
    found = figures.ratios_of(fast, slow)
    assert found["tokens_per_s"] == 1.0 and found["tokens_per_s_spread"] == [0.75, 1.5]
    assert found["first_token_95"] == 0.5
    nothing = [block(answer(failure="no"))] * 3
    assert figures.ratios_of(fast, nothing)["tokens_per_s"] is None
    assert figures.ratios_of(nothing, fast)["first_token_95"] is None


def test_answers_are_compared_where_both_are_whole():
    own = [block(answer(0), answer(1), answer(2)), block(answer(0, failure="no"), answer(1))]
    other = [block(answer(0), answer(1, chunks=((1.0, "x"),))), block(answer(0), answer(1))]
    assert figures.same_answers(own, other) == {"same": 2, "of": 3}


def exchange(*events, failure=""):
    lines = [(float(i), f"data: {e if isinstance(e, str) else json.dumps(e)}")
             for i, e in enumerate(events)]  # fmt: skip
    return client.Exchange(0, 9, 0.0, 9.0, [*lines, (9.0, ""), (9.0, ": ping")], failure)


def piece(text, reason=None):
    return {"choices": [{"delta": {"content": text}, "finish_reason": reason}], "usage": None}


def test_events_of_an_answer():
    usage = {"choices": [], "usage": {"completion_tokens": 5, "prompt_tokens": 3}}
    whole = client.parsed(exchange(piece(""), piece("a"), piece("b", "stop"), usage, "[DONE]"))
    assert whole.chunks == [(1.0, "a"), (2.0, "b")] and whole.text == "ab"
    assert (whole.tokens, whole.by_usage, whole.prompt_tokens, whole.failure) == (5, True, 3, "")
    uncounted = client.parsed(exchange(piece("a"), piece("b"), piece(None, "stop")))
    assert (uncounted.tokens, uncounted.by_usage) == (2, False)
    assert client.parsed(exchange(piece("a"), "[DONE]")).failure == "the answer broke off"
    assert "slow" in client.parsed(exchange(piece("a"), {"error": {"message": "slow"}})).failure
    assert client.parsed(exchange(failure="status 429")).failure == "status 429"
