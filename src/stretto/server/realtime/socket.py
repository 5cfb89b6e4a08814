"""`/v1/realtime`: the handshake, the pace of events, and how a socket ends."""

from __future__ import annotations

import asyncio
import time

from msgspec import UNSET
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from stretto.errors import Draining, SessionExpired, StrettoError, UpgradeRequired
from stretto.http.errors import internal
from stretto.http.exchange import KEY, Exchange
from stretto.protocol.realtime.handshake import (
    GOING_AWAY,
    NORMAL,
    PATH,
    SESSION_ENDPOINT,
    RelayedSession,
    chosen,
    is_older,
    key_of,
    model_of,
)
from stretto.server.realtime.outbox import Outbox
from stretto.server.realtime.session import Session
from stretto.server.realtime.turn import SessionClient
from stretto.server.state import Server
from stretto.telemetry.metrics import Ended
from stretto.text.output import AnswerPlace

EVENTS_PER_S = 500.0
BURST = 1000.0


class EventPace:
    """How fast a client's events are taken: `BURST` at once, then `EVENTS_PER_S`. Later ones wait
    unread, so none is lost."""

    def __init__(self) -> None:
        self._saved, self._since = BURST, time.monotonic()

    async def take(self) -> None:
        """Returns when the next event may be handled."""
        now = time.monotonic()
        self._saved = min(BURST, self._saved + (now - self._since) * EVENTS_PER_S) - 1
        self._since = now
        if self._saved < 0:
            await asyncio.sleep(-self._saved / EVENTS_PER_S)


class RealtimeSockets:
    """The ASGI endpoint. A handshake that is refused gets an HTTP error. `relayed`: its clients are gateways,
    which name the tenant."""

    def __init__(self, server: Server, *, relayed: bool = False) -> None:
        self._server = server
        self._relayed = relayed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One socket, from the handshake to its end. Raises StrettoError for one that is refused."""
        server, started = self._server, time.monotonic()
        exchange: Exchange = scope[KEY]
        await receive()  # the request to connect
        protocols: list[str] = scope["subprotocols"]
        client = self._client(scope, exchange)
        server.gate.ensure_open()
        server.ensure_known(client.model)
        server.socket_opened(client.tenant)
        try:
            await send({"type": "websocket.accept", "subprotocol": chosen(protocols), "headers": []})
            outbox = Outbox(send, older=is_older(protocols, Headers(scope=scope)))
            session = Session(server, client, outbox)
            await self._run(session, outbox, receive, exchange)
        except Exception as error:
            if exchange.status is None:
                raise
            exchange.outcome = internal(error).code  # the connection ends, and the log names the place
        finally:
            server.socket_closed(client.tenant)
            exchange.ended = Ended(
                SESSION_ENDPOINT, exchange.outcome, time.monotonic() - started, model=client.model
            )

    def _client(self, scope: Scope, exchange: Exchange) -> SessionClient:
        """Who opens the session, and its model. Raises StrettoError for one that may not."""
        server, query = self._server, scope["query_string"].decode("latin-1")
        tenant = exchange.tenant = server.tenant(_with_key(Headers(scope=scope), scope["subprotocols"]))
        if not self._relayed:
            model = model_of(query)
            return SessionClient(tenant, next(iter(server.texts)) if model is None else model, exchange.id)
        server.ensure_gateway(tenant, "relay sessions")
        given = RelayedSession.of(query)
        exchange.tenant = given.tenant
        place = AnswerPlace(given.site or UNSET)
        return SessionClient(given.tenant, given.model, exchange.id, place, given.age_ms / 1e3)

    async def _run(self, session: Session, outbox: Outbox, receive: Receive, exchange: Exchange) -> None:
        """Handles events until the client leaves or the session must end."""
        sending = asyncio.create_task(outbox.run())
        session.greet()
        try:
            end = await self._until_end(session, outbox, receive, exchange)
            if end is None:
                outbox.drop()
            else:
                outbox.error(end)
        finally:
            await session.leave()
            outbox.finish()
            await asyncio.wait({sending})
        if end is not None:
            code = GOING_AWAY if isinstance(end, Draining) else NORMAL
            try:
                await exchange({"type": "websocket.close", "code": code, "reason": end.code})
            except OSError:
                pass  # the client has left meanwhile

    async def _until_end(
        self, session: Session, outbox: Outbox, receive: Receive, exchange: Exchange
    ) -> StrettoError | None:
        """Why the session ends; None: the client has left."""
        server, pace = self._server, EventPace()
        closing = asyncio.create_task(server.closing.wait())
        receiving: asyncio.Task[Message] | None = None
        try:
            while True:
                receiving = receiving or asyncio.ensure_future(receive())
                turn = None if session.turn is None else session.turn.task
                if closing.done() and turn is None:
                    return Draining("the server is shutting down; connect again")
                others = {turn} if closing.done() and turn is not None else {closing}
                patience = server.config.session_timeout_s
                await asyncio.wait(
                    {receiving, *others}, timeout=patience, return_when=asyncio.FIRST_COMPLETED
                )
                if receiving.done():
                    message, receiving = receiving.result(), None
                    if message["type"] == "websocket.disconnect":
                        return None
                    body = message.get("bytes") or (message.get("text") or "").encode(errors="replace")
                    exchange.bytes_in += len(body)
                    await session.handle(body)
                    await outbox.has_room()
                    await pace.take()
                elif not closing.done() and session.turn is None:
                    return SessionExpired(f"no event came within {patience:g} s; connect again")
        except ClientDisconnect:
            return None
        finally:
            closing.cancel()
            if receiving is not None:
                receiving.cancel()


async def explain(request: Request) -> None:
    """Answers a request that is no WebSocket handshake. Raises UpgradeRequired."""
    raise UpgradeRequired(f"{PATH} is a WebSocket: connect with one, as in ws://HOST:PORT{PATH}?model=NAME")


def _with_key(headers: Headers, protocols: list[str]) -> Headers:
    """The headers, with a key that came as a protocol."""
    key = key_of(protocols)
    if key is None or "authorization" in headers:
        return headers
    return Headers({"authorization": f"Bearer {key}"})
