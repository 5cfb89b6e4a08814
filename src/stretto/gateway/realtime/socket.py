"""`/v1/realtime` at a gateway: each session is at one worker, and its events pass both ways as they are.

The worker has the conversation and its KV blocks, so a session cannot go on elsewhere. When the worker is
lost, the client gets an error and a close code that says so, and connects again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from stretto.errors import Draining, StrettoError, UpgradeRequired
from stretto.gateway.accounts.accounts import Account
from stretto.gateway.accounts.ledger import Ledger
from stretto.gateway.calls import Calls
from stretto.gateway.operations.metrics import GatewayMetrics
from stretto.gateway.realtime.meter import SessionMeter, SessionPlace, error_event, event_id_of
from stretto.gateway.realtime.upstream import SessionRefused, open_socket
from stretto.gateway.registry import UNKNOWN, Worker
from stretto.gateway.relay import ATTEMPTS, Relay, nobody
from stretto.gateway.routing.router import Ask
from stretto.gateway.upstream.connection import WorkerLost
from stretto.http.errors import internal
from stretto.http.exchange import KEY, Exchange
from stretto.protocol.realtime.handshake import (
    BAD_GATEWAY,
    BETA_HEADER,
    GOING_AWAY,
    NORMAL,
    OLDER_HEADER,
    PATH,
    POLICY,
    SESSION_ENDPOINT,
    RelayedSession,
    chosen,
    is_older,
    key_of,
    model_of,
)
from stretto.telemetry.metrics import Ended
from stretto.types import Objective, Sampling
from stretto.types import Request as EngineRequest

INTERNAL = 1011
NO_CODE = 1005  # stands for a close frame without a code; it must not be sent


class SocketClose(NamedTuple):
    """How a worker closed a session."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class RealtimeRelay:
    """The ASGI endpoint. A handshake that is refused gets an HTTP error."""

    relay: Relay
    ledger: Ledger
    calls: Calls
    metrics: GatewayMetrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One socket, from the handshake to its end. Raises StrettoError for one that is refused."""
        started, model = time.monotonic(), UNKNOWN
        exchange: Exchange = scope[KEY]
        await receive()  # the request to connect
        try:
            find = self._finder(scope)
            account = find()
            account.ensure("infer")
            exchange.tenant = account.tenant
            if self.calls.draining:
                raise Draining("the gateway is shutting down; ask another one", retry_after=1.0)
            name = self.relay.registry.model(model_of(scope["query_string"].decode("latin-1"))).name
            account.ensure_model(name)
            model = self.relay.registry.known(name)
            worker, socket = await self._open(scope, account.tenant, name)
            try:
                protocol = chosen(scope["subprotocols"])
                await send({"type": "websocket.accept", "subprotocol": protocol, "headers": []})
                place = SessionPlace(self.relay, self.ledger, self.metrics, worker, name, find)
                session = RelayedSocket(place, socket, exchange, receive, self.calls.closing)
                await self._run(session, exchange, account.record.id)
            finally:
                socket.transport.abort()  # nothing, unless the client left before its session began
                self.relay.router.done(worker.view)
        except Exception as error:
            if exchange.status is None:
                raise
            exchange.outcome = internal(error).code  # the connection ends, and the log names the place
        finally:
            label = "" if model == UNKNOWN else model
            exchange.ended = Ended(
                SESSION_ENDPOINT, exchange.outcome, time.monotonic() - started, model=label
            )

    def _finder(self, scope: Scope) -> Callable[[], Account]:
        headers, key = Headers(scope=scope), key_of(scope["subprotocols"])
        if key is not None and "authorization" not in headers:
            headers = Headers({"authorization": f"Bearer {key}"})
        ledger = self.ledger
        return lambda: ledger.accounts.find(headers, ledger.now())

    async def _run(self, session: RelayedSocket, exchange: Exchange, owner: str) -> None:
        """Runs a session to its end, and tells the client why it ended."""
        try:
            try:
                await self.calls.run(session.run(), None, owner)
                close = session.closed
                if close is None:
                    return  # the client has left
            except StrettoError as error:
                exchange.outcome = error.code
                await session.to_client(error_event(error))
                close = SocketClose(_code_of(error), error.code)
            await exchange({"type": "websocket.close", "code": close.code, "reason": close.reason})
        except OSError:
            pass  # the client has left meanwhile

    async def _open(self, scope: Scope, tenant: str, model: str) -> tuple[Worker, ClientConnection]:
        """A socket at the best worker that takes the session, which is counted there. Raises StrettoError."""
        relay, exchange = self.relay, cast(Exchange, scope[KEY])
        registry, router = relay.registry, relay.router
        headers = {"x-request-id": exchange.id}
        if is_older(scope["subprotocols"], Headers(scope=scope)):
            headers[BETA_HEADER] = OLDER_HEADER
        tiers = registry.tiers()
        usual = tiers["default"].objective if "default" in tiers else Objective()
        request = EngineRequest(
            id=relay.next_id(),
            model=model,
            prompt=(0,),
            arrival=time.monotonic(),
            sampling=Sampling(),
            tenant=tenant,
            objective=usual,
        )
        unable = {name for name, worker in registry.workers.items() if worker.plain}
        tried: set[str] = set()
        refusal: StrettoError | None = None
        while len(tried) < ATTEMPTS:
            view = router.place_session(Ask(request), time.monotonic(), tried | unable)
            if view is None:
                break
            worker = registry.workers[view.name]
            tried.add(worker.name)
            session = RelayedSession(
                tenant=tenant, model=model, site=view.site, age_ms=max(view.round_trip * 1e3, 0.0)
            )
            try:
                socket = await open_socket(worker, session, headers)
            except BaseException as error:
                router.done(view)
                if isinstance(error, WorkerLost):
                    registry.failed(worker, error.message, lost=True)
                elif not isinstance(error, SessionRefused) or not error.elsewhere:
                    raise
                refusal = error
                continue
            worker.breaker.succeed()
            relay.answered.add(tenant, exchange.id, worker.name)
            return worker, socket
        raise refusal or nobody(registry, model, PATH, unable)


class RelayedSocket:
    """One session. `closed`: how the worker closed it; None: the client left."""

    def __init__(
        self,
        place: SessionPlace,
        socket: ClientConnection,
        exchange: Exchange,
        receive: Receive,
        closing: asyncio.Event,
    ) -> None:
        self.closed: SocketClose | None = None
        self._meter = SessionMeter(place)
        self._worker = place.worker
        self._socket = socket
        self._exchange = exchange
        self._receive = receive
        self._closing = closing
        self._lost = asyncio.Event()

    async def run(self) -> None:
        """Passes events on until a side leaves. Raises StrettoError when the session must end, and WorkerLost
        when its worker is gone."""
        self._worker.pool.streams.add(self._lost.set)
        up, down = asyncio.create_task(self._up()), asyncio.create_task(self._down())
        gone, ending = asyncio.create_task(self._lost.wait()), asyncio.create_task(self._ending())
        tasks: set[asyncio.Task[object]] = {up, down, gone, ending}
        failure: StrettoError | None = None
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if down in done:
                self.closed = down.result()
            elif up in done:
                up.result()
            elif gone in done:
                raise WorkerLost("the worker does not answer; connect again")
            else:
                ending.result()
        except StrettoError as error:
            failure = error
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._worker.pool.streams.discard(self._lost.set)
            self._meter.close(failure)
            await self._leave(failure)

    async def to_client(self, event: str | bytes) -> None:
        """Sends the client an event. Raises OSError when the client has left."""
        kind = "text" if isinstance(event, str) else "bytes"
        await self._exchange({"type": "websocket.send", kind: event})

    async def _up(self) -> None:
        """From the client to the worker, until the client leaves. An event that may not pass is an error."""
        while (message := await self._receive())["type"] != "websocket.disconnect":
            event = _event_of(message)
            self._exchange.bytes_in += len(event)
            try:
                event = self._meter.asked(event)
            except StrettoError as error:
                try:
                    await self.to_client(error_event(error, event_id_of(event)))
                except OSError:
                    return
                continue
            try:
                await self._socket.send(event)
            except ConnectionClosed:
                await asyncio.get_running_loop().create_future()  # `_down` knows why

    async def _down(self) -> SocketClose | None:
        """From the worker to the client. Returns how the worker closed the session; None when the client has
        left. Raises WorkerLost."""
        try:
            while True:
                await self.to_client(self._meter.came(await self._socket.recv()))
        except ConnectionClosed as closed:
            said = closed.rcvd
            if said is None:
                raise WorkerLost("the worker is gone, and the session with it; connect again") from None
            return SocketClose(NORMAL if said.code == NO_CODE else said.code, said.reason)
        except OSError:
            return None

    async def _ending(self) -> None:
        """Waits until the session must end and no response is running. Raises Draining then."""
        waits = [asyncio.create_task(event.wait()) for event in (self._closing, self._worker.drained)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        await self._meter.idle.wait()
        what = "the gateway is shutting down" if self._closing.is_set() else "the worker is being drained"
        raise Draining(f"{what}; connect again")

    async def _leave(self, failure: StrettoError | None) -> None:
        """Closes the worker's side, which cancels what it computes for the session."""
        if isinstance(failure, WorkerLost):
            self._socket.transport.abort()
            self._worker.error = failure.message
        else:
            await self._socket.close(GOING_AWAY)


def _event_of(message: Message) -> str | bytes:
    return message.get("text") or message.get("bytes") or ""


def _code_of(error: StrettoError) -> int:
    """The close code of a session that ends in an error."""
    if isinstance(error, WorkerLost):
        return BAD_GATEWAY
    if isinstance(error, Draining):
        return GOING_AWAY
    return INTERNAL if error.status >= 500 else POLICY


async def explain(request: Request) -> None:
    """Answers a request that is no WebSocket handshake. Raises UpgradeRequired."""
    raise UpgradeRequired(f"{PATH} is a WebSocket: connect with one, as in ws://HOST:PORT{PATH}?model=NAME")
