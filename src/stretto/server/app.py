"""The HTTP application: its routes, and what surrounds each request that works.

`build` is all that other packages call. Work and pages pass the same router, so middleware sees every
request. An error becomes OpenAI's error object: a response, or the last event of a stream that has begun.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route, Router, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from stretto.config import ServeConfig
from stretto.engine.client import EngineClient
from stretto.errors import StartError, StrettoError
from stretto.http.errors import NothingAt, error_response, internal, nothing_there
from stretto.http.exchange import KEY, Exchange, ExchangeLayer
from stretto.http.guard import Guard
from stretto.http.request import plain_path, read_body
from stretto.ladder.serving import ServedLadder
from stretto.protocol.parsing import require_json
from stretto.protocol.relay import FEEDBACK, NO_RESPONSES, PATHS, RELAY, OperationName, error_mark
from stretto.server.adapters.messages import count_tokens, create_message
from stretto.server.adapters.ollama import answers as ollama
from stretto.server.adapters.ollama.models import ModelPages, show
from stretto.server.adapters.ranking import rerank, score
from stretto.server.adapters.response_store import ResponseStore
from stretto.server.adapters.responses import Responses
from stretto.server.adapters.tokens import detokenize, tokenize
from stretto.server.embeddings import embed
from stretto.server.feedback.routes import FeedbackRoutes
from stretto.server.generation import CHAT, COMPLETION, Handler, generate, relay
from stretto.server.pages import Pages
from stretto.server.realtime import socket as realtime
from stretto.server.state import Call, GrammarCheck, Server, status_of
from stretto.telemetry import tracing
from stretto.telemetry.metrics import Ended
from stretto.text.tokenizer import TextModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A route that works: reads the body, runs the handler, and counts how the request ended."""

    name: str
    server: Server
    handler: Handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrival = time.monotonic()
        request = Request(scope, receive)
        call: Call | None = None
        failure: StrettoError | None = None
        client_gone = False
        exchange: Exchange = scope[KEY]
        try:
            tenant = exchange.tenant = self.server.tenant(request.headers)
            require_json(request.headers.get("content-type"))
            body = await read_body(request, self.server.config.max_body_bytes)
            exchange.bytes_in = len(body)
            call = Call(self.server, request, send, body, tenant, arrival)
            await call.run(self.handler)
        except ClientDisconnect:
            client_gone = True
        except asyncio.CancelledError:
            client_gone = True
            raise
        except Exception as error:
            failure = error if isinstance(error, StrettoError) else internal(error)
            if call is None or not call.streaming:
                raise failure from None
            ending = call.error_event(failure)
            if call.relayed:
                ending += error_mark(failure.code)
            await send({"type": "http.response.body", "body": ending})
        finally:
            if call is not None:
                call.client_gone = call.client_gone or client_gone
                exchange.ended = call.summary(self.name, failure)
            else:
                outcome = "client_gone" if failure is None else failure.code
                status = status_of(failure, exchange, client_gone=client_gone)
                exchange.ended = Ended(self.name, outcome, time.monotonic() - arrival, status=status)
            self.server.ended(exchange.ended)
            # The error holds this frame. Without the way back, it is freed at once, and the body with it.
            failure = None


