"""Clients that hang up, wait, or take long; and how many may."""

import threading

import pytest
from api import text_of

from eepass.server.served import ServedModel

LONG = 480


def free(api):
    """Whether nothing of any request is left."""
    return api.slots_used == 0 and api.metric("eepass_running") == 0


def test_a_client_that_hangs_up_in_a_stream_frees_its_slots(api, slowly, says):
    with api.stream(max_tokens=LONG) as stream:
        for _, _event in zip(range(3), stream, strict=False):
            pass
        assert api.slots_used > 0
    api.wait_for(lambda: free(api))
    assert api.metric("eepass_answer_tokens_total") < LONG / 2
    assert api.said() == says(12)


def test_a_client_that_hangs_up_without_a_stream_frees_its_slots(api, slowly, says):
    with api.socket() as connection:
        body = b'{"messages": [{"role": "user", "content": "hello"}], "max_tokens": 480}'
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        api.wait_for(lambda: api.slots_used > 0)
    api.wait_for(lambda: free(api))
    assert api.metric("eepass_answer_tokens_total") < LONG / 2
    assert api.said() == says(12)


def test_who_waits_in_line_and_hangs_up_leaves_it(start, slowly, says):
    api = start(at_once=1)
    with api.stream(max_tokens=LONG) as first:
        next(iter(first))
        waiting = [threading.Thread(target=abandoned, args=(api,)) for _ in range(3)]
        for thread in waiting:
            thread.start()
        api.wait_for(lambda: api.metric("eepass_waiting") == 3)
        for thread in waiting:
            thread.join()
        api.wait_for(lambda: api.metric("eepass_waiting") == 0)
        assert api.metric("eepass_running") == 1
    assert api.said() == says(12)


def abandoned(api):
    import socket

    body = b'{"messages": [{"role": "user", "content": "hello"}]}'
    with api.socket() as connection:
        connection.settimeout(0.5)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        with pytest.raises(socket.timeout):
            connection.recv(1)


def test_more_than_may_wait_are_refused_at_once(start, slowly, says):
    api = start(max_waiting=2, at_once=1)
    said = []
    with api.stream(max_tokens=LONG) as first:
        next(iter(first))
        waiting = [threading.Thread(target=lambda: said.append(api.said())) for _ in range(2)]
        for thread in waiting:
            thread.start()
        api.wait_for(lambda: api.metric("eepass_waiting") == 2)
        status, reply, headers = api.chat()
        assert (status, reply["error"]["code"]) == (429, "rate_limit_exceeded")
        assert reply["error"]["type"] == "rate_limit_error" and int(headers["retry-after"]) > 0
        assert api.get("/health")[0] == 200
    for thread in waiting:
        thread.join()
    assert said == [says(12)] * 2


def test_an_answer_that_takes_too_long(start, slowly, says):
    api = start(timeout=0.5)
    status, error = api.refused(max_tokens=LONG)
    assert (status, error["code"], error["type"]) == (504, "timeout", "server_error")
    events = api.events(max_tokens=LONG)
    assert events[-1] == "[DONE]" and events[-2]["error"]["code"] == "timeout"
    # what came before is the beginning of the answer
    text = text_of(events[:-2])
    assert text and says(LONG).startswith(text)
    api.wait_for(lambda: free(api))


def test_a_wait_in_line_that_takes_too_long(start, slowly):
    api = start(timeout=1.0, at_once=1)
    with api.stream(max_tokens=LONG) as first:
        next(iter(first))
        assert api.refused()[0] == 504


def test_tokenising_holds_nobody_up(api, says, monkeypatch):
    begun, may_end = threading.Event(), threading.Event()
    encode = ServedModel.encode

    def held(self, text):
        if text == "long":
            begun.set()
            assert may_end.wait(30)
        return encode(self, text)

    monkeypatch.setattr(ServedModel, "encode", held)
    found = []
    body = {"prompt": "long", "max_tokens": 3}
    asking = threading.Thread(target=lambda: found.append(api.post("/v1/completions", body)[0]))
    asking.start()
    assert begun.wait(30)
    assert api.get("/health")[0] == 200 and api.said() == says(12)
    may_end.set()
    asking.join()
    assert found == [200]


def test_two_hundred_at_once(start, says):
    api = start(max_waiting=40, max_connections=100)
    found = []

    def ask():
        try:
            found.append(api.chat()[:2])
        except OSError:
            # the connection was closed before the request was read
            found.append((503, None))

    threads = [threading.Thread(target=ask) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {status for status, _ in found} <= {200, 429, 503}
    said = [reply["choices"][0]["message"]["content"] for status, reply in found if status == 200]
    assert len(said) >= 40 and set(said) == {says(12)}
    api.wait_for(lambda: free(api))
    assert api.said() == says(12)
