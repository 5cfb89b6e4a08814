"""One request through the gateway: chosen worker, passed-on stream, and another worker when one fails.

A stream is passed on as it comes. When its worker dies, hangs or drains, another worker gets the prompt and
the emitted tokens and goes on; the client sees a pause. Closing a connection to a worker cancels its work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from math import inf
from typing import Any, cast

from msgspec import Raw, json

from stretto.engine.scheduler.lateness import longest_wait_s
from stretto.errors import (
    CannotBeOnTime,
    NotImplementedHere,
    Overloaded,
    StrettoError,
    Unavailable,
    UnknownModel,
    UnknownResponse,
)
from stretto.gateway.accounts.took import PlainStream, took_of
from stretto.gateway.exchange import Refusal, RelayedExchange
from stretto.gateway.registry import CONNECT_S, Registry, Worker
from stretto.gateway.routing.answered import AnsweredRequests
from stretto.gateway.routing.fields import GENERATING
from stretto.gateway.routing.hedge import Hedges
from stretto.gateway.routing.prefixes import PIECE, keys_of
from stretto.gateway.routing.router import Ask, Placement
from stretto.gateway.settings import Patience
from stretto.gateway.upstream.connection import Head, UpstreamConnection, WorkerLost, WorkerSilent
from stretto.gateway.upstream.progress import RETRIABLE
from stretto.protocol.relay import (
    ERROR_CODE,
    MARKED,
    RELAY,
    TOOK,
    KeptResponseId,
    OperationName,
    RelayedRequest,
)
from stretto.protocol.responses import answer_of
from stretto.telemetry.tracing import TraceSpan
from stretto.types import Objective, Request, Sampling

MOST_ANSWER_BYTES = 64 << 20
ATTEMPTS = 4  # before the first token, and between two tokens: the request itself may be why workers die
SLOWEST_MS = 5.0  # a token of the prompt takes a server of another kind at most, as far as anyone knows
RETRY_PAUSE_S = 0.02
EVERY_SERVER: frozenset[OperationName] = frozenset({"chat", "completions", "embeddings"})
METHODS: dict[OperationName, str] = {"retrieve_response": "GET", "delete_response": "DELETE"}
PASSED_ON = ("content-type", "retry-after", "cache-control", "x-accel-buffering", "request-id")
NOT_THERE = (404, 405, 501)  # how a server says that it does not know a path
GATEWAY_ERRORS = (502, 503, 504)  # how a server in front of another one says that it is lost


@dataclass(slots=True)
class Attempt:
    """A request on one worker, with its response's head. `due`: by when its body must have begun."""

    worker: Worker
    placement: Placement
    connection: UpstreamConnection
    head: Head
    span: TraceSpan | None  # None: traces are off
    due: float = inf


class Rival:
    """A second attempt of a request, which interrupts the first one when it wins. `begin()` starts one, or
    returns None when none is worth its price."""

    def __init__(self, begin: Callable[[], Coroutine[Any, Any, Attempt] | None]) -> None:
        self._begin = begin
        self._first: asyncio.Timeout | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Attempt] | None = None

    @property
    def running(self) -> bool:
        """Whether it has started and not failed."""
        task = self._task
        return task is not None and not (task.done() and (task.cancelled() or task.exception() is not None))

    def arm(self, wait: float, first: asyncio.Timeout) -> None:
        """Starts after `wait` seconds. When it wins, the block of `first` ends in TimeoutError."""
        self._first = first
        self._timer = asyncio.get_running_loop().call_later(wait, self._start)

    def _start(self) -> None:
        work = self._begin()
        if work is not None:
            self._task = asyncio.create_task(work)
            self._task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Attempt]) -> None:
        if not task.cancelled() and task.exception() is None and self._first is not None:
            self._first.reschedule(asyncio.get_running_loop().time())

    async def attempt(self) -> Attempt:
        """The attempt when its response has begun. Raises what it raised."""
        assert self._task is not None
        self._first = None
        return await self._task

    def end(self) -> Attempt | None:
        """Ends it. Returns the attempt if its response has begun."""
        self._first = None
        if self._timer is not None:
            self._timer.cancel()
        task = self._task
        if task is None or task.cancel() or task.cancelled() or task.exception() is not None:
            return None
        return task.result()