class App(Starlette):
    """The ASGI application over one server."""

    def __init__(self, server: Server) -> None:
        responses = Responses(server, ResponseStore(server.config.response_store))
        feedback = FeedbackRoutes(server)
        work: dict[OperationName, Handler] = {
            "chat": partial(generate, operation=CHAT),
            "completions": partial(generate, operation=COMPLETION),
            "embeddings": embed,
            "messages": create_message,
            "count_tokens": count_tokens,
            "ollama_chat": ollama.chat,
            "ollama_generate": ollama.generate,
            "ollama_embed": ollama.embed,
            "ollama_embeddings": ollama.embedding,
            "ollama_show": show,
            "responses": responses.create,
            "retrieve_response": responses.retrieve_relayed,
            "delete_response": responses.delete_relayed,
            "score": score,
            "rerank": rerank,
            "tokenize": tokenize,
            "detokenize": detokenize,
        }
        routes = [
            Route(path, Endpoint(name, server, work[name]), methods=["POST"])
            for name, paths in PATHS.items()
            for path in paths
        ]
        routes.append(Route(FEEDBACK, Endpoint("feedback", server, feedback.give), methods=["POST"]))
        relayed = Endpoint("relay", server, partial(relay, operations=work | feedback.relayed()))
        routes.append(Route(RELAY, relayed, methods=["POST"]))
        pages = Pages(server).routes() + ModelPages(server).routes()
        sockets = [
            WebSocketRoute(realtime.PATH, realtime.RealtimeSockets(server)),
            WebSocketRoute(RELAY, realtime.RealtimeSockets(server, relayed=True)),
        ]
        absent = [Route(path, NothingAt(path)) for path in NO_RESPONSES]
        explained = [Route(realtime.PATH, realtime.explain)]
        super().__init__(
            routes=[*routes, *absent, *responses.routes(), *feedback.routes(), *pages, *sockets, *explained]
        )
        self.router.redirect_slashes = False
        self.router.default = nothing_there
        self.add_middleware(Guard, config=server.config, count=server.metrics.rejected)
        self.server = server
        self.tracer = tracing.connect(server.config.trace_endpoint, "stretto-worker")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "path" in scope:
            scope["path"] = plain_path(scope["path"])
        await super().__call__(scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        """The router, the middleware, and `ExchangeLayer` in place of Starlette's two layers for errors."""
        app: ASGIApp = _Work(self.router)
        for middleware, args, kwargs in reversed(self.user_middleware):
            app = middleware(app, *args, **kwargs)
        routes = [route for route in self.routes if isinstance(route, Route | WebSocketRoute)]
        return ExchangeLayer(app, routes, self.server.access_log, error_response, self.tracer)


class _Work:
    """The router, but for the routes that work: they have no parameters, so a table finds them at once."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._endpoints: dict[str, Endpoint] = {
            route.path: route.endpoint
            for route in router.routes
            if isinstance(route, Route)
            and isinstance(route.endpoint, Endpoint)
            and not route.param_convertors
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope["path"]) if scope.get("method") == "POST" else None
        if endpoint is None:
            await self._router(scope, receive, send)
            return
        scope["endpoint"] = endpoint
        await endpoint(scope, receive, send)


def build(
    config: ServeConfig,
    engine: EngineClient,
    models: dict[str, Path],
    check_grammar: GrammarCheck | None = None,
    ladders: Sequence[ServedLadder] = (),
) -> App:
    """The application for `models`, name -> checkpoint; the first one is the default.

    `ladders` stand before the models that are their variants: a client may name either. The variants have
    the tokenizer and the template of their top. `check_grammar(model, grammar, tenant)` raises InvalidGrammar
    for a grammar that does not compile. Reads each model's tokenizer; raises CheckpointError, and StartError
    for a tier with `min_quality` if a model was not measured.
    """
    _check_floors(config, models, ladders)
    texts: dict[str, TextModel] = {}
    above = {model.name: ladder for ladder in ladders for model in ladder.models.values()}
    for name, path in models.items():
        ladder = above.get(name)
        if ladder is None:
            texts[name] = TextModel(path)
        else:
            if ladder.name not in texts:
                texts[ladder.name] = TextModel(Path(ladder.top.path))
            texts[name] = texts[ladder.name]
    return App(Server(config, engine, texts, check_grammar, ladders))


def _check_floors(config: ServeConfig, models: Iterable[str], ladders: Sequence[ServedLadder]) -> None:
    floors = [name for name, objective in config.tiers.items() if objective.min_quality is not None]
    measured = {model.name for ladder in ladders for model in ladder.models.values()}
    unmeasured = [name for name in models if name not in measured]
    if floors and unmeasured:
        raise StartError(
            f"tiers.{floors[0]}: min_quality needs a ladder, and {unmeasured[0]} is a single model, whose"
            " quality was not measured: leave min_quality out, or serve ladders only"
        )
