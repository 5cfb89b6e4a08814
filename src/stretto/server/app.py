"""The HTTP application: routes, and the life of one request around its handler.

`build` is all that other packages call. A handler gets a Call and answers it; what it raises becomes an error
in OpenAI's shape: a response, or the last event of a stream that has begun.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from msgspec import json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from stretto.config import ServeConfig
from stretto.errors import NotFound, StrettoError, Unauthorised, WrongMethod
from stretto.protocol.openai import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    ModelCard,
    ModelList,
    Status,
)
from stretto.server import asgi, assets, embeddings, generation, openapi, validation
from stretto.server.objectives import DEFAULT, tier_of
from stretto.server.request_metrics import account
from stretto.server.state import Check, Engine, Front, Run
from stretto.text.tokenizer import TextModel

T = TypeVar("T")
CHAT = json.Decoder(ChatRequest)
COMPLETION = json.Decoder(CompletionRequest)
EMBEDDING = json.Decoder(EmbeddingRequest)
LIVE_S = 0.5


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request at its handler. `arrival` is monotonic: every deadline counts from it."""

    front: Front
    run: Run
    arrival: float
    tenant: str
    scope: Scope
    body: bytes
    send: Send

    def parse(self, decoder: json.Decoder[T]) -> T:
        return asgi.parse(decoder, self.scope, self.body)


