"""A running server as tests ask it: over plain sockets and HTTP, nothing hidden by a client."""

from __future__ import annotations

import http.client
import json
import socket
import time
from typing import Any

CHAT = [{"role": "user", "content": "hello"}]


class Api:
    """Requests to ``server``; JSON in and out."""

    def __init__(self, server: Any) -> None:
        self.server, self.url = server, server.url
        self.port = int(server.url.split(":")[2].split("/")[0])

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body (parsed if it is JSON) and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, data, headers or {})
            reply = connection.getresponse()
            text = reply.read()
            found = {name.lower(): value for name, value in reply.getheaders()}
            is_json = found.get("content-type", "").startswith("application/json")
            return reply.status, json.loads(text) if is_json else text.decode(), found
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> tuple[int, Any, dict[str, str]]:
        return self.request("GET", path, None, {k.replace("_", "-"): v for k, v in headers.items()})

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, dict[str, str]]:
        given = {k.replace("_", "-"): v for k, v in headers.items()}
        return self.request("POST", path, body, given)

    def chat(self, **fields: Any) -> tuple[int, Any, dict[str, str]]:
        body = {"model": "tiny", "messages": CHAT, "max_tokens": 12, **fields}
        return self.post("/v1/chat/completions", body)

    def said(self, **fields: Any) -> str:
        """The text of a chat's one answer."""
        status, reply, _ = self.chat(**fields)
        assert status == 200, reply
        return reply["choices"][0]["message"]["content"]

    def refused(self, path: str = "/v1/chat/completions", **fields: Any) -> tuple[int, dict]:
        """Status and error object of a request that is refused."""
        if path.endswith("chat/completions"):
            status, reply, _ = self.chat(**fields)
        else:
            status, reply, _ = self.post(path, {"model": "tiny", **fields})
        assert set(reply) == {"error"}, reply
        assert set(reply["error"]) == {"message", "type", "param", "code"}
        return status, reply["error"]

    def events(self, path: str = "/v1/chat/completions", **fields: Any) -> list[Any]:
        """The events of a streamed reply, parsed but for ``[DONE]``."""
        with self.stream(path, **fields) as stream:
            return list(stream)

    def stream(self, path: str = "/v1/chat/completions", **fields: Any) -> Stream:
        body = {"model": "tiny", "stream": True, **fields}
        if path.endswith("chat/completions"):
            body = {"messages": CHAT, "max_tokens": 12, **body}
        return Stream(self.port, path, body)

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    @property
    def slots_used(self) -> int:
        """Slots of the cache in use, as the server tells it."""
        return int(self.metric("eepass_cache_slots_used"))

    def metric(self, name: str) -> float:
        _, text, _ = self.get("/metrics")
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        return float(line.split()[1])

    def wait_for(self, condition: Any, seconds: float = 30) -> None:
        """Fails where ``condition()`` does not become true."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, "it did not happen"
            time.sleep(0.01)


class Stream:
    """Events of one streamed reply, as they come; ``close`` hangs up."""

    def __init__(self, port: int, path: str, body: Any) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.connection.request("POST", path, json.dumps(body).encode())
        self.reply = self.connection.getresponse()
        self.status = self.reply.status

    def __iter__(self) -> Any:
        while line := self.reply.readline():
            if line.startswith(b"data: "):
                data = line[6:].strip()
                yield data.decode() if data == b"[DONE]" else json.loads(data)

    def close(self) -> None:
        self.reply.close()
        self.connection.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *details: Any) -> None:
        self.close()


def text_of(events: list[Any], index: int = 0) -> str:
    """The text of one choice in the events of a chat."""
    deltas = [choice for event in events if event != "[DONE]" for choice in event["choices"]]
    return "".join(d["delta"].get("content", "") for d in deltas if d["index"] == index)
