"""One request through the gateway: chosen worker, passed-on stream, and another worker when one fails.

A stream is passed on as it comes. When its worker dies, hangs or drains, another worker gets the prompt and
the emitted tokens and goes on; the client sees a pause. Closing a connection to a worker cancels its work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from math import inf
from typing import Any, cast

import msgspec
from msgspec import Raw, Struct, json

from stretto.errors import CannotBeOnTime, StrettoError, Unavailable, UnknownModel
from stretto.gateway.accounts.took import PlainStream, took_of
from stretto.gateway.accounts.usage import Tally
from stretto.gateway.registry import BYTES_PER_TOKEN, CONNECT_S, Registry, Worker
from stretto.gateway.routing.hedge import Errors, HedgeBudget
from stretto.gateway.routing.prefixes import PIECE, keys_of
from stretto.gateway.routing.router import Ask, Placement
from stretto.gateway.upstream.connection import Head, UpstreamConnection, WorkerLost
from stretto.gateway.upstream.progress import RETRIABLE, Progress
from stretto.protocol.relay import RELAY, TOOK, OperationName, RelayedRequest, Took
from stretto.types import Objective, Request, Sampling

MOST_ANSWER_BYTES = 64 << 20
ATTEMPTS = 4  # before the first token; a stream that has begun goes on as long as a worker is left
PATIENCE_S = 10.0  # how long a begun stream waits for a worker
RETRY_PAUSE_S = 0.02
MISS_BOUND = 0.5  # a second attempt starts when a miss is likelier than this
Send = Callable[[int, Mapping[str, str], bytes, bool], Awaitable[None]]
PATHS: dict[OperationName, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "embeddings": "/v1/embeddings",
}
PASSED_ON = ("content-type", "retry-after", "cache-control", "x-accel-buffering")


class RoutingFields(Struct):
    """The fields of a request that routing needs. Their values are checked by the worker."""

    model: Any = None
    stream: Any = None
    messages: Raw = Raw(b"")
    prompt: Raw = Raw(b"")
    input: Raw = Raw(b"")
    max_tokens: Any = None
    max_completion_tokens: Any = None
    service_tier: Any = None
    objective: Any = None
    user: Any = None
    cache_salt: Any = None
    n: Any = None


@dataclass(slots=True)
class RelayedExchange:
    """One client request. `send(status, headers, body, more)` writes to the client.

    `admit(request, answers)` asks the tenant's limits; it raises StrettoError for a request that may not run.
    """

    operation: OperationName
    tenant: str
    body: bytes
    arrival: float
    send: Send
    request_id: str = ""
    admit: Callable[[Request, int], None] = lambda request, answers: None
    took: Took | None = None  # of an answer in one piece, and of a stream from a server of another kind
    progress: Progress = field(default_factory=Progress)
    tried: set[str] = field(default_factory=set[str])
    first: float | None = None  # when the first bytes came
    model: str = ""
    tier: str = ""
    prompt_tokens: int = 0  # roughly
    ask: Ask | None = None  # once it is admitted

    def tally(self) -> Tally:
        """What the answer took. Of one that was broken off the length of the prompt is an estimate."""
        emitted, took = self.progress.emitted, self.progress.took or self.took
        if took is None:
            return Tally(prompt_tokens=self.prompt_tokens if emitted else 0, completion_tokens=emitted)
        return Tally(
            prompt_tokens=took.prompt, cached_tokens=took.cached, completion_tokens=emitted or took.output
        )


@dataclass(slots=True)
class Attempt:
    """A request on one worker, with its response's head."""

    worker: Worker
    placement: Placement
    connection: UpstreamConnection
    head: Head


