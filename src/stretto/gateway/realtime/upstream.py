"""A WebSocket to a worker, for one session. Nothing here knows what an event means."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus

from msgspec import DecodeError, Struct, ValidationError, json
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, InvalidStatus, InvalidURI
from websockets.http11 import Response

from stretto.errors import StrettoError
from stretto.gateway.registry import CONNECT_S, Worker
from stretto.gateway.upstream.connection import WorkerLost
from stretto.http.socket import PING_S
from stretto.protocol.realtime.handshake import RelayedSession
from stretto.protocol.relay import RELAY

# websockets would log what a worker sends that is no WebSocket.
SILENT = logging.getLogger(f"{__name__}.websockets")
SILENT.setLevel(logging.CRITICAL + 1)
MOST_EVENT_BYTES = 64 << 20
WAITING_EVENTS = 16  # of a worker, before its socket is paused
CLOSE_S = 1.0  # for a worker's answer to the closing of a socket


class _ErrorObject(Struct):
    message: str = "the worker refused the session"
    type: str = "server_error"
    code: str = "worker_error"
    param: str | None = None


class _ErrorBody(Struct):
    error: _ErrorObject


class SessionRefused(StrettoError):
    """A worker refused a session. The error is the worker's own."""

    def __init__(self, response: Response) -> None:
        try:
            said = json.decode(response.body, type=_ErrorBody).error
        except (DecodeError, ValidationError):
            said = _ErrorObject()
        after = response.headers.get("retry-after", "")
        super().__init__(
            said.message, param=said.param, retry_after=float(after) if after.isdecimal() else None
        )
        self.status, self.type, self.code = response.status_code, said.type, said.code

    @property
    def elsewhere(self) -> bool:
        """Whether another worker may take the session."""
        return self.status == HTTPStatus.SERVICE_UNAVAILABLE


class _Connect(connect):
    """A worker that sends its gateway elsewhere is no worker."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


async def open_socket(
    worker: Worker, session: RelayedSession, headers: Mapping[str, str]
) -> ClientConnection:
    """A socket to the worker. Raises WorkerLost, or SessionRefused with the worker's answer."""
    address = worker.pool.address
    uri = f"ws{'s' * address.tls}://{address.authority}{address.path}{RELAY}?{session.query}"
    try:
        return await _Connect(
            uri,
            additional_headers={**worker.pool.headers, **headers},
            user_agent_header=None,
            compression=None,
            proxy=None,
            open_timeout=CONNECT_S + worker.patience_s,
            ping_interval=PING_S,
            ping_timeout=PING_S,
            close_timeout=CLOSE_S,
            max_size=MOST_EVENT_BYTES,
            max_queue=WAITING_EVENTS,
            logger=SILENT,
            ssl=worker.pool.context() if address.tls else None,
        )
    except InvalidStatus as error:
        raise SessionRefused(error.response) from None
    except (OSError, TimeoutError, InvalidHandshake, InvalidURI) as error:
        raise WorkerLost(f"no session at {worker.name}: {error or 'timeout'}") from None
