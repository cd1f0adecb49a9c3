"""``eepass.serve``: transformers' own OpenAI-compatible server over a model eepass decodes."""

from __future__ import annotations

import asyncio
import inspect
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from eepass.checkpoints.models import LoadedModel
from eepass.errors import InputError
from eepass.hf.generation import prepare
from eepass.hf.prepared import compile_now, forget_requests, is_prepared, refuse_length
from eepass.lengths import usual_length
from eepass.wrappers import original_inside

try:
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from transformers.cli.serve import Serve
    from transformers.cli.serving.utils import GenerateManager
except ImportError as error:  # fastapi, uvicorn, openai
    raise InputError(f"serving needs pip install 'eepass[serve]' ({error})") from error

STARTING_SECONDS = 30
# requests that are decoded together, at most; others wait for one of them to end
AT_ONCE = 16
# tokens of prompt and answer, where the model was not prepared
USUAL_TEXT = 4096
TEXT_PARTS = ("text", "input_text", "output_text")
# fields that transformers' server ignores though they change the answer, with their neutral values
NOT_HONOURED: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "functions": (None, []),
    "logprobs": (None, False, 0),
    "n": (None, 1),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "top_logprobs": (None, 0),
}


def serve(
    loaded: LoadedModel, host: str = "localhost", port: int = 8000, log_level: str = "error",
    warm_up: bool = True, remember: bool = False,
) -> Server:  # fmt: skip
    """Serve ``loaded`` by the OpenAI protocol at ``host``:``port``, in a thread of its own.

    The model's own ``generate`` answers; ``eepass.prepare`` it first to say how, and how long texts
    may get. Requests are decoded together, as many as have room in its cache, and each gets the
    answer it gets alone. Port 0 takes a free one. ``warm_up``:
    compile before the first request, not at it. ``remember``: let drafts repeat earlier requests,
    for a server whose requests are all one user's: how fast an answer comes would tell another user
    what was asked before. Raises ``InputError`` if the address is taken.
    """
    loaded = _servable(loaded)
    server = Server(loaded, host, port, log_level, remember)
    if warm_up:
        compile_now(loaded.model)
    server.listen()
    return server


def openai_app(loaded: LoadedModel) -> Any:
    """The same as an ASGI application, compiled, for other servers to run."""
    loaded = _servable(loaded)
    app = Server(loaded, "localhost", 0, "error").server.config.app
    compile_now(loaded.model)
    return app


def _servable(loaded: Any) -> LoadedModel:
    """``loaded`` with the model inside all wrappers; ``InputError`` where there is none that
    transformers' server could call."""
    if not isinstance(loaded, LoadedModel):
        raise InputError(f"serve: {type(loaded).__name__} is not what eepass.load returns")
    if loaded.transformed:
        raise InputError(
            f"{loaded.name} is a transformed folder, and serving wants the original model: serve "
            "that one, or decode the folder with eepass generate"
        )
    return replace(loaded, model=original_inside(loaded.model))


