"""The HTTP side of the gateway: OpenAI's paths for clients, and paths for workers and operators."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hmac import compare_digest
from random import Random

import msgspec
from msgspec import Struct, json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from stretto.errors import (
    InvalidRequest,
    NotFound,
    StrettoError,
    TooLarge,
    Unauthorised,
    Unavailable,
    WrongMethod,
)
from stretto.gateway.registry import Registry, Worker
from stretto.gateway.relay import PATHS, Relay, RelayedExchange
from stretto.gateway.router import Router
from stretto.gateway.settings import GatewayConfig
from stretto.protocol.http import plain_path, tenant_of
from stretto.protocol.openai import ModelCard, ModelList, Status
from stretto.protocol.parsing import JSON, parse, require_json
from stretto.protocol.relay import OperationName

log = logging.getLogger(__name__)
LOCAL = "local"
LEASE_S = 10.0  # a worker that joined by itself must renew within


class Joining(Struct, forbid_unknown_fields=True):
    """The body with which a worker joins."""

    url: str
    site: str = ""


class WorkerRow(Struct, frozen=True):
    """A worker in `/state`."""

    name: str
    site: str
    usable: bool
    draining: bool
    breaker: str
    error: str
    active: int
    round_trip_ms: float
    models: list[str]
    plain: bool


class GatewayState(Struct, frozen=True):
    """The answer of `/state`."""

    workers: list[WorkerRow]
    route: str
    active: int
    failovers: int
    retries: int
    hedges: int
    hedges_won: int


@dataclass(frozen=True, slots=True)
class RelayedPath:
    """A path that is relayed to a worker."""

    gateway: Gateway
    operation: OperationName

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrival = time.monotonic()
        request = Request(scope, receive)
        client = _Client(send)
        try:
            tenant = self.gateway.tenant(request)
            body = await _read(request, self.gateway.config.max_body_bytes)
            try:
                msgspec.json.decode(body, type=dict)
            except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
                raise InvalidRequest(f"the body is not a JSON object: {error}") from error
            exchange = RelayedExchange(self.operation, tenant, body, arrival, client.send)
            await self.gateway.run(exchange, receive)
        except ClientDisconnect:
            return
        except Exception as error:
            failure = error if isinstance(error, StrettoError) else _internal(error)
            if not client.started:
                raise failure from None
            await client.send(0, {}, b"data: " + json.encode(failure.body()) + b"\n\n", False)


class _Client:
    """The client's side of one exchange."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def send(self, status: int, headers: Mapping[str, str], body: bytes, more: bool) -> None:
        if not self.started:
            self.started = True
            pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
            if not more:
                pairs.append((b"content-length", str(len(body)).encode()))
            await self._send({"type": "http.response.start", "status": status, "headers": pairs})
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


