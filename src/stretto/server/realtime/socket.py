"""`/v1/realtime`: the handshake, the pace of events, and how a socket ends."""

from __future__ import annotations

import asyncio
import time
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from stretto.errors import Draining, SessionExpired, StrettoError, UnsupportedField, UpgradeRequired
from stretto.http.errors import internal
from stretto.http.exchange import KEY, Exchange
from stretto.server.realtime.outbox import Outbox
from stretto.server.realtime.session import Session
from stretto.server.state import Server
from stretto.telemetry.metrics import Ended

PATH = "/v1/realtime"
PROTOCOL = "realtime"
KEY_PROTOCOL = "openai-insecure-api-key."  # a browser cannot send headers, so the key comes as a protocol
OLDER_PROTOCOL, OLDER_HEADER = "openai-beta.realtime-v1", "realtime=v1"
NORMAL, GOING_AWAY = 1000, 1001
EVENTS_PER_S = 500.0
BURST = 1000.0
ENDPOINT = "realtime_session"


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
    """The ASGI endpoint. A handshake that is refused gets an HTTP error."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One socket, from the handshake to its end. Raises StrettoError for one that is refused."""
        server, started = self._server, time.monotonic()
        exchange: Exchange = scope[KEY]
        await receive()  # the request to connect
        headers = Headers(scope=scope)
        protocols: list[str] = scope["subprotocols"]
        tenant = exchange.tenant = server.tenant(_with_key(headers, protocols))
        server.gate.ensure_open()
        model = self._model(scope)
        server.socket_opened(tenant)
        try:
            await send({"type": "websocket.accept", "subprotocol": _chosen(protocols), "headers": []})
            older = OLDER_PROTOCOL in protocols or OLDER_HEADER in headers.get("openai-beta", "")
            outbox = Outbox(send, older=older)
            session = Session(server, tenant, model, outbox, exchange.id)
            await self._run(session, outbox, receive, exchange)
        except Exception as error:
            if exchange.status is None:
                raise
            exchange.outcome = internal(error).code  # the connection ends, and the log names the place
        finally:
            server.socket_closed(tenant)
            exchange.ended = Ended(ENDPOINT, exchange.outcome, time.monotonic() - started, model=model)

    def _model(self, scope: Scope) -> str:
        """The model that the handshake names, or the default. Raises UnknownModel and UnsupportedField."""
        query = parse_qs(scope["query_string"].decode("latin-1"))
        for name in ("call_id", "intent"):
            if name in query:
                raise UnsupportedField(f"{name}: this server has no audio; leave it out", param=name)
        model = query.get("model", [next(iter(self._server.texts))])[-1]
        self._server.ensure_known(model)
        return model

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
                    await session.handle(body, time.monotonic())
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
    key = next((each.removeprefix(KEY_PROTOCOL) for each in protocols if each.startswith(KEY_PROTOCOL)), None)
    if key is None or "authorization" in headers:
        return headers
    return Headers({"authorization": f"Bearer {key}"})


def _chosen(protocols: list[str]) -> str | None:
    """The protocol to speak: the usual one, or the first that is no key. A browser wants one of its own."""
    if PROTOCOL in protocols:
        return PROTOCOL
    return next((each for each in protocols if not each.startswith(KEY_PROTOCOL)), None)