class Server(Serve):
    """``transformers.cli.serve.Serve`` with one fixed model, which it neither loads nor unloads."""

    def __init__(
        self, loaded: LoadedModel, host: str, port: int, log_level: str, remember: bool = False
    ) -> None:
        self._loaded = loaded
        if not is_prepared(loaded.model):
            longest = usual_length(loaded.model, USUAL_TEXT)
            prepare(loaded.model, loaded.artifact, max_length=longest)
        if not remember:
            forget_requests(loaded.model)
        super().__init__(host=host, port=port, log_level=log_level, non_blocking=True)

    def kill_server(self) -> None:
        """Stop listening; requests that have not begun are dropped."""
        self._together.stop()
        super().kill_server()

    @property
    def url(self) -> str:
        """The ``base_url`` of clients."""
        address = self.server.servers[0].sockets[0].getsockname()
        return f"http://{self.server.config.host}:{address[1]}/v1"

    def start_server(self) -> None:
        """Called by ``Serve`` when all is built: set the model, but do not listen yet."""
        manager: Any = self._model_manager
        generation: Any = self._generation_state
        loaded, self._together = self._loaded, Together()
        generation.get_manager = lambda *args, **kwargs: self._together
        manager.force_model = loaded.name
        manager.model_timeout = -1
        # called again after a reset; never looks for the model on a hub
        manager._load_model = lambda *args, **kwargs: loaded.model
        manager._load_processor = lambda *args, **kwargs: loaded.tokenizer
        entry = {"id": loaded.name, "object": "model", "created": 0, "owned_by": "eepass"}
        manager.get_gen_models = lambda *args, **kwargs: [entry]
        manager.load_model_and_processor(manager.process_model_name(loaded.name))
        for handler in (self._chat_handler, self._completion_handler, self._response_handler):
            _add_checks(handler)
        app: Any = self.server.config.app
        app.add_exception_handler(ValueError, _bad_request)

    def listen(self) -> None:
        """Start to accept requests."""
        config = self.server.config
        config.log_level = "warning"
        config.configure_logging()
        try:
            # tried beforehand: uvicorn would end its thread without an error here
            socket.create_server((config.host, config.port)).close()
        except OSError as error:
            raise InputError(
                f"cannot listen at {config.host}:{config.port} ({error.strerror}): choose another "
                "with port="
            ) from error
        super().start_server()
        until = time.monotonic() + STARTING_SECONDS
        while not self.server.started:
            if not self._thread.is_alive() or time.monotonic() > until:
                raise InputError(f"the server did not start at {config.host}:{config.port}")
            time.sleep(0.01)

    def wait(self) -> None:
        """Serve until interrupted."""
        try:
            self._thread.join()
        except KeyboardInterrupt:
            self.kill_server()


class Together(GenerateManager):
    """Runs each request's ``generate`` in a thread of its own, where transformers has one for all:
    the model's engine decodes them together."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(AT_ONCE, "eepass-request")

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        return self._threads.submit(fn, *args, **kwargs)

    def async_submit(
        self, fn: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._threads, partial(fn, *args, **kwargs))

    def stop(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _add_checks(handler: Any) -> None:
    """Make a handler refuse what it would ignore or fail at, and sample where a request says so.

    What a stream cannot do is refused before the stream begins, while a status can still be sent.
    """
    validate, build = handler._validate_request, handler._build_generation_config
    streaming = handler._streaming
    fields = handler._valid_params_class.__annotations__

    def validate_request(body: dict[str, Any]) -> None:
        validate(body)
        _refuse_body(body, fields)

    def build_generation_config(body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if body.get("logit_bias"):
            bias = {token: float(value) for token, value in body["logit_bias"].items()}
            body = {**body, "logit_bias": bias}
        config = build(body, *args, **kwargs)
        if body.get("temperature") or (body.get("top_p") or 1) < 1:
            config.do_sample = body.get("temperature") != 0
        # in torch's global generator it could be another request's by the time this one is decoded
        config.seed = body.get("seed")
        return config

    def begin_streaming(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(streaming).bind(*args, **kwargs).arguments
        new = given["gen_config"].max_new_tokens
        refuse_length(given["model"], given["inputs"]["input_ids"].shape[-1] + new)
        return streaming(*args, **kwargs)

    handler._validate_request = validate_request
    handler._build_generation_config = build_generation_config
    handler._streaming = begin_streaming


def _refuse_body(body: dict[str, Any], fields: Mapping[str, Any]) -> None:
    for name, nothing in NOT_HONOURED.items():
        if body.get(name) not in nothing:
            raise InputError(f"{name}={body[name]!r}: this server cannot; leave it out")
    for name, least, most in (("temperature", 0, 100), ("top_p", 0, 1), ("seed", 0, 2**63 - 1)):
        value = body.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and least <= value <= most):
            raise InputError(f"{name}={value!r}: must be a number from {least} to {most}")
    if "messages" in fields:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise InputError(
                "messages: a list of at least one {'role': ..., 'content': text}; this server "
                "reads no other parts"
            )
    if "input" in fields and not body.get("input"):
        raise InputError("input: the text to answer")


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if isinstance(content, list):
        return all(
            isinstance(part, dict)
            and part.get("type") in TEXT_PARTS
            and isinstance(part.get("text"), str)
            for part in content
        )
    return isinstance(content, str) or (content is None and "tool_calls" in message)


async def _bad_request(request: Request, error: Exception) -> JSONResponse:
    body = {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": body}, status_code=400)
