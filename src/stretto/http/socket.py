"""One WebSocket connection: uvicorn's protocol over websockets, with the limits that all connections share.

uvicorn limits neither the time of a handshake nor blocked sends. The application paces what it reads: while
it does not ask for the next message, nothing more is read from the client.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, cast

from msgspec import json
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.http11 import Response

from stretto.errors import InvalidHttp, StrettoError, UpgradeRequired
from stretto.http.limits import Edge
from stretto.protocol.parsing import JSON

# uvicorn would log every handshake, and with its traceback every message that is no UTF-8.
SILENT = logging.getLogger(f"{__name__}.uvicorn")
SILENT.setLevel(logging.CRITICAL + 1)
PING_S = 20.0  # between two pings, and until a client must have answered one


class SocketConnection(WebSocketsSansIOProtocol):
    """The protocol of a connection after its upgrade."""

    def __init__(
        self,
        config: Any,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.logger = SILENT
        cast(Any, self.conn).reject = partial(_reject, self.conn.reject)
        self._edge = cast(Edge, config.edge)
        self._since = self._edge.now
        self._blocked_since: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Takes the connection over."""
        super().connection_made(transport)
        self._edge.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection. The application sees a disconnect."""
        self._edge.connections.discard(self)
        super().connection_lost(exc)

    def check(self) -> None:
        """Ends what takes too long: a handshake, or a blocked send."""
        edge = self._edge
        if self._blocked_since is not None and edge.now - self._blocked_since > edge.send_timeout_s:
            self.abort("blocked_send")
        elif not self.handshake_complete and edge.now - self._since > edge.request_timeout_s:
            self.abort("request_timeout")

    def refuse(self, error: StrettoError) -> None:
        """Closes at once: a socket has no request that could be refused."""
        self.abort(error.code)

    def abort(self, reason: str) -> None:
        """Closes at once, without sending what is written."""
        self._edge.count(reason)
        self._edge.connections.discard(self)
        self.transport.abort()

    def handle_parser_exception(self) -> None:
        """Ends a connection whose bytes are no frames. uvicorn expects none of these before its 101."""
        if self.conn.close_sent is None:
            self.abort("invalid_http")
        else:
            super().handle_parser_exception()

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        self._blocked_since = self._edge.now
        super().pause_writing()

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._blocked_since = None
        super().resume_writing()


def _reject(plain: Callable[[int, str], Response], status: int, text: str) -> Response:
    """The answer to a handshake that is none, as every other error. websockets would send plain text."""
    response = plain(status, text)
    if not text:
        return response
    error: StrettoError = InvalidHttp(text.strip())
    if status == HTTPStatus.UPGRADE_REQUIRED:
        error = UpgradeRequired(text.strip())
    elif status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        error = StrettoError("an error inside the server; its log names the place")
    response.body = json.encode(error.body())
    for name, value in (("Content-Type", JSON), ("Content-Length", str(len(response.body)))):
        del response.headers[name]
        response.headers[name] = value
    return response
