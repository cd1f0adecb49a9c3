"""``eepass.serve``: a model served by the OpenAI protocol, in a thread of this process."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import uvicorn

from eepass.checkpoints.models import LoadedModel
from eepass.errors import InputError
from eepass.server.app import App
from eepass.server.options import ServerOptions
from eepass.server.records import log_to_stderr, logger
from eepass.server.served import ServedModel
from eepass.server.sockets import protocol_for

KEY_VARIABLE = "EEPASS_API_KEY"
STARTING_SECONDS = 30.0
# for what is sent last to reach clients
CLOSING_SECONDS = 1
# a connection without a request is closed after as many seconds
IDLE_SECONDS = 30


def serve(
    loaded: LoadedModel, host: str = "127.0.0.1", port: int = 8000, log_level: str = "error",
    warm_up: bool = True, remember: bool = False, **options: Any,
) -> Server:  # fmt: skip
    """Serve ``loaded`` by the OpenAI protocol at ``host``:``port``, in a thread of its own.

    Requests are decoded together, as many as have room in the cache, and each gets the answer it
    gets alone. Port 0 takes a free one. ``warm_up``: compile before the first request, not at it.
    ``remember``: let drafts repeat earlier requests, for a server whose requests are all one
    user's: how fast an answer comes would tell another user what was asked before. ``options`` are
    those of ``eepass.server.options.ServerOptions``: limits, times, a key (by default that in
    ``EEPASS_API_KEY``), hosts. A prepared model decodes as ``eepass.prepare`` said. Raises
    ``InputError`` for what cannot be served, and if the address is taken.
    """
    given = {"host": host, "port": port, "log_level": log_level, "warm_up": warm_up}
    return serve_with(loaded, ServerOptions.of({**given, "remember": remember, **options}))


def serve_with(loaded: LoadedModel, options: ServerOptions) -> Server:
    """As ``serve``."""
    options = _with_key(options)
    log_to_stderr(options.log_level)
    # beforehand: a model takes long to make ready
    listener = _listen(options)
    try:
        model = ServedModel(loaded, options)
        if options.warm_up:
            model.warm_up()
        if not (options.is_loopback or options.api_key):
            logger.warning(
                "listening at %s without a key: whoever reaches it may ask; set %s",
                options.host, KEY_VARIABLE,
            )  # fmt: skip
        return Server(model, options, listener)
    except BaseException:
        # also on Ctrl-C: nobody else knows of the socket
        listener.close()
        raise


def openai_app(loaded: LoadedModel, **options: Any) -> App:
    """The same as an ASGI application, compiled, for other servers to run; ``await app.check()``
    tells a supervisor whether the model decodes."""
    found = _with_key(ServerOptions.of(options))
    log_to_stderr(found.log_level)
    model = ServedModel(loaded, found)
    if found.warm_up:
        model.warm_up()
    return App(model, found)


class Server:
    """A server that listens, in a thread of its own; ``kill_server`` ends it."""

    def __init__(self, model: ServedModel, options: ServerOptions, listener: socket.socket) -> None:
        self.model, self.options = model, options
        self.app = App(model, options)
        for name in ("uvicorn.error", "uvicorn.asgi"):
            # the log of requests says it, and in its own form
            logging.getLogger(name).setLevel(logging.CRITICAL)
        config = uvicorn.Config(
            self.app, http=protocol_for(options), ws="none", lifespan="off", log_config=None,
            access_log=False, proxy_headers=False, server_header=False,
            timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=CLOSING_SECONDS,
        )  # fmt: skip
        self._server, self._port = uvicorn.Server(config), listener.getsockname()[1]
        self._ready, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(listener,), name="eepass-server", daemon=True
        )
        self._thread.start()
        if not self._ready.wait(STARTING_SECONDS):
            raise InputError(f"the server did not start at {options.host}:{self._port}")

    @property
    def url(self) -> str:
        """The ``base_url`` of clients."""
        host = f"[{self.options.host}]" if ":" in self.options.host else self.options.host
        return f"http://{host}:{self._port}/v1"

    def join(self) -> None:
        """Wait until it has ended; interrupted by what signals raise."""
        # a thread that is joined when a signal raises passes for ended (Python 3.11)
        self._ended.wait()

    def wait(self) -> None:
        """Serve until Ctrl-C or SIGTERM; answers that run may still end."""
        with _interrupted_by_sigterm(), suppress(KeyboardInterrupt):
            self.join()
        self.kill_server()

    def kill_server(self, seconds: float | None = None) -> None:
        """Refuse new requests, let running answers end for ``seconds`` (``stop_timeout`` unless
        given), end what is left, and stop listening."""
        if self._ended.is_set():
            return
        seconds = self.options.stop_timeout if seconds is None else seconds
        draining = asyncio.run_coroutine_threadsafe(self.app.service.drain(seconds), self._loop)
        try:
            draining.result()
        finally:
            self._server.should_exit = True
            self._ended.wait()
            self._thread.join()

    def _run(self, listener: socket.socket) -> None:
        try:
            asyncio.run(self._serve(listener))
        finally:
            self._ended.set()

    async def _serve(self, listener: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        # the socket listens already: who connects before the server runs is served a moment later
        self._loop.call_soon(self._ready.set)
        await self._server.serve(sockets=[listener])


def _with_key(options: ServerOptions) -> ServerOptions:
    return replace(options, api_key=options.api_key or os.environ.get(KEY_VARIABLE) or None)


def _listen(options: ServerOptions) -> socket.socket:
    host, port = options.host.strip("[]"), options.port
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise InputError(
            f"cannot listen at {host}:{port} ({error.strerror}): choose another with port="
        ) from error


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM raises ``KeyboardInterrupt``, unless the program handles it itself."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
