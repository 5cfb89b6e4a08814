"""The HTTP side of the gateway: OpenAI's paths for clients, and paths for workers and operators."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from random import Random

from msgspec import Struct, json
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from stretto.errors import (
    Draining,
    InvalidRequest,
    KeyRevoked,
    NotFound,
    StartError,
    StrettoError,
    Unavailable,
)
from stretto.gateway.accounts.accounts import Account
from stretto.gateway.accounts.keys import KeyScope
from stretto.gateway.accounts.ledger import Charge, Ledger
from stretto.gateway.cache.answers import Answers, prepare
from stretto.gateway.cache.stats import CacheReport
from stretto.gateway.calls import Calls
from stretto.gateway.exchange import RelayedExchange
from stretto.gateway.feedback import FeedbackRelay
from stretto.gateway.model_listing import ModelListing
from stretto.gateway.operations.live import LivePage
from stretto.gateway.operations.monitor import CallEnd, Monitor
from stretto.gateway.operations.reload import Reloader, Reread
from stretto.gateway.realtime.socket import RealtimeRelay, explain
from stretto.gateway.registry import Registry, Worker
from stretto.gateway.relay import METHODS, Relay
from stretto.gateway.routing.fields import read_fields
from stretto.gateway.routing.router import Router
from stretto.gateway.settings import GatewayConfig
from stretto.http.dialects import dialect_of
from stretto.http.errors import NothingAt, error_response, internal, nothing_there
from stretto.http.exchange import KEY, WRITE, Exchange, ExchangeLayer, watch
from stretto.http.guard import Guard
from stretto.http.request import plain_path, read_body, refuse_stream
from stretto.protocol.health import Status
from stretto.protocol.parsing import JSON, parse, require_json
from stretto.protocol.realtime.handshake import PATH
from stretto.protocol.relay import NO_RESPONSES, PATHS, RESPONSES, OperationName
from stretto.telemetry import tracing

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
    rejected: dict[str, int]  # connections and requests that were cut short, by reason
    keys_error: str  # why the key file was not read when it changed last
    settings_error: str  # why the last reload of the settings changed nothing
    cache: CacheReport


@dataclass(frozen=True, slots=True)
class RelayedPath:
    """A path that is relayed to a worker."""

    gateway: Gateway
    operation: OperationName

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrival = time.monotonic()
        request = Request(scope, receive)
        gateway, client = self.gateway, _Client(send)
        exchange: Exchange = scope[KEY]
        relayed: RelayedExchange | None = None
        charge: Charge | None = None
        gone = False
        failure: StrettoError | None = None
        try:
            account = gateway.account(request, "infer")
            exchange.tenant = account.tenant
            body = b"{}"
            if self.operation in METHODS:
                refuse_stream(request.query_params)
            else:
                require_json(request.headers.get("content-type"))
                body = await read_body(request, gateway.config.max_body_bytes)
            exchange.bytes_in = len(body)
            fields, body = read_fields(body)
            if gateway.server.draining:
                raise Draining("the gateway is shutting down; ask another one", retry_after=1.0)
            charge = gateway.ledger.charge(account, names_model=self.operation not in METHODS)
            kept = request.path_params.get("id", fields.previous_response_id)
            relayed = RelayedExchange(
                self.operation,
                scope["path"],
                account.tenant,
                body,
                fields,
                arrival,
                client.send,
                scope.get(WRITE),
                exchange.id,
                kept if isinstance(kept, str) else "",
                charge.admit,
                span=exchange.span,
                references=fields.references if self.operation == "responses" else (),
            )
            work = gateway.answers.run(relayed)
            watching = partial(watch, scope, receive)
            gone = not await gateway.server.run(work, watching, account.record.id, lambda: client.whole)
        except ClientDisconnect:
            gone = True
        except asyncio.CancelledError:
            gone = True
            raise
        except Exception as error:
            failure = error if isinstance(error, StrettoError) else internal(error)
            exchange.outcome = failure.code
            if not client.started:
                raise failure from None
            ending = dialect_of(scope["path"]).ending(failure, exchange.id)
            await client.send(0, {}, ending, False)
        finally:
            if relayed is not None:
                exchange.bytes_out += relayed.progress.written
            end = CallEnd(self.operation, arrival, relayed, charge, failure, gone)
            gateway.monitor.ended(exchange, end)
            failure = None  # the error holds this frame, and the frame the body


class _Client:
    """The client's side of one exchange."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self.whole = False

    async def send(self, status: int, headers: Mapping[str, str], body: bytes, more: bool) -> None:
        self.whole = not more
        if not self.started:
            self.started = True
            pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
            if not more:
                pairs.append((b"content-length", str(len(body)).encode()))
            await self._send({"type": "http.response.start", "status": status, "headers": pairs})
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