class Relay:
    """Passes requests on to the workers of a registry."""

    def __init__(self, registry: Registry, hedge_share: float) -> None:
        self.registry = registry
        self.router = registry.router
        self.failovers = self.retries = self.hedges = self.hedges_won = 0
        self._errors = Errors()
        self._budget = HedgeBudget(hedge_share)
        self._ids = count(1)

    async def run(self, exchange: RelayedExchange) -> None:
        """Answers a request. Raises StrettoError; after the first byte, the stream ends in its event."""
        self._budget.earn()
        ask = self.admit(exchange)
        while True:
            try:
                attempt = await self._begin(ask, exchange)
            except Answered:
                return
            except WorkerLost:
                if exchange.progress.begun or len(exchange.tried) < ATTEMPTS:
                    continue
                raise
            try:
                await self._pass_on(attempt, exchange)
                self.registry.succeeded(attempt.worker)
                return
            except WorkerLost as error:
                self.registry.failed(attempt.worker, error.message, lost=True)
                exchange.progress.lost()
                exchange.tried = {attempt.worker.name}
                if exchange.progress.begun:
                    self.failovers += 1
                    if attempt.worker.plain:
                        raise
                else:
                    self.retries += 1
            finally:
                self._end(attempt)

    def admit(self, exchange: RelayedExchange) -> Ask:
        """Asks the tenant's limits, once for a request. Raises StrettoError for one that may not run."""
        if exchange.ask is None:
            ask, answers = self._ask(exchange)
            exchange.model, exchange.tier = ask.request.model, ask.request.tier
            exchange.prompt_tokens = len(ask.request.prompt)
            exchange.admit(ask.request, answers)
            exchange.ask = ask
        return exchange.ask

    def _ask(self, exchange: RelayedExchange) -> tuple[Ask, int]:
        """What the router must know, and how many answers are asked for."""
        fields = json.decode(exchange.body, type=RoutingFields)
        prompt = bytes(fields.messages or fields.prompt or fields.input)
        name, info = self.model(fields.model)
        salt = f"{fields.user}\0{fields.cache_salt}"
        tokens = max(1, min(int(len(prompt) / BYTES_PER_TOKEN), info))
        limit = fields.max_completion_tokens or fields.max_tokens
        request = Request(
            id=next(self._ids),
            model=name,
            prompt=cast("tuple[int, ...]", range(tokens)),  # only its length is read
            arrival=exchange.arrival,
            sampling=Sampling(max_tokens=limit if isinstance(limit, int) and limit > 0 else None),
            tenant=exchange.tenant,
            objective=self._objective(fields),
            tier=fields.service_tier if fields.service_tier in ("priority", "flex") else "default",
        )
        answers = fields.n if isinstance(fields.n, int) and fields.n > 0 else 1
        return Ask(request, keys_of(prompt, exchange.tenant, name, salt), PIECE / BYTES_PER_TOKEN), answers

    def model(self, name: Any) -> tuple[str, int]:
        """The model's name and context. The default is the first model of the first worker."""
        for worker in self.registry.workers.values():
            for known, info in worker.models.items():
                if name in (None, known):
                    return known, 1 << 20 if info is None else info.context
        return str(name), 1 << 20

    def _objective(self, fields: RoutingFields) -> Objective:
        """The objective for routing. The worker resolves it again, and reports what is wrong with it."""
        given: object = fields.objective
        own = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
        tier = fields.service_tier if fields.service_tier in ("priority", "flex") else "default"
        for worker in self.registry.workers.values():
            if tier in worker.tiers:
                usual = msgspec.structs.asdict(worker.tiers[tier].objective)
                own = usual | {key: value for key, value in own.items() if value is not None}
                break
        try:
            return msgspec.convert(own, Objective)
        except msgspec.ValidationError:
            return Objective()

    async def _begin(self, ask: Ask, exchange: RelayedExchange) -> Attempt:
        """The first attempt whose response begins. Raises WorkerLost when none does, and Unavailable."""
        placement = await self._place(ask, exchange)
        first = asyncio.create_task(self._start(ask, exchange, placement))
        racers = {first}
        try:
            wait = self._hedge_after(ask, exchange, placement)
            if wait < inf:
                await asyncio.wait(racers, timeout=wait)
                if not first.done() and (second := self._second(ask, exchange, placement)) is not None:
                    self.hedges += 1
                    racers.add(asyncio.create_task(self._start(ask, exchange, second)))
            return await self._winner(racers, first)
        finally:
            for racer in racers:
                if not racer.done():
                    racer.cancel()

    async def _winner(self, racers: set[asyncio.Task[Attempt]], first: asyncio.Task[Attempt]) -> Attempt:
        """The first attempt that has a head; the others end. Raises what the last of them raised."""
        waiting = set(racers)
        while True:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            good = [task for task in done if task.exception() is None]
            if good:
                for task in good[1:]:
                    self._end(task.result())
                self.hedges_won += good[0] is not first
                return good[0].result()
            if not waiting:
                return done.pop().result()

    def _hedge_after(self, ask: Ask, exchange: RelayedExchange, placement: Placement) -> float:
        """Seconds from now after which a second attempt may start; inf for never."""
        ttft_ms = ask.request.objective.ttft_ms
        if exchange.progress.begun or ttft_ms is None or not placement.feasible:
            return inf
        waited = time.monotonic() - exchange.arrival
        wait = self._errors.wait_before(placement.ttft_s, ttft_ms / 1e3, MISS_BOUND)
        return max(wait - waited, 0.0) if wait < inf else inf

    def _second(self, ask: Ask, exchange: RelayedExchange, placement: Placement) -> Placement | None:
        """Another worker that would still be on time, if the budget allows a second attempt."""
        now = time.monotonic()
        second = self.router.place(ask, now, avoid={placement.worker.name, *exchange.tried})
        if second is None:
            return None
        limit_s = (ask.request.objective.ttft_ms or inf) / 1e3
        if not second.feasible or second.ttft_s > limit_s or not self._budget.spend():
            self.router.done(second.worker)
            return None
        return second

    async def _place(self, ask: Ask, exchange: RelayedExchange) -> Placement:
        """A worker for the request. Raises Unavailable, or CannotBeOnTime if the request wants that."""
        deadline = time.monotonic() + (PATIENCE_S if exchange.progress.begun else 0.0)
        while True:
            placement = self.router.place(ask, time.monotonic(), exchange.tried)
            if placement is not None:
                break
            if time.monotonic() >= deadline:
                raise self._nobody(ask.request.model)
            await asyncio.sleep(RETRY_PAUSE_S)
            exchange.tried.clear()
        refuses = ask.request.objective.on_miss == "reject" and placement.ttft_s < inf
        if refuses and not placement.feasible and not exchange.progress.begun:
            self.router.done(placement.worker)
            after = placement.retry_after if placement.retry_after < inf else None
            raise CannotBeOnTime("no worker can meet $.objective now; try again later", retry_after=after)
        return placement

    def _nobody(self, model: str) -> StrettoError:
        known = {name for worker in self.registry.workers.values() for name in worker.models}
        if known and model not in known:
            return UnknownModel(
                f"there is no model {model!r}; the workers have {', '.join(sorted(known))}", param="$.model"
            )
        return Unavailable("no worker is ready; try again soon", retry_after=1.0)

    async def _start(self, ask: Ask, exchange: RelayedExchange, placement: Placement) -> Attempt:
        """Sends the request to one worker and waits for its response to begin. Raises WorkerLost."""
        worker = self.registry.workers[placement.worker.name]
        exchange.tried.add(worker.name)
        worker.breaker.try_one(time.monotonic())
        connection: UpstreamConnection | None = None
        sent = time.monotonic()
        try:
            connection = await worker.pool.acquire(CONNECT_S)
            worker.sent(ask.request.id)
            worker.streams.add(connection.lose)
            head = await connection.exchange(self._bytes(worker, exchange))
            if head.status == 503:
                await self._raise_if_retriable(worker, connection, head, exchange)
        except BaseException as error:
            self.router.done(placement.worker)
            if connection is not None:
                worker.streams.discard(connection.lose)
                connection.close()
            if isinstance(error, WorkerLost):
                self.registry.failed(worker, error.message, lost=True)
            raise
        if exchange.first is None:
            self._errors.add(placement.ttft_s, time.monotonic() - exchange.arrival)
            exchange.first = time.monotonic() - sent
        return Attempt(worker, placement, connection, head)

    async def _raise_if_retriable(
        self, worker: Worker, connection: UpstreamConnection, head: Head, exchange: RelayedExchange
    ) -> None:
        """Raises WorkerLost for a refusal that says nothing about the request."""
        body = await connection.read_all(MOST_ANSWER_BYTES)
        code = ""
        with suppress(msgspec.DecodeError, KeyError, TypeError):
            code = str(json.decode(body)["error"]["code"])
        if code in RETRIABLE:
            raise WorkerLost(f"{worker.name} refused: {code}")
        await exchange.send(head.status, _headers(head), body, False)
        raise Answered

    def _bytes(self, worker: Worker, exchange: RelayedExchange) -> bytes:
        """The request as the worker gets it."""
        headers = {"Content-Type": "application/json", "x-request-id": exchange.request_id}
        if worker.plain:
            return worker.pool.request("POST", PATHS[exchange.operation], headers, exchange.body)
        relayed = RelayedRequest(
            operation=exchange.operation,
            tenant=exchange.tenant,
            request=Raw(exchange.body),
            age_ms=(time.monotonic() - exchange.arrival + worker.view.round_trip / 2) * 1e3,
            continuation=exchange.progress.continuation(),
        )
        return worker.pool.request("POST", RELAY, headers, json.encode(relayed))

    async def _pass_on(self, attempt: Attempt, exchange: RelayedExchange) -> None:
        """Passes a response on. Raises WorkerLost when it breaks off."""
        head, connection, progress = attempt.head, attempt.connection, exchange.progress
        if "text/event-stream" not in head.headers.get("content-type", ""):
            body = await connection.read_all(MOST_ANSWER_BYTES)
            exchange.took = took_of(head.headers.get(TOOK), body)
            await exchange.send(head.status, _headers(head), body, False)
            return
        headers = _headers(head)
        if attempt.worker.plain:
            counted = PlainStream()
            while data := await connection.read():
                exchange.took = counted.push(data)
                await exchange.send(head.status, headers, data, True)
            await exchange.send(head.status, headers, b"", False)
            return
        while data := await connection.read():
            try:
                passed = progress.push(data)
            except ValueError as error:
                raise WorkerLost(f"{attempt.worker.name} sent a malformed stream: {error}") from error
            if passed:
                await exchange.send(head.status, headers, passed, not progress.ended)
            if progress.ended:
                await connection.read()
                return
        event, retriable = progress.error()
        if retriable:
            raise WorkerLost(f"{attempt.worker.name} broke off an answer")
        await exchange.send(head.status, headers, event, False)

    def _end(self, attempt: Attempt) -> None:
        attempt.worker.streams.discard(attempt.connection.lose)
        attempt.worker.pool.release(attempt.connection)
        self.router.done(attempt.placement.worker)


class Answered(Exception):
    """The client has its answer: nothing is left to do."""


def _headers(head: Head) -> dict[str, str]:
    return {name: head.headers[name] for name in PASSED_ON if name in head.headers}