class Gateway(Starlette):
    """The ASGI application of one gateway. It keeps no state that another one would need."""

    def __init__(self, config: GatewayConfig, seed: int | None = None) -> None:
        random = Random(seed)
        self.config = config
        headers = {"Authorization": f"Bearer {config.gateway_key}"} if config.gateway_key else {}
        self.registry = Registry(Router(config.route, random.randrange), headers)
        self.relay = Relay(self.registry, config.hedge_share)
        self.active: set[asyncio.Task[None]] = set()
        self.draining = False
        work = [Route(path, RelayedPath(self, name), methods=["POST"]) for name, path in PATHS.items()]
        pages = [
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/state", self.state_page),
            Route("/v1/workers", self.join, methods=["POST"]),
            Route("/v1/workers/{name}", self.leave, methods=["DELETE"]),
            Route("/v1/workers/{name}/{change}", self.drain, methods=["POST"]),
        ]
        super().__init__(
            routes=work + pages,
            exception_handlers={HTTPException: _error_response, StrettoError: _error_response},
            lifespan=_lifespan,
        )
        self.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "path" in scope:
            scope["path"] = plain_path(scope["path"])
        await super().__call__(scope, receive, send)

    def tenant(self, request: Request) -> str:
        """The tenant of a request's key. Raises Unauthorised."""
        keys = self.config.api_keys
        if not keys:
            return LOCAL
        return tenant_of(request.headers, keys)

    async def run(self, exchange: RelayedExchange, receive: Receive) -> None:
        """Relays one request until it is answered or its client leaves. Raises StrettoError."""
        if self.draining:
            raise Unavailable("the gateway is shutting down; ask another one", retry_after=1.0)
        work = asyncio.create_task(self.relay.run(exchange))
        watch = asyncio.create_task(_gone(receive))
        self.active.add(work)
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return
            work.result()
        finally:
            self.active.discard(work)
            watch.cancel()
            work.cancel()

    async def models(self, request: Request) -> Response:
        """The models of all workers."""
        self.tenant(request)
        known = {
            name: None if info is None else info.context
            for worker in self.registry.workers.values()
            for name, info in worker.models.items()
        }
        cards = [ModelCard(id=name, created=0, max_model_len=context) for name, context in known.items()]
        return _json(ModelList(data=cards))

    async def health(self, request: Request) -> Response:
        """Whether the process is alive."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether any worker can take a request."""
        if self.draining or not any(worker.view.usable for worker in self.registry.workers.values()):
            raise Unavailable("no worker is ready; try again soon", retry_after=1.0)
        return _json(Status())

    async def state_page(self, request: Request) -> Response:
        """The workers, and what the gateway has done."""
        self.tenant(request)
        now, relay = time.monotonic(), self.relay
        return _json(
            GatewayState(
                workers=[_row(worker, now) for worker in self.registry.workers.values()],
                route=self.config.route,
                active=len(self.active),
                failovers=relay.failovers,
                retries=relay.retries,
                hedges=relay.hedges,
                hedges_won=relay.hedges_won,
            )
        )

    async def join(self, request: Request) -> Response:
        """A worker joins, or renews its lease."""
        self._ensure_operator(request)
        require_json(request.headers.get("content-type"))
        joining = parse(json.Decoder(Joining), await request.body())
        worker = self.registry.join(joining.url, joining.site, lease=time.monotonic() + LEASE_S)
        return _json({"name": worker.name, "lease_s": LEASE_S})

    async def leave(self, request: Request) -> Response:
        """A worker leaves. Its streams go on elsewhere."""
        self._ensure_operator(request)
        self.registry.leave(self._worker(request).name)
        return _json({"status": "ok"})

    async def drain(self, request: Request) -> Response:
        """`drain`: a worker gets no new requests; `undrain`: it gets them again."""
        self._ensure_operator(request)
        change = request.path_params["change"]
        if change not in ("drain", "undrain"):
            raise NotFound(f"there is nothing at {request.url.path}")
        self._worker(request).held = change == "drain"
        return _json({"status": "ok"})

    def _worker(self, request: Request) -> Worker:
        worker = self.registry.workers.get(request.path_params["name"])
        if worker is None:
            raise NotFound(f"there is no worker {request.path_params['name']!r}")
        return worker

    def _ensure_operator(self, request: Request) -> None:
        """Raises Unauthorised unless the request has the gateway's key."""
        key = self.config.gateway_key
        given = request.headers.get("authorization", "")
        if not key or not compare_digest(given.encode(), f"Bearer {key}".encode()):
            raise Unauthorised("changing the workers needs `Authorization: Bearer GATEWAY_KEY`")


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncGenerator[None]:
    assert isinstance(app, Gateway)
    for written in app.config.workers:
        site, equals, url = written.partition("=")
        app.registry.join(url if equals else written, site if equals else "")
    yield
    app.registry.close()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(request: Request, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise TooLarge(f"the body may have {limit} bytes at most; send less")
        chunks.append(chunk)
    return b"".join(chunks)


def _row(worker: Worker, now: float) -> WorkerRow:
    view = worker.view
    return WorkerRow(
        name=worker.name,
        site=view.site,
        usable=view.usable,
        draining=worker.draining or worker.held,
        breaker=worker.breaker.state(now),
        error=worker.error,
        active=view.active,
        round_trip_ms=round(view.round_trip * 1e3, 3),
        models=list(worker.models),
        plain=worker.plain,
    )


def _json(value: object) -> Response:
    return Response(json.encode(value), media_type=JSON)


def _internal(error: BaseException) -> StrettoError:
    log.exception("a request failed", exc_info=error)
    return StrettoError("an error inside the gateway; its log names the place")


async def _error_response(request: Request, error: Exception) -> Response:
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        path = request.url.path
        if error.status_code == WrongMethod.status:
            error = WrongMethod(
                f"{path} does not take {request.method}; use {headers.get('Allow', 'another')}"
            )
        else:
            error = NotFound(f"there is nothing at {path}")
    assert isinstance(error, StrettoError)
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthorised):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(json.encode(error.body()), error.status, headers, JSON)
