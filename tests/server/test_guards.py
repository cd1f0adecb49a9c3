"""Who may ask, from where, and how much."""

import json

import pytest

from eepass.errors import InputError

PAGE = "https://example.org"


def test_hosts(start):
    api = start(allow_host=["my.name"])
    for host in ("localhost", "127.0.0.1:1234", "[::1]:80", "my.name:8000", "MY.NAME"):
        assert api.get("/health", host=host)[0] == 200, host
    for host in ("evil.example", "localhost.evil.example", "10.0.0.1", "", "a b", "[::1", "["):
        status, reply, _ = api.get("/health", host=host)
        assert (status, reply["error"]["code"]) == (403, "unknown_host"), host
    assert start(allow_host=["*"]).get("/health", host="evil.example")[0] == 200


def test_addresses_are_hosts_where_others_can_reach_it(start):
    api = start(host="0.0.0.0", api_key="secret")
    assert api.get("/health", host="10.0.0.1:8000")[0] == 200
    assert api.get("/health", host="evil.example")[0] == 403


def test_pages_of_others_may_not_ask(start):
    api = start(allow_origin=[PAGE])
    own = f"http://127.0.0.1:{api.port}"
    for origin in ("https://evil.example", "null", "http://127.0.0.1", PAGE + ".evil"):
        status, reply, headers = api.post("/v1/chat/completions", b"{}", origin=origin)
        assert (status, reply["error"]["code"]) == (403, "unknown_origin"), origin
        assert "access-control-allow-origin" not in headers
    for origin in (own, PAGE):
        status, _, headers = api.get("/v1/models", origin=origin)
        assert (status, headers["access-control-allow-origin"]) == (200, origin)
    asks = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    status, _, headers = api.request("OPTIONS", "/v1/chat/completions", None, asks)
    assert status == 204 and "authorization" in headers["access-control-allow-headers"]
    assert start(allow_origin=["*"]).get("/v1/models", origin="https://any.example")[0] == 200


def test_a_key(start, says):
    api = start(api_key="secret")
    for path in ("/v1/models", "/metrics", "/v1/nothing"):
        status, reply, headers = api.get(path)
        assert (status, reply["error"]["code"]) == (401, "invalid_api_key")
        assert headers["www-authenticate"] == "Bearer" and "secret" not in str(reply)
    for given in ("secret", "Bearer", "Bearer secre", "Bearer secret2", "bearer\xff"):
        assert api.get("/v1/models", authorization=given)[0] == 401, given
    assert api.get("/health")[0] == 200
    assert api.get("/v1/models", authorization="Bearer secret")[0] == 200
    assert api.chat()[0] == 401
    status, reply, _ = api.post("/v1/completions", {"prompt": "hello_", "max_tokens": 3},
                                authorization="Bearer secret")  # fmt: skip
    assert (status, reply["choices"][0]["text"]) == (200, says(3))


def test_the_key_of_the_environment(start, monkeypatch):
    monkeypatch.setenv("EEPASS_API_KEY", "other")
    assert start().get("/v1/models")[0] == 401
    assert start().get("/v1/models", authorization="Bearer other")[0] == 200
    with pytest.raises(InputError, match="api_key"):
        start(api_key="")


def test_one_line_warns_of_an_open_door(start, caplog):
    start(host="0.0.0.0", log_level="warning")
    (record,) = caplog.records
    assert "without a key" in record.getMessage()
    caplog.clear()
    start(host="0.0.0.0", log_level="warning", api_key="secret")
    start(log_level="warning")
    assert not caplog.records


def test_large_bodies(start, says):
    api = start(max_body_bytes=2000)
    body = json.dumps({"messages": [{"role": "user", "content": "a" * 3000}]}).encode()
    status, reply, _ = api.post("/v1/chat/completions", body)
    assert (status, reply["error"]["code"]) == (413, "body_too_large")
    # a length that is stated is enough
    with api.socket() as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999"
        connection.sendall(f"{head}\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    # and one that is not is counted
    with api.socket() as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked"
        connection.sendall(f"{head}\r\n\r\n".encode() + (b"400\r\n" + b"a" * 1024 + b"\r\n") * 2)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert api.said() == says(12)
    # what was read of them is not held
    assert api.server.app.guards.held == 0


def test_a_large_body_of_many_small_parts(start):
    api = start()
    empty = json.dumps({"role": "user", "content": ""})
    body = f'{{"messages": [{",".join([empty] * 25_000)}]}}'.encode()
    assert len(body) < 1 << 20
    assert api.post("/v1/chat/completions", body)[0] == 400
    wrong = b'{"messages": [' + b",".join([b"1"] * 500_000) + b"]}"
    assert api.post("/v1/chat/completions", wrong)[0] == 400