class Relay:
    """Passes requests on to the workers of a registry."""

    def __init__(self, registry: Registry, hedge_share: float, patience: Patience) -> None:
        self.registry = registry
        self.patience = patience
        self.router = registry.router
        self.failovers = self.retries = self.hedges = self.hedges_won = 0
        self.hedging = Hedges(hedge_share)
        self.answered = AnsweredRequests()
        self._ids = count(1)

    async def run(self, exchange: RelayedExchange) -> None:
        """Answers a request. Raises StrettoError; after the first byte, the stream ends in its event."""
        ask = self.admit(exchange)
        while True:
            try:
                attempt = await self._begin(ask, exchange)
            except (WorkerLost, Refusal) as error:
                exchange.refusal = error if isinstance(error, Refusal) else exchange.refusal
                exchange.silence = error.message if isinstance(error, WorkerSilent) else exchange.silence
                if self._goes_on(exchange):
                    self.retries += isinstance(error, WorkerLost) and not exchange.begun
                    continue
                if isinstance(error, WorkerLost):
                    raise
                await exchange.send(error.head.status, _headers(error.head), error.body, False)
                return
            except Unavailable:
                refusal = exchange.refusal
                if exchange.silence and refusal is None and not exchange.begun:
                    raise WorkerSilent(exchange.silence) from None
                if refusal is None or exchange.begun:
                    raise
                await exchange.send(refusal.head.status, _headers(refusal.head), refusal.body, False)
                return
            exchange.answered(attempt.worker.name, attempt.placement.ttft_s, attempt.head)
            if exchange.operation in GENERATING:
                self.answered.add(exchange.tenant, exchange.request_id, attempt.worker.name)
            try:
                await self._pass_on(attempt, exchange)
                self.registry.answered(attempt.worker, attempt.head.status)
                return
            except WorkerLost as error:
                self.registry.gave_up(attempt.worker, error)
                exchange.lost(exchange.progress.error)
                exchange.silence = error.message if isinstance(error, WorkerSilent) else exchange.silence
                exchange.tried = {attempt.worker.name}
                if exchange.passed or not self._in_time(exchange):
                    raise
                if exchange.losses >= ATTEMPTS:
                    raise WorkerLost(f"{ATTEMPTS} workers in a row were lost at this request") from error
                if exchange.begun:
                    self.failovers += 1
                else:
                    self.retries += 1
            finally:
                self._end(attempt)

    def _goes_on(self, exchange: RelayedExchange) -> bool:
        """Whether a request may go to another worker after an attempt failed."""
        few = exchange.begun or len(exchange.tried) < ATTEMPTS
        return exchange.losses < ATTEMPTS and few and self._in_time(exchange)

    def _in_time(self, exchange: RelayedExchange) -> bool:
        """Whether a worker that sends nothing has left any time to another one."""
        waited = time.monotonic() - exchange.arrival
        return not exchange.silence or exchange.begun or waited < self.patience.begin_s

    def _patience(self, worker: Worker, ask: Ask, exchange: RelayedExchange) -> float:
        """Seconds in which the worker must begin its response; inf for a Stretto, whose reports tell whether
        it is well, and which refuses what would be too late. How long a prompt takes alone is a guess."""
        if not worker.plain:
            return inf
        left = exchange.arrival + self.patience.begin_s - time.monotonic()
        objective = ask.request.objective
        if (
            objective.ttft_ms is None
            or objective.on_miss == "late"
            or not exchange.fields.streams(exchange.operation)
        ):
            return max(left, 0.0)
        alone_ms = SLOWEST_MS * len(ask.request.prompt)
        return max(min(longest_wait_s(objective.ttft_ms / 1e3, alone_ms), left), 0.0)

    def admit(self, exchange: RelayedExchange) -> Ask:
        """Asks the tenant's limits, once for a request. Raises StrettoError for one that may not run."""
        if exchange.ask is None:
            ask = self._ask(exchange)
            exchange.model, exchange.tier = ask.request.model, ask.request.tier
            exchange.prompt_tokens = len(ask.request.prompt)
            exchange.admit(ask.request, exchange.fields.answers)
            exchange.ask = ask
        return exchange.ask

    def next_id(self) -> int:
        """The id of the next request, which is larger than those before it."""
        return next(self._ids)

    def _ask(self, exchange: RelayedExchange) -> Ask:
        fields, generates = exchange.fields, exchange.operation in GENERATING
        name, info, ratio = self.registry.model(fields.name if fields.model is None else fields.model)
        prompt = fields.text
        tokens = max(1, min(int(len(prompt) / ratio), 1 << 20 if info is None else info.context))
        request = Request(
            id=self.next_id(),
            model=name,
            prompt=cast("tuple[int, ...]", range(tokens)),  # only its length is read
            arrival=exchange.arrival,
            sampling=_sampling(fields.most_tokens),
            tenant=exchange.tenant,
            objective=fields.wanted(self.registry.tiers()) if generates else Objective(on_miss="late"),
            tier=fields.tier,
        )
        keys = keys_of(prompt, exchange.tenant, name, fields.salt) if generates else []
        return Ask(request, keys, PIECE / ratio)

    async def _begin(self, ask: Ask, exchange: RelayedExchange) -> Attempt:
        """The first attempt whose response begins. Raises WorkerLost or Refusal when none does, and
        Unavailable. The first attempt needs no task of its own; a second one interrupts it when it wins."""
        placement = await self._place(ask, exchange)
        if not exchange.tried:
            self.hedging.placed(ask, placement)
        wait = self._hedge_after(ask, exchange, placement)
        if wait == inf:
            return await self._start(ask, exchange, placement)
        rival = Rival(lambda: self._start_second(ask, exchange, placement))
        won: Attempt | None = None
        first = asyncio.timeout(None)
        try:
            try:
                async with first:
                    rival.arm(wait, first)
                    won = await self._start(ask, exchange, placement)
                return won
            except TimeoutError:
                if not first.expired():
                    raise
            except (WorkerLost, Refusal):
                if not rival.running:
                    raise
            won = await rival.attempt()
            self.hedges_won += 1
            return won
        finally:
            left = rival.end()
            if left is not None and left is not won:
                self._end(left)

    def _start_second(
        self, ask: Ask, exchange: RelayedExchange, placement: Placement
    ) -> Coroutine[Any, Any, Attempt] | None:
        """A second attempt, if one is worth its price."""
        second = self._second(ask, exchange, placement)
        if second is None:
            return None
        self.hedges += 1
        return self._start(ask, exchange, second)

    def _hedge_after(self, ask: Ask, exchange: RelayedExchange, placement: Placement) -> float:
        """Seconds from now after which a second attempt may start; inf for never. An answer in one piece says
        nothing of its first token."""
        lone = len(self.registry.workers) < 2
        if lone or exchange.begun or not exchange.fields.streams(exchange.operation):
            return inf
        wait = self.hedging.wait(ask, placement)
        return max(exchange.arrival + wait - time.monotonic(), 0.0) if wait < inf else inf

    def _second(self, ask: Ask, exchange: RelayedExchange, placement: Placement) -> Placement | None:
        """The worker of a second attempt, if one is worth its price."""
        avoid = exchange.tried | self._unable(exchange)
        return self.hedging.second(self.router, ask, placement, time.monotonic(), avoid)

    async def _place(self, ask: Ask, exchange: RelayedExchange) -> Placement:
        """A worker for the request. Raises Unavailable, or CannotBeOnTime if the request wants that."""
        deadline = time.monotonic() + (exchange.hold_s if self.registry.workers else 0.0)
        unable = self._unable(exchange)
        while True:
            avoid = exchange.tried | unable
            if exchange.begun:  # servers of another kind cannot go on
                avoid |= {name for name, worker in self.registry.workers.items() if worker.plain}
            placement = self.router.place(ask, time.monotonic(), avoid)
            if placement is not None:
                break
            why = nobody(self.registry, ask.request.model, exchange.path, unable)
            if time.monotonic() >= deadline or not isinstance(why, Unavailable):
                raise why
            await asyncio.sleep(RETRY_PAUSE_S)
            exchange.tried.clear()
        late = placement.ttft_s < inf and not placement.feasible and not exchange.begun
        if late and exchange.refusal is not None:
            self.router.done(placement.worker)
            raise Unavailable("no other worker would be on time")  # the client gets the refusal
        if late and ask.request.objective.on_miss == "reject":
            self.router.done(placement.worker)
            after = placement.retry_after if placement.retry_after < inf else None
            raise CannotBeOnTime("no worker can meet $.objective now; try again later", retry_after=after)
        return placement

    def _unable(self, exchange: RelayedExchange) -> set[str]:
        """The workers that lack the operation, or what the request refers to. Raises UnknownResponse."""
        workers, kept = self.registry.workers, exchange.kept
        lacking = {name for name, worker in workers.items() if exchange.operation in worker.lacks}
        if kept and not any(worker.keeps(kept) for worker in workers.values()):
            raise UnknownResponse(
                f"no worker keeps the response {kept!r}; send the conversation in $.input",
                param="$.previous_response_id",
            )
        having = able = workers.keys() - lacking
        for id in {kept, *map(answer_of, exchange.references)}:
            holders = {name for name, worker in workers.items() if worker.keeps(id)}
            able = able & holders if holders else able  # a worker says that it keeps no such item
        if having and not able:
            raise UnknownResponse(
                "no worker keeps all that this request refers to; send the whole items in $.input",
                param="$.input",
            )
        return workers.keys() - able

    async def _start(self, ask: Ask, exchange: RelayedExchange, placement: Placement) -> Attempt:
        """Sends the request to one worker and waits for its response to begin. Raises WorkerLost."""
        worker = self.registry.workers[placement.worker.name]
        exchange.tried.add(worker.name)
        connection: UpstreamConnection | None = None
        sent = time.monotonic()
        span = (
            None if exchange.span is None else exchange.span.child("relay", {"stretto.worker": worker.name})
        )
        try:
            connection = await worker.pool.acquire(CONNECT_S)
            connection.patience = patience = self._patience(worker, ask, exchange)
            due = time.monotonic() + patience

            def request() -> bytes:
                worker.sent(ask.request.id)
                return self._bytes(worker, exchange, placement, span)

            connection, head = await worker.pool.send(connection, request, CONNECT_S)
            await self._raise_refusal(worker, connection, head, exchange)
        except BaseException as error:
            self.router.done(placement.worker)
            if isinstance(error, Refusal):
                self.router.refused(ask, placement)
                self.registry.answered(worker, error.head.status)
            if connection is not None:
                worker.pool.drop(connection)
            if isinstance(error, WorkerLost):
                self.registry.gave_up(worker, error)
            if span is not None:
                span.end({}, error.code if isinstance(error, StrettoError) else "cancelled")
            raise
        if exchange.first is None:
            if exchange.fields.streams(exchange.operation):
                self.hedging.came(placement, time.monotonic() - exchange.arrival)
            exchange.first = time.monotonic() - sent
        return Attempt(worker, placement, connection, head, span, due)

    async def _raise_refusal(
        self, worker: Worker, connection: UpstreamConnection, head: Head, exchange: RelayedExchange
    ) -> None:
        """Raises Refusal for a response that says nothing about the request, or WorkerLost."""
        code, operation = head.headers.get(ERROR_CODE, ""), exchange.operation
        absent = worker.plain and head.status in NOT_THERE and operation not in EVERY_SERVER
        lost = worker.plain and head.status in GATEWAY_ERRORS
        refused = code in (Overloaded.code, CannotBeOnTime.code)
        if not (code in RETRIABLE or refused or absent or lost):
            return
        body = await connection.read_all(MOST_ANSWER_BYTES)
        if absent:
            worker.lacks.add(operation)
        elif not refused and not lost:
            exchange.lost(code)
            raise WorkerLost(f"{worker.name} refused: {code}")
        raise Refusal(head, body)

    def _bytes(
        self, worker: Worker, exchange: RelayedExchange, placement: Placement, span: TraceSpan | None
    ) -> bytes:
        """The request as the worker gets it."""
        headers = {"Content-Type": "application/json", "x-request-id": exchange.request_id}
        if span is not None:
            headers["traceparent"] = str(span.parent)
        operation = exchange.operation
        if worker.plain:
            return worker.pool.request("POST", exchange.path, headers, exchange.body)
        body = json.encode(KeptResponseId(exchange.kept)) if operation in METHODS else exchange.body
        relayed = RelayedRequest(
            operation=operation,
            tenant=exchange.tenant,
            request=Raw(body),
            age_ms=(time.monotonic() - exchange.arrival + worker.view.round_trip) * 1e3,
            continuation=exchange.progress.continuation(exchange.arrival),
            nonce=exchange.nonce,
            site=worker.view.site,
            degraded=self.registry.degraded(worker, exchange.model),
            cached=placement.cached,
        )
        return worker.pool.request("POST", RELAY, headers, json.encode(relayed))

    async def _pass_on(self, attempt: Attempt, exchange: RelayedExchange) -> None:
        """Passes a response on. Raises WorkerLost when it breaks off."""
        head, connection, progress = attempt.head, attempt.connection, exchange.progress
        headers, silence_s = _headers(head), inf
        if attempt.due < inf:
            silence_s = self.patience.silence_s
            connection.patience = max(attempt.due - time.monotonic(), 0.0)
        if MARKED not in head.headers:
            if "content-length" in head.headers:
                connection.patience = silence_s
                body = await connection.read_all(MOST_ANSWER_BYTES)
                exchange.took = took_of(head.headers.get(TOOK), body)
                await exchange.send(head.status, headers, body, False)
                return
            counted = PlainStream()
            while data := await connection.read():
                connection.patience = silence_s
                exchange.took, exchange.passed = counted.push(data), True
                await exchange.send(head.status, headers, data, True)
            exchange.took = counted.end()
            await exchange.send(head.status, headers, b"", False)
            return
        begun = False
        while data := await connection.read():
            connection.patience = silence_s
            try:
                passed = progress.push(data)
            except ValueError as error:
                raise WorkerLost(f"{attempt.worker.name} sent a malformed stream: {error}") from error
            if passed:
                await exchange.send(head.status, headers, passed, not progress.ended)
                if not begun and silence_s == inf and (write := exchange.write) is not None:
                    connection.hand_over(partial(progress.take, write))
                begun = True
            if progress.ended:
                await connection.finish()
                return
        raise WorkerLost(f"{attempt.worker.name} broke off an answer: {progress.error or 'no end'}")

    def _end(self, attempt: Attempt) -> None:
        if attempt.span is not None:
            whole = attempt.connection.reusable
            attempt.span.end(
                {"http.response.status_code": attempt.head.status}, "" if whole else "broken_off"
            )
        attempt.worker.pool.release(attempt.connection)
        self.router.done(attempt.placement.worker)


@lru_cache(256)  # it checks all its values, and few limits are in use
def _sampling(most_tokens: int | None) -> Sampling:
    return Sampling(max_tokens=most_tokens)


def _headers(head: Head) -> dict[str, str]:
    return {name: head.headers[name] for name in PASSED_ON if name in head.headers}


def nobody(registry: Registry, model: str, path: str, unable: Collection[str]) -> StrettoError:
    """Why no worker takes a request to that path. `unable`: the workers that do not know it."""
    able = [worker for worker in registry.workers.values() if worker.name not in unable]
    if unable and not able:
        return NotImplementedHere(f"no worker knows {path}: all of them are servers of another kind")
    known = {name for worker in registry.workers.values() for name in worker.models}
    if known and model not in known:
        return UnknownModel(
            f"there is no model {model!r}; the workers have {', '.join(sorted(known))}", param="$.model"
        )
    return Unavailable("no worker is ready; try again soon", retry_after=1.0)
