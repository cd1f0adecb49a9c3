"""Clients that send slowly, send no HTTP, or do not read."""

import socket
import time

import pytest

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


def is_closed(connection, seconds=20.0):
    """Whether the server closes the connection, and what it says before."""
    connection.settimeout(seconds)
    said = b""
    try:
        while data := connection.recv(65536):
            said += data
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False, said
    return True, said


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        HEAD,
        HEAD + b"Content-Length: 100\r\n\r\n{",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
    ],
    ids=["nothing", "headers", "body", "chunks"],
)
def test_who_sends_slowly_is_closed(start, says, sent):
    api = start(slow_timeout=0.5)
    with api.socket() as connection:
        connection.sendall(sent)
        assert is_closed(connection) == (True, b"")
    assert api.said() == says(12)


def test_a_byte_now_and_then_is_not_enough(start):
    api = start(slow_timeout=0.5)
    with api.socket() as connection:
        connection.sendall(HEAD)
        with pytest.raises(OSError):
            for _ in range(200):
                connection.sendall(b"X")
                time.sleep(0.05)
    # the second request of a connection, too
    with api.socket() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        said = b""
        while not said.endswith(b"}"):
            said += connection.recv(65536)
        connection.sendall(b"GET /hea")
        assert is_closed(connection) == (True, b"")


def test_a_slow_answer_is_nobodys_fault(start, slowly, says):
    api = start(slow_timeout=0.3)
    assert api.said(max_tokens=100) == says(100)


def test_who_does_not_read_is_closed(start, says, monkeypatch):
    from eepass.server.replies import ChatReply

    grow = ChatReply.grow

    def large(self, piece):
        yield from grow(self, piece)
        yield b": " + b"a" * 1_000_000 + b"\n\n"

    monkeypatch.setattr(ChatReply, "grow", large)
    api = start(slow_timeout=0.5)
    body = b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 300, "stream": true}'
    open_ones = api.server._server.server_state.connections
    with api.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        api.wait_for(lambda: open_ones)
        api.wait_for(lambda: not open_ones)
    api.wait_for(lambda: api.slots_used == 0)
    assert api.said() == says(12)


def test_endless_headers(start):
    with start().socket() as connection, pytest.raises(OSError):
        for _ in range(1000):
            connection.sendall(HEAD + b"A: " + b"a" * 100_000)


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9\r\n\r\n", b"no http at all\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n",
     HEAD + b"Content-Length: -1\r\n\r\n",
     HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n"],
    ids=["TLS", "version", "text", "hosts", "path", "negative", "lengths"],
)  # fmt: skip
def test_what_is_no_http(api, sent):
    with api.socket() as connection:
        connection.sendall(sent)
        closed, said = is_closed(connection)
    assert closed and said.startswith(b"HTTP/1.1 4")
    assert b'{"error":{"message":' in said
    assert api.get("/health")[0] == 200


def test_more_connections_than_are_allowed(start):
    api = start(max_connections=3)
    with api.socket(), api.socket(), api.socket():
        with api.socket() as connection:
            closed, said = is_closed(connection)
        assert closed and said.startswith(b"HTTP/1.1 503") and b"too_many_connections" in said
    api.wait_for(lambda: api.get("/health")[0] == 200)
