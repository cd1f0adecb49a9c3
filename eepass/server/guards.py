"""What stands before the routes: who may ask, how much, and one shape for every error."""

from __future__ import annotations

import hmac
import ipaddress
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

from eepass.errors import EngineError, InputError
from eepass.server.metrics import Metrics
from eepass.server.options import ServerOptions
from eepass.server.records import Record, logger
from eepass.server.refusals import ClientGone, Refused

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# bodies that are being read, of all clients together, in multiples of the largest one
BODIES_AT_ONCE = 32
OPEN_ROUTES = ("/health",)
PREFLIGHT = [
    (b"access-control-allow-methods", b"GET, POST"),
    (b"access-control-allow-headers", b"authorization, content-type"),
    (b"access-control-max-age", b"600"),
]
REASONS = {404: "no such route", 405: "no such method for this route"}


class Guards:
    """An ASGI application around another: checks each request, answers errors, keeps records."""

    def __init__(self, app: App, options: ServerOptions, metrics: Metrics) -> None:
        self.app, self.options, self.metrics = app, options, metrics
        self._hosts = {"localhost", "127.0.0.1", "::1", options.host.strip("[]").lower()}
        self._hosts |= {host.strip("[]").lower() for host in options.allow_host}
        self._key = None if options.api_key is None else f"Bearer {options.api_key}".encode()
        # bytes of bodies that are being read
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = scope["eepass.record"] = Record(scope["method"])
        # exceptions of routing come here
        scope["app"] = self
        answer, body = _Sending(send, record), _Received(self, receive)
        try:
            await self._checked(scope, body, answer)
        except ClientGone:
            record.code = "client_gone"
        except Exception as error:
            await answer.refuse(_refusal(error, record))
        finally:
            body.release()
            self.metrics.count(record)
            record.log()

    async def _checked(self, scope: Scope, body: _Received, answer: _Sending) -> None:
        headers = {name: value for name, value in scope["headers"]}
        host = self._check_host(headers.get(b"host", b"").decode("latin-1"))
        origin = headers.get(b"origin")
        if origin is not None:
            self._check_origin(origin.decode("latin-1"), host)
            answer.headers += [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]
            if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                await answer.send_all(204, b"", PREFLIGHT)
                return
        if scope["path"] not in OPEN_ROUTES:
            self._check_key(headers.get(b"authorization", b""))
        stated = headers.get(b"content-length", b"")
        body.check(int(stated) if stated.isdigit() else 0)
        await self.app(scope, body, answer)

    def _check_host(self, host: str) -> str:
        """Refuse names that this server is not known by: a web page can have any name resolve to
        this machine, but not choose another Host header."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            name = ""
        known = name in self._hosts or "*" in self._hosts
        if not known and not (_is_address(name) and not self.options.is_loopback):
            message = f"Host {host[:100]!r} is not served: start with --allow-host NAME to allow it"
            raise Refused(403, message, None, "unknown_host")
        return host

    def _check_origin(self, origin: str, host: str) -> None:
        allowed = self.options.allow_origin
        own = origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())
        if not own and origin not in allowed and "*" not in allowed:
            message = f"pages of {origin[:100]!r} may not ask: start with --allow-origin to allow"
            raise Refused(403, message, None, "unknown_origin")

    def _check_key(self, given: bytes) -> None:
        if self._key is not None and not hmac.compare_digest(given, self._key):
            message = "a key is needed: send it as 'Authorization: Bearer KEY'"
            challenge = {"www-authenticate": "Bearer"}
            raise Refused(401, message, None, "invalid_api_key", challenge)


class _Received:
    """``receive`` of a body that is refused as soon as it is too large."""

    def __init__(self, guards: Guards, receive: Receive) -> None:
        self._guards, self._receive = guards, receive
        self._most, self._size = guards.options.max_body_bytes, 0

    async def __call__(self) -> Message:
        message = await self._receive()
        received = len(message.get("body", b""))
        self._size += received
        self._guards.held += received
        self.check(self._size)
        if not message.get("more_body"):
            self.release()
        return message

    def check(self, size: int) -> None:
        if size > self._most:
            raise Refused(413, f"the body has more than {self._most} bytes", None, "body_too_large")
        if self._guards.held > BODIES_AT_ONCE * self._most:
            raise Refused(429, "too many bodies at once: try again", None, "rate_limit_exceeded")

    def release(self) -> None:
        """The body has been read, or will not be."""
        self._guards.held -= self._size
        self._size = 0


class _Sending:
    """``send`` that notes the status, adds headers, and knows whether an answer has begun."""

    def __init__(self, send: Send, record: Record) -> None:
        self._send, self.record = send, record
        self.begun = self.complete = False
        self.headers = [(b"x-request-id", record.id.encode())]

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun, self.record.status = True, message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self.headers]}
        else:
            self.complete = not message.get("more_body")
        await self._send(message)

    async def send_all(self, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        length = [(b"content-length", str(len(body)).encode())]
        await self({"type": "http.response.start", "status": status, "headers": length + headers})
        await self({"type": "http.response.body", "body": body})

    async def refuse(self, refused: Refused) -> None:
        """Answer with an error; after an answer that has begun, the connection is closed."""
        self.record.code = refused.code
        if self.begun:
            return
        extra = [(name.encode(), value.encode()) for name, value in refused.headers.items()]
        headers = [(b"content-type", b"application/json"), *extra]
        await self.send_all(refused.status, refused.encoded, headers)


def _refusal(error: Exception, record: Record) -> Refused:
    if isinstance(error, Refused):
        return error
    if isinstance(error, HTTPException):
        message = REASONS.get(error.status_code, error.detail)
        return Refused(error.status_code, message, headers=error.headers)
    log_failure(error, record)
    return failure(record)


def failure(record: Record) -> Refused:
    """What a client is told of a fault in the server."""
    return Refused(500, f"the server failed; its log says more under {record.id}", None, "failed")


def log_failure(error: BaseException, record: Record) -> None:
    """The error's type and place, as what it says could quote a prompt; where it is meant for who
    runs the server, what it says."""
    if isinstance(error, (InputError, EngineError)):
        logger.error("%s failed: %s", record.id, error)
        return
    place = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s failed: %s\n%s", record.id, type(error).__name__, place.rstrip())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