Handler = Callable[[Call], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A route that works: reads the body, watches the client, answers errors, counts the end."""

    name: str
    front: Front
    handler: Handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrival = time.monotonic()
        run = Run(self.front)
        failure: StrettoError | None = None
        try:
            tenant = asgi.tenant(scope, self.front.config.api_keys)
            body = await asgi.read_body(scope, receive, self.front.config.max_body_bytes)
            await self._answer(Call(self.front, run, arrival, tenant, scope, body, send), receive)
        except asgi.ClientGone:
            run.gone = True
        except asyncio.CancelledError:
            run.gone = True
            raise
        except Exception as error:
            failure = error if isinstance(error, StrettoError) else asgi.internal(error)
            await _tell(run, send, failure)
        finally:
            self.front.ended(account(run, self.name, failure, time.monotonic() - arrival))

    async def _answer(self, call: Call, receive: Receive) -> None:
        watch = asyncio.create_task(_end_when_left(receive, call.run))
        try:
            with call.run:
                await self.handler(call)
        finally:
            watch.cancel()


async def _end_when_left(receive: Receive, run: Run) -> None:
    await asgi.left(receive)
    run.end(None)


async def _tell(run: Run, send: Send, error: StrettoError) -> None:
    if run.streaming:
        await send({"type": "http.response.body", "body": asgi.error_event(error)})
    else:
        await asgi.refuse(send, error)


async def _chat(call: Call) -> None:
    request = call.parse(CHAT)
    call.run.asks(request.model, tier_of(request))
    job = await validation.chat(call.front, request, len(call.body))
    await generation.generate(call.front, call.run, job, call.tenant, call.arrival, call.send)


async def _completion(call: Call) -> None:
    request = call.parse(COMPLETION)
    call.run.asks(request.model, tier_of(request))
    job = await validation.completion(call.front, request, len(call.body))
    await generation.generate(call.front, call.run, job, call.tenant, call.arrival, call.send)


async def _embedding(call: Call) -> None:
    request = call.parse(EMBEDDING)
    call.run.asks(request.model, DEFAULT)
    caller = call.tenant, call.arrival
    await embeddings.embed(call.front, call.run, request, len(call.body), caller, call.send)


@dataclass(frozen=True, slots=True)
class Pages:
    """The routes that only report."""

    front: Front

    def _json(self, value: object) -> Response:
        return Response(json.encode(value), media_type="application/json")

    async def health(self, request: Request) -> Response:
        return self._json(Status("ok"))

    async def ready(self, request: Request) -> Response:
        self.front.ensure_open(0)
        return self._json(Status("ready"))

    async def metrics(self, request: Request) -> Response:
        return Response(self.front.metrics.text(), media_type=self.front.metrics.content_type)

    async def state(self, request: Request) -> Response:
        asgi.tenant(request.scope, self.front.config.api_keys)
        return self._json(self.front.state())

    async def live(self, request: Request) -> Response:
        """Server-sent events: the recent past, a few times a second until the server drains."""
        asgi.tenant(request.scope, self.front.config.api_keys)
        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(self._snapshots(), media_type="text/event-stream", headers=headers)

    async def _snapshots(self) -> AsyncIterator[bytes]:
        front = self.front
        while not front.draining:
            engine = front.engine
            now = front.recent.snapshot(running=len(front.runs), restarts=engine.restarts, ready=engine.ready)
            yield b"data: " + json.encode(now) + b"\n\n"
            await asyncio.sleep(LIVE_S)

    async def openapi(self, request: Request) -> Response:
        return self._json(openapi.document())

    def page(self, request: Request) -> Response:
        """The page at `/`, and what it is made of below `/page/`. In a thread: the first call packs."""
        found = assets.asset(request.path_params.get("name", "index.html"))
        if found is None:
            raise NotFound(f"there is nothing at {request.url.path}")
        headers = assets.HEADERS | {"Cache-Control": found.caching, "ETag": found.tag}
        if request.headers.get("if-none-match") == found.tag:
            return Response(status_code=304, headers=headers)
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(found.plain, media_type=found.kind, headers=headers)
        headers["Content-Encoding"] = "gzip"
        return Response(found.packed, media_type=found.kind, headers=headers)

    async def models(self, request: Request) -> Response:
        asgi.tenant(request.scope, self.front.config.api_keys)
        return self._json(ModelList(data=[self._card(name) for name in self.front.texts]))

    async def model(self, request: Request) -> Response:
        asgi.tenant(request.scope, self.front.config.api_keys)
        name, _ = self.front.model(request.path_params["name"])
        return self._json(self._card(name))

    def _card(self, name: str) -> ModelCard:
        info = self.front.engine.models.get(name)
        context = None if info is None else info.context
        return ModelCard(id=name, created=self.front.created, max_model_len=context)


async def _refused(request: Request, error: Exception) -> Response:
    """Errors of the router and of `Pages`, in the shape of every other."""
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        path, method = request.url.path, request.method
        headers = dict(error.headers or {})
        if error.status_code == WrongMethod.status:
            error = WrongMethod(f"{path} does not take {method}; it takes {headers.get('Allow', 'others')}")
        else:
            error = NotFound(f"there is nothing at {path}")
    assert isinstance(error, StrettoError)
    if error.retry_after is not None:
        headers["Retry-After"] = str(asgi.whole_seconds(error.retry_after))
    if isinstance(error, Unauthorised):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(json.encode(error.body()), error.status, headers=headers, media_type="application/json")


def build(config: ServeConfig, engine: Engine, models: dict[str, Path], check: Check | None = None) -> App:
    """The application for `models`, name -> checkpoint; the first one is the default.

    `check(model, grammar)` raises InvalidGrammar for one that does not compile. Reads each model's tokenizer;
    raises CheckpointError.
    """
    texts = {name: TextModel(path) for name, path in models.items()}
    return App(Front(config, engine, texts, check))


class App:
    """The ASGI application, and its one `front`."""

    def __init__(self, front: Front) -> None:
        self.front = front
        pages = Pages(front)
        self._work = {
            "/v1/chat/completions": Endpoint("chat", front, _chat),
            "/v1/completions": Endpoint("completions", front, _completion),
            "/v1/embeddings": Endpoint("embeddings", front, _embedding),
        }
        self._app = Starlette(
            routes=[
                *(Route(path, endpoint, methods=["POST"]) for path, endpoint in self._work.items()),
                Route("/v1/models", pages.models),
                Route("/v1/models/{name:path}", pages.model),
                Route("/", pages.page),
                Route("/page/{name}", pages.page),
                Route("/openapi.json", pages.openapi),
                Route("/health", pages.health),
                Route("/ready", pages.ready),
                Route("/state", pages.state),
                Route("/live", pages.live),
                Route("/metrics", pages.metrics),
            ],
            exception_handlers={HTTPException: _refused, StrettoError: _refused},
        )
        self._app.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Work goes past the router, whose wrappers would be run for every token.
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self._work:
            await self._work[scope["path"]](scope, receive, send)
        else:
            await self._app(scope, receive, send)