class Gateway(Starlette):
    """The ASGI application of one gateway. It keeps no state that another one would need."""

    def __init__(self, config: GatewayConfig, seed: int | None = None, reread: Reread | None = None) -> None:
        """`reread` reads the settings again, for a reload."""
        self.reloader = Reloader(config, reread, self._take)
        self.server = Calls(config)
        self.tracer = tracing.connect(config.trace_endpoint, "stretto-gateway")
        headers = {"Authorization": f"Bearer {config.gateway_key}"} if config.gateway_key else {}
        self.registry = Registry(Router(config.route, Random(seed).randrange), headers)
        self.relay = Relay(self.registry, config.hedge_share, config.patience)
        self.ledger = Ledger(config.keys, self._end_revoked, joules=self.registry.joules)
        self.answers = Answers(config, self.relay)
        self.monitor = Monitor(self.registry, self.answers, self.server, self.ledger)
        self.live = LivePage(self.registry, self.monitor, self.ledger, self._facts, self.server.closing)
        work = [
            Route(path, RelayedPath(self, name), methods=["POST"])
            for name, paths in PATHS.items()
            for path in paths
        ]
        work += [Route(path, NothingAt(path)) for path in NO_RESPONSES]
        work += [
            Route(RESPONSES + "/{id}", RelayedPath(self, name), methods=[method])
            for name, method in METHODS.items()
        ]
        pages = [
            *ModelListing(self.registry, self.account).routes(),
            *FeedbackRelay(
                self.registry, self.relay.answered, self.charged_account, lambda: self.config.max_body_bytes
            ).routes(),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/state", self.state_page),
            *self.monitor.routes(),
            *self.live.routes(),
            Route("/v1/cache", self.erase, methods=["DELETE"]),
            Route("/v1/workers", self.join, methods=["POST"]),
            Route("/v1/workers/{name:path}", self.leave, methods=["DELETE"]),
            Route("/v1/workers/{name:path}/{change}", self.drain, methods=["POST"]),
        ]
        sockets = RealtimeRelay(self.relay, self.ledger, self.server, self.monitor.metrics)
        realtime = [WebSocketRoute(PATH, sockets), Route(PATH, explain)]
        super().__init__(routes=[*work, *pages, *realtime])
        self.router.redirect_slashes = False
        self.router.default = nothing_there
        self.add_middleware(Guard, config=config, count=self.server.rejected)

    def build_middleware_stack(self) -> ASGIApp:
        """The router, the middleware, and `ExchangeLayer` in place of Starlette's two layers for errors."""
        app: ASGIApp = self.router
        for middleware, args, kwargs in reversed(self.user_middleware):
            app = middleware(app, *args, **kwargs)
        routes = [route for route in self.routes if isinstance(route, Route | WebSocketRoute)]
        return ExchangeLayer(app, routes, self.server.access_log, error_response, self.tracer)

    async def wait_ready(self) -> None:
        """Starts to watch the configured workers and the key file. Raises StartError for a wrong URL."""
        self.ledger.start()
        self.registry.configure(self.config.workers)
        self.reloader.listen()

    @property
    def config(self) -> GatewayConfig:
        """The present settings."""
        return self.reloader.config

    def _facts(self) -> tuple[str, list[str]]:
        """The method of routing, and what an operator should mend in the key file and the settings."""
        errors = (self.ledger.error, self.ledger.shared_error, self.reloader.error)
        return self.config.route, [error for error in errors if error]

    async def _take(self, config: GatewayConfig) -> None:
        """Takes over other settings; all that may be wrong with them comes first. Raises StartError."""
        await asyncio.to_thread(prepare, config.caches)
        self.registry.configure(config.workers)
        await self.ledger.apply(config.keys)
        self.registry.router.choose_by(config.route)
        self.relay.hedging.budget.share = config.hedge_share
        self.relay.patience = config.patience
        self.answers.policies = config.caches
        logging.getLogger().setLevel(config.log_level.upper())

    async def shutdown(self, grace_s: float) -> None:
        """Leaves all workers, and saves the usage."""
        self.registry.close()
        await self.ledger.close()
        await self.answers.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "path" in scope:
            scope["path"] = plain_path(scope["path"])
        await super().__call__(scope, receive, send)

    def account(self, request: Request, scope: KeyScope | None = None) -> Account:
        """The account of a request's key. Raises Unauthorised, or NotAllowed for a key without the scope."""
        account = self.ledger.accounts.find(request.headers, self.ledger.now())
        if scope is not None:
            account.ensure(scope)
        return account

    def charged_account(self, request: Request, scope: KeyScope) -> Account:
        """The same for a call that no model answers, which counts as a request.

        Raises also RateLimited and BudgetExceeded.
        """
        account = self.account(request, scope)
        self.ledger.take_call(account)
        return account

    def _end_revoked(self, ids: set[str]) -> None:
        """Ends the streams of keys that were revoked: whoever has such a key must not have the rest."""
        self.server.end_calls(KeyRevoked("the API key was revoked; the answer ends here"), ids)

    async def health(self, request: Request) -> Response:
        """Whether the process is alive."""
        return _json({"status": "ok", "shared_cache": self.answers.stats.shared})

    async def ready(self, request: Request) -> Response:
        """Whether any worker can take a request."""
        if self.server.draining or not any(worker.view.usable for worker in self.registry.workers.values()):
            raise Unavailable("no worker is ready; try again soon", retry_after=1.0)
        return _json(Status())

    async def state_page(self, request: Request) -> Response:
        """The workers, and what the gateway has done."""
        shows = self.account(request).may("admin")
        now, relay = time.monotonic(), self.relay
        return _json(
            GatewayState(
                workers=[_row(worker, now) for worker in self.registry.workers.values()],
                route=self.config.route,
                active=self.server.running,
                failovers=relay.failovers,
                retries=relay.retries,
                hedges=relay.hedges,
                hedges_won=relay.hedges_won,
                rejected=dict(self.server.rejections),
                keys_error=self.ledger.error if shows else "",
                settings_error=self.reloader.error if shows else "",
                cache=self.answers.stats.report(),
            )
        )

    async def erase(self, request: Request) -> Response:
        """Deletes what is cached of a tenant, or of a subject of it, here and on the workers.

        A tenant erases its own. An operator's query names the `tenant`.
        """
        query = request.query_params
        tenant = query.get("tenant")
        account = self.account(request, "admin" if tenant else "infer")
        return _json(await self.answers.erase(tenant or account.tenant, query.get("subject")))

    async def join(self, request: Request) -> Response:
        """A worker joins, or renews its lease."""
        self.account(request, "admin")
        require_json(request.headers.get("content-type"))
        joining = parse(json.Decoder(Joining), await read_body(request, self.config.max_body_bytes))
        try:
            worker = self.registry.join(joining.url, joining.site, lease=time.monotonic() + LEASE_S)
        except StartError as error:
            raise InvalidRequest(f"$.url: {error.message}", param="$.url") from None
        return _json({"name": worker.name, "lease_s": LEASE_S})

    async def leave(self, request: Request) -> Response:
        """A worker leaves. Its streams go on elsewhere."""
        self.account(request, "admin")
        self.registry.leave(self._worker(request).name)
        return _json({"status": "ok"})

    async def drain(self, request: Request) -> Response:
        """`drain`: a worker gets no new requests; `undrain`: it gets them again."""
        self.account(request, "admin")
        change = request.path_params["change"]
        if change not in ("drain", "undrain"):
            raise NotFound(f"there is nothing at {request.url.path}")
        self._worker(request).hold(on=change == "drain")
        return _json({"status": "ok"})

    def _worker(self, request: Request) -> Worker:
        worker = self.registry.workers.get(request.path_params["name"])
        if worker is None:
            raise NotFound(f"there is no worker {request.path_params['name']!r}")
        return worker


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
