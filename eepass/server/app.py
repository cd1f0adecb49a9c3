"""The ASGI application of a server: its routes, behind the guards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from eepass.server.endpoint import Generate
from eepass.server.guards import Guards, Receive, Scope, Send
from eepass.server.metrics import TYPE, Metrics
from eepass.server.options import ServerOptions
from eepass.server.protocol import ChatBody, CompletionBody, ResponsesBody
from eepass.server.refusals import Refused
from eepass.server.replies import ChatReply, CompletionReply, Reply
from eepass.server.responses_reply import ResponsesReply
from eepass.server.served import ServedModel
from eepass.server.service import Service


class App:
    """Serves ``model`` within the limits of ``options``, as an ASGI application."""

    def __init__(self, model: ServedModel, options: ServerOptions) -> None:
        self.model, self.metrics = model, Metrics()
        self.service = Service(model, options)
        self.metrics.watch(self.service, model)
        self.guards = Guards(Router(self._routes()), options, self.metrics)
        self._started = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.guards(scope, receive, send)

    async def check(self) -> None:
        """Raises where the model does not decode, for supervisors that run Python."""
        await self.service.check()

    def _routes(self) -> list[Route]:
        model = self.model

        def chat(body: ChatBody) -> Reply:
            return ChatReply(model.name, model.token_text, _wants_usage(body))

        def completion(body: CompletionBody) -> Reply:
            return CompletionReply(model.name, model.token_text, _wants_usage(body))

        def response(body: ResponsesBody) -> Reply:
            return ResponsesReply(model.name, model.token_text, body)

        found = [
            Route("/health", _recorded(self._health)),
            Route("/metrics", _recorded(self._figures)),
            Route("/v1/models", _recorded(self._models)),
            Route("/v1/models/{name:path}", _recorded(self._one_model)),
        ]
        for path, kind, reply in (
            ("/v1/chat/completions", ChatBody, chat),
            ("/v1/completions", CompletionBody, completion),
            ("/v1/responses", ResponsesBody, response),
        ):
            found.append(Route(path, Generate(self.service, kind, reply), methods=["POST"]))
        return found

    async def _health(self, request: Request) -> Response:
        if self.service.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def _figures(self, request: Request) -> Response:
        return Response(await asyncio.to_thread(self.metrics.text), media_type=TYPE)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry]})

    async def _one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self.model.name:
            message = f"no such model; this is {self.model.name!r}"
            raise Refused(404, message, None, "model_not_found")
        return JSONResponse(self._entry)

    @property
    def _entry(self) -> dict[str, Any]:
        name, started = self.model.name, self._started
        return {"id": name, "object": "model", "created": started, "owned_by": "eepass"}


def _recorded(endpoint: Callable[[Request], Coroutine[Any, Any, Response]]) -> Any:
    """``endpoint``, its route in the record: paths of routes alone are counted by."""

    async def recorded(request: Request) -> Response:
        known: Route | None = request.scope.get("route")
        request.scope["eepass.record"].route = known.path if known else request.url.path
        return await endpoint(request)

    return recorded


def _wants_usage(body: ChatBody | CompletionBody) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)
