"""The outermost layer around the application: the id of each HTTP request, and the line of the access log.

The id is the client's `x-request-id` if that is a plain token, and otherwise a new one. It is in every
response and in every log line of the request, and the engine gets it with each sequence.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from secrets import token_hex
from typing import Any

from msgspec import json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stretto.statistics import quantile
from stretto.telemetry.access import Access
from stretto.telemetry.log import LineWriter, request_id, timestamp
from stretto.telemetry.metrics import Ended
from stretto.telemetry.tracing import Tracer, TraceSpan, attributes_of, parent_of, stages_of

HEADER = b"x-request-id"
TOKEN = re.compile(rb"[A-Za-z0-9._~+/=:@-]{1,64}")
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
LEFT = 499  # in logs and metrics: the client left before a response
SWITCHED = 101  # the status of a WebSocket
STARTS = ("http.response.start", "websocket.accept", "websocket.http.response.start")
KEY = "stretto.exchange"  # of an Exchange in the ASGI scope
WRITE = "stretto.write"  # of `RequestCycle.write` in the ASGI scope
WATCH = "stretto.watch"  # of `RequestCycle.watch` in it
ErrorAnswer = Callable[[Request, Exception], Awaitable[Response]]
encode = json.Encoder().encode


@dataclass(slots=True)
class Exchange:
    """One HTTP request and its response. Whoever answers the request fills in what it learns.

    Called with an ASGI message, it sends the message on, after adding the id and the `extra` headers to the
    headers of the response.
    """

    id: str
    onward: Send
    arrival: float = field(default_factory=time.monotonic)
    tenant: str | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    status: int | None = None
    outcome: str = "ok"
    extra: Sequence[tuple[bytes, bytes]] = ()
    ended: Ended | None = None
    span: TraceSpan | None = None  # None: traces are off

    def __call__(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.body":
            self.bytes_out += len(message.get("body", b""))
        elif message["type"] in STARTS:
            self.status = message.get("status", SWITCHED)
            message["headers"] = [*message.get("headers", ()), (HEADER, self.id.encode()), *self.extra]
        elif message["type"] == "websocket.send":
            self.bytes_out += len(message.get("bytes") or message.get("text") or b"")
        return self.onward(message)


def watch(scope: Scope, receive: Receive, gone: Callable[[], None]) -> Callable[[], object]:
    """Has `gone` called once the client has left. The body must have been read. Returns what ends that."""
    watching: Callable[[Callable[[], None] | None], None] | None = scope.get(WATCH)
    if watching is None:
        return asyncio.create_task(_watch(receive, gone)).cancel
    watching(gone)  # without the 15 us that a task takes
    return partial(watching, None)


async def _watch(receive: Receive, gone: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    gone()


def id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's id if it is a token of at most 64 characters, else a new one."""
    for name, value in headers:
        if name == HEADER and TOKEN.fullmatch(value):
            return value.decode()
    return token_hex(12)


def method_of(scope: Scope) -> str:
    """The method, GET for a WebSocket, or `other` for one that nobody knows."""
    return method if (method := scope.get("method", "GET")) in METHODS else "other"


class ExchangeLayer:
    """Wraps the application. Without `log` there is no access log, and without `tracer` there are no traces.

    `answer` makes the response to an error that the application raised. It takes the place of Starlette's
    layers for errors, each of which costs time for each token.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Sequence[Route | WebSocketRoute],
        log: LineWriter | None,
        answer: ErrorAnswer,
        tracer: Tracer | None = None,
    ) -> None:
        self._app = app
        self._log = log
        self._tracer = tracer
        self._answer = answer
        self._templates: dict[tuple[Callable[..., Any] | None, bool], str] = {
            (route.endpoint, "{" in route.path): route.path for route in routes
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = scope[KEY] = Exchange(id_of(scope["headers"]), send)
        request_id.set(exchange.id)  # each request has a task, and so a context, of its own
        if self._tracer is not None:
            parent = parent_of(scope["headers"])
            # Those that only look come many times a second.
            if parent is not None or method_of(scope) == "POST":
                exchange.span = self._tracer.request(method_of(scope), parent)
        try:
            await self._app(scope, receive, exchange)
        except Exception as error:
            if exchange.status is not None:
                raise
            # A refused handshake gets an HTTP response, which Starlette sends in messages of the socket.
            request = Request(
                scope if scope["type"] == "http" else {**scope, "type": "http", "method": "GET"}
            )
            response = await self._answer(request, error)
            await response(scope, receive, exchange)
        finally:
            if self._log is not None:
                self._log.write(encode(self._line(exchange, scope)))
            if exchange.span is not None:
                self._trace(exchange.span, exchange, scope)

    def _route(self, scope: Scope) -> str | None:
        return self._templates.get((scope.get("endpoint"), bool(scope.get("path_params"))))

    def _trace(self, span: TraceSpan, exchange: Exchange, scope: Scope) -> None:
        """Ends the span of a request, with a span for each of its stages."""
        ended, status = exchange.ended, LEFT if exchange.status is None else exchange.status
        outcome = exchange.outcome
        attributes: dict[str, str | int | float | bool] = {
            "http.request.method": method_of(scope),
            "http.route": self._route(scope) or "",
            "http.response.status_code": status,
            "stretto.request_id": exchange.id,
            "stretto.tenant": exchange.tenant or "",
        }
        if ended is not None:
            outcome = ended.outcome or outcome
            attributes |= attributes_of(ended)
            for stage in stages_of(ended):
                span.stage(stage)
        span.end(attributes, "" if outcome == "ok" else outcome)

    def _line(self, exchange: Exchange, scope: Scope) -> Access:
        ended = exchange.ended or Ended("", "", 0.0)
        gaps = ended.gaps
        return Access(
            time=timestamp(time.time()),
            request_id=exchange.id,
            tenant=exchange.tenant,
            method=method_of(scope),
            route=self._route(scope),
            model=ended.model or None,
            tier=ended.tier or None,
            variant=ended.variant or None,
            status=LEFT if exchange.status is None else exchange.status,
            outcome=ended.outcome or exchange.outcome,
            finish_reason=ended.finish_reason,
            queue_ms=_ms(ended.queued),
            ttft_ms=_ms(ended.first),
            itl_p99_ms=_ms(quantile(sorted(gaps), 0.99) if gaps else None),
            total_ms=round((time.monotonic() - exchange.arrival) * 1e3, 3),
            prompt_tokens=ended.prompt_tokens,
            cached_tokens=ended.cached_tokens,
            completion_tokens=ended.output_tokens,
            bytes_in=exchange.bytes_in,
            bytes_out=exchange.bytes_out,
        )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
