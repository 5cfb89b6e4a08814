"""The live page of a gateway at `/`, and the stream of snapshots that it reads.

A tenant sees its own figures; a key with the scope `admin` sees those of all tenants.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.resources import files
from math import isfinite

from msgspec import Struct, json
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from stretto.errors import Overloaded, Unauthorised
from stretto.gateway.accounts.accounts import Account, LimitState
from stretto.gateway.accounts.ledger import Ledger
from stretto.gateway.accounts.usage import UsageRow
from stretto.gateway.cache.stats import CacheReport
from stretto.gateway.operations.metrics import GatewayGauges, Recently
from stretto.gateway.operations.monitor import Monitor, state_of
from stretto.gateway.registry import Registry, Worker
from stretto.http.page_files import PageFiles

LIVE_S = 1.0
VIEWERS = 16  # each costs a snapshot every LIVE_S
LISTED = 50  # tenants, the busiest first
HERE = files("stretto.gateway.operations") / "static"
SHARED = files("stretto") / "server" / "static"  # the style is that of a worker's page
PAGE = PageFiles(
    {file.name: file for file in HERE.iterdir() if file.is_file()}
    | {name: SHARED / name for name in ("page.css", "stream.js")}
)


class LiveWorker(Struct, frozen=True, kw_only=True):
    """One worker. `waiting_ms`: predicted work of the prompts that wait; None without a fresh report."""

    name: str
    site: str
    state: str
    breaker: str
    error: str
    plain: bool
    models: list[str]
    active: int
    waiting_ms: float | None
    round_trip_ms: float
    weight: float


class LiveTenant(Struct, frozen=True, kw_only=True):
    """What a tenant has used today (UTC), and its requests of the last seconds."""

    tenant: str
    recent: int
    requests: int
    tokens: int
    cost: float
    joules: float


class GatewayLive(Struct, frozen=True, kw_only=True):
    """One snapshot. `limits` are those of the key that watches; `admin`: it may drain workers."""

    open: int
    draining: bool
    route: str
    counts: dict[str, int]
    rejected: dict[str, int]
    recently: Recently
    workers: list[LiveWorker]
    cache: CacheReport
    tenants: list[LiveTenant]
    limits: list[LimitState]
    problems: list[str]
    admin: bool


class LivePage:
    """The page and its stream. `facts()`: the present method of routing, and what is wrong. The stream ends
    when `closing` is set."""

    def __init__(
        self,
        registry: Registry,
        monitor: Monitor,
        ledger: Ledger,
        facts: Callable[[], tuple[str, list[str]]],
        closing: asyncio.Event,
    ) -> None:
        self._registry = registry
        self._monitor = monitor
        self._ledger = ledger
        self._facts = facts
        self._closing = closing
        self._viewers = 0

    def routes(self) -> list[Route]:
        """The page, its files and its stream."""
        return [Route("/", self.page), Route("/page/{name}", self.page), Route("/live", self.live)]

    def page(self, request: Request) -> Response:
        """A file of the page."""
        return PAGE.answer(request, request.path_params.get("name", "index.html"))

    async def live(self, request: Request) -> Response:
        """Server-sent events: a snapshot each second, until the gateway drains or the key is not valid."""
        self._account(request)
        if self._viewers >= VIEWERS:
            raise Overloaded(f"{VIEWERS} clients watch already; close one, or try again", retry_after=10.0)
        headers = {"Cache-Control": "no-store"}
        if request.method == "HEAD":
            return Response(media_type="text/event-stream", headers=headers)
        return StreamingResponse(self._snapshots(request), media_type="text/event-stream", headers=headers)

    def snapshot(self, account: Account) -> GatewayLive:
        """What an account may see now."""
        admin = account.may("admin")
        tenant = None if admin else account.tenant
        now = time.monotonic()
        route, problems = self._facts()
        gauges: GatewayGauges = self._monitor.gauges()
        recently = self._monitor.metrics.recently(now, tenant)
        return GatewayLive(
            open=gauges.open,
            draining=gauges.draining,
            route=route,
            counts={name.removeprefix("stretto_gateway_"): value for name, value in gauges.counts.items()},
            rejected=dict(gauges.rejected),
            recently=recently,
            workers=[_live(worker, now) for worker in self._registry.workers.values()],
            cache=gauges.cache,
            tenants=self._tenants(tenant, recently),
            limits=self._ledger.accounts.limits(account, self._ledger.now()),
            problems=problems if admin else [],
            admin=admin,
        )

    async def _snapshots(self, request: Request) -> AsyncIterator[bytes]:
        self._viewers += 1
        try:
            while not self._closing.is_set():
                yield b"data: " + json.encode(self.snapshot(self._account(request))) + b"\n\n"
                with suppress(TimeoutError):
                    async with asyncio.timeout(LIVE_S):
                        await self._closing.wait()
        except Unauthorised:
            return  # the key was revoked or has expired
        finally:
            self._viewers -= 1

    def _account(self, request: Request) -> Account:
        return self._ledger.accounts.find(request.headers, self._ledger.now())

    def _tenants(self, tenant: str | None, recently: Recently) -> list[LiveTenant]:
        today = datetime.fromtimestamp(self._ledger.now().wall, UTC).strftime("%Y-%m-%d")
        held: dict[str, list[UsageRow]] = {}
        for row in self._ledger.usage.rows(tenant, today, today):
            held.setdefault(row.tenant, []).append(row)
        tenants = [
            LiveTenant(
                tenant=name,
                recent=recently.tenants.get(name, 0),
                requests=sum(row.requests for row in rows),
                tokens=sum(row.prompt_tokens + row.completion_tokens for row in rows),
                cost=sum(row.cost for row in rows),
                joules=sum(row.joules for row in rows),
            )
            for name, rows in held.items()
        ]
        return sorted(tenants, key=lambda each: (-each.recent, -each.requests))[:LISTED]


def _live(worker: Worker, now: float) -> LiveWorker:
    view = worker.view
    waiting = sum(outlook.backlog_ms for outlook in view.outlooks.values()) if view.fresh(now) else None
    return LiveWorker(
        name=worker.name,
        site=view.site,
        state=state_of(worker),
        breaker=worker.breaker.state(now),
        error=worker.error,
        plain=worker.plain,
        models=list(worker.models),
        active=view.active,
        waiting_ms=waiting if waiting is not None and isfinite(waiting) else None,
        round_trip_ms=round(view.round_trip * 1e3, 3),
        weight=round(view.weight, 3),
    )
