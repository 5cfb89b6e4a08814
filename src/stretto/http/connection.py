"""One client connection: uvicorn's HTTP/1.1 protocol over httptools, with limits of size, number and time.

uvicorn limits neither headers nor the time of a request nor blocked sends, and it drops a body that comes
with an Upgrade. A request that exceeds a limit is answered by its handler, which gets the error from
`receive`, or here if it has no handler yet. Nothing after it is read, and the connection closes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import unquote

import httptools
import uvicorn
from uvicorn._types import ASGIReceiveEvent, ASGISendEvent
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from stretto.errors import (
    HeadersTooLarge,
    InvalidHttp,
    PipelineTooDeep,
    RequestTimeout,
    StrettoError,
    TooManyConnections,
)
from stretto.http.answer import bytes_of
from stretto.http.exchange import WATCH, WRITE, id_of
from stretto.http.limits import (
    HEAD_BYTES,
    HEADERS,
    KEEP_ALIVE_S,
    LINGER_BYTES,
    LINGER_S,
    PIPELINED,
    Edge,
)


class ConnectionConfig(uvicorn.Config):
    """uvicorn's configuration, and the edge that its connections share."""

    def __init__(self, app: Any, edge: Edge, **rest: Any) -> None:
        super().__init__(app, http=HttpConnection, **rest)
        self.edge = edge


class _Writer:
    """A transport whose `close` is the connection's own, and that writes the head of an answer together with
    what the handler sends in the same turn of the event loop: each write is a system call."""

    __slots__ = ("_close", "_held", "_loop", "_write", "is_closing", "write")

    def __init__(self, transport: asyncio.Transport, connection: HttpConnection) -> None:
        self._write = self.write = transport.write  # nothing stands between while nothing is held
        self._close = connection.close
        self._loop = connection.loop
        self._held = b""
        self.is_closing = transport.is_closing

    def hold(self) -> None:
        """The next bytes wait for those after them, or for the end of this turn."""
        if not self._held:
            self.write = self._keep

    def close(self) -> None:
        """Closes after all that was written."""
        self._flush()
        self._close()

    def _keep(self, data: bytes) -> None:
        self._held, self.write = data, self._write_both
        self._loop.call_soon(self._flush)

    def _write_both(self, data: bytes) -> None:
        data, self._held, self.write = self._held + data, b"", self._write
        self._write(data)

    def _flush(self) -> None:
        if self._held and not self.is_closing():
            self._write_both(b"")


class RequestCycle(RequestResponseCycle):
    """One request and its answer. If the answer begins before the body is there, the connection ends with it,
    because the rest of the body will not be read."""

    refusal: StrettoError | None = None
    received = 0
    gone: Callable[[], None] | None = None
    _keep_alive = False

    @property
    def keep_alive(self) -> bool:
        """Whether the connection lives on. uvicorn asks when the answer begins and when it ends."""
        if self.more_body:
            self._keep_alive = False
        return self._keep_alive

    @keep_alive.setter
    def keep_alive(self, value: bool) -> None:
        self._keep_alive = value

    async def send(self, message: ASGISendEvent) -> None:
        """Sends. The head of an answer waits for what follows it at once. The next chunk of a body takes the
        short way, because a stream has one for each token."""
        if not self.response_started:
            cast(_Writer, self.transport).hold()
        elif (chunk := cast(Any, message)).get("more_body") and self.write(chunk.get("body", b"")):
            return
        await super().send(message)

    def write(self, body: bytes) -> bool:
        """Writes more of a chunked body at once. Returns False if that is not possible now."""
        if (
            not self.chunked_encoding
            or self.response_complete
            or self.disconnected
            or self.flow.write_paused
            or self.scope["method"] == "HEAD"
        ):
            return False
        if body:
            self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return True

    async def receive(self) -> ASGIReceiveEvent:
        """The next piece of the body. Raises the error that ended the request, if one did."""
        event = await super().receive()
        if self.refusal is not None:
            try:
                raise self.refusal
            finally:
                # The error holds this frame. Without the way back, it is freed at once, and the body with it.
                self.refusal = None
        return event

    def watch(self, gone: Callable[[], None] | None) -> None:
        """Has `gone` called if the client leaves; None ends that. It sees the end of what is read on only."""
        self.gone = gone
        if gone is not None:
            self.flow.resume_reading()
            if self.disconnected:
                gone()

    def lose(self) -> None:
        """The client has left."""
        self.disconnected = True
        self.message_event.set()
        if self.gone is not None:
            self.gone()

    def refuse(self, error: StrettoError) -> None:
        """Makes `receive` raise `error`."""
        self.refusal = error
        self.message_event.set()


class CloseDelimited(RequestCycle):
    """A request cycle with a client of HTTP/1.0, which knows no chunks: the body ends with the connection."""

    async def send(self, message: ASGISendEvent) -> None:
        """Sends without framing: uvicorn takes each piece for a whole body of known length."""
        self.chunked_encoding = False
        self.expected_content_length = len(cast(Any, message).get("body", b""))
        await super().send(message)


class HttpConnection(HttpToolsProtocol):
    """The protocol of one connection. `since`: the edge's time when the client began to owe what it owes now:
    a request, the rest of one, or its end of the closing."""

    def __init__(
        self,
        config: ConnectionConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._edge = config.edge
        self._app = cast(Any, config).loaded_app
        self._since = self._edge.now
        self._blocked_since: float | None = None
        self._receiving = False  # A request has begun and is not complete.
        self._has_head = False  # Its headers are complete.
        self._deaf = False  # What comes is thrown away.
        self._closing = False
        self._size = 0  # Bytes of the request, without those of the chunk that is being parsed.
        self._chunk = 0
        self._thrown_away = 0
        self._error: StrettoError | None = None
        self._answering: RequestCycle | None = None

    # The connection begins and ends.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accepts the connection, or refuses it if too many are open and none can make room."""
        transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        super().connection_made(transport)
        edge = self._edge
        self._writer = _Writer(transport, self)
        if len(edge.connections) >= edge.hard_limit and not edge.make_room():
            self.abort("too_many_connections")
            return
        edge.connections.add(self)
        if len(edge.connections) > edge.max_connections and not edge.waiting:
            self.refuse(TooManyConnections("all connections are busy; try again", retry_after=1.0))
        edge.waiting[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection. The handler that is answering sees a disconnect."""
        self._forget()
        if self._answering is not None:
            self._answering.lose()
        super().connection_lost(exc)

    def close(self) -> None:
        """Closes after what is written has been sent.

        If the client may still be sending, only this direction closes at first. Closing both would make its
        system discard the answer.
        """
        if self._closing:
            return
        self._closing = True
        self._since = self._edge.now
        self._edge.waiting[self] = None
        self._edge.release(self)
        if self._receiving or self._deaf:
            self._deaf = True
            self.flow.resume_reading()
            self.transport.write_eof()
        else:
            self.transport.close()

    def abort(self, reason: str) -> None:
        """Closes at once, without sending what is written."""
        self._edge.count(reason)
        self._forget()
        self.transport.abort()

    def _forget(self) -> None:
        edge = self._edge
        edge.connections.discard(self)
        edge.waiting.pop(self, None)
        edge.release(self)

    # Time and refusals.

    def check(self) -> None:
        """Ends what takes too long: a request, a blocked send, an idle connection, or closing."""
        edge = self._edge
        waited = edge.now - self._since
        if self._blocked_since is not None and edge.now - self._blocked_since > edge.send_timeout_s:
            self.abort("blocked_send")
        elif self._closing:
            pending = self.transport.get_write_buffer_size()
            if waited > (edge.send_timeout_s if pending else LINGER_S):
                self._forget()
                self.transport.abort()
        elif self._receiving:
            if waited > edge.request_timeout_s:
                seconds = f"{edge.request_timeout_s:g} s"
                self.refuse(
                    RequestTimeout(f"the request did not arrive whole within {seconds}; send it again")
                )
        elif self in edge.waiting and waited > KEEP_ALIVE_S:
            self.close()

    def refuse(self, error: StrettoError) -> None:
        """Ends the request that is being received with `error`, and then the connection."""
        self._edge.count(error.code)
        self._edge.release(self)
        self._deaf = True
        cycle = self._open()
        if cycle is not None and self._receiving and self._has_head:
            cycle.refuse(error)
        elif cycle is not None:
            cycle.keep_alive = False  # The answers before this request come first.
        else:
            self.transport.write(bytes_of(error, id_of(self.headers or ())))
            self.close()
        self._receiving = False

    def _open(self) -> RequestCycle | None:
        """The cycle of the newest request, None if it is over."""
        cycle = cast(RequestCycle | None, self.cycle)
        return None if cycle is None or cycle.response_complete else cycle

    # Writing.

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        self._blocked_since = self._edge.now
        super().pause_writing()

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._blocked_since = None
        super().resume_writing()

    def on_response_complete(self) -> None:
        """An answer is complete: the next request of the pipeline begins, or the connection is idle."""
        self.server_state.total_requests += 1
        if self._closing or self.transport.is_closing():
            return
        self._answering = None
        if self.pipeline:
            self._start(cast(RequestCycle, self.pipeline.pop()[0]))
            return
        self.flow.resume_reading()
        self._edge.waiting[self] = None
        if not self._receiving:
            self._since = self._edge.now

    def _start(self, cycle: RequestCycle) -> None:
        self._answering = cycle
        self._start_asgi_task(cycle, self._app)

    # Reading. The parser calls the methods `on_...`; an error in one of them stops it.

    def data_received(self, data: bytes) -> None:
        """Parses what has come."""
        if self._deaf:
            self._thrown_away += len(data)
            if self._thrown_away > LINGER_BYTES:
                self.abort("flood")
            return
        self._chunk = len(data)
        if not self._receiving:
            self._size = 0
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
            if self._becomes_socket():
                self._become_socket(rest)
            else:
                self._ignore_upgrade(rest)
        except httptools.HttpParserError:
            self.refuse(self._error or InvalidHttp("the bytes are not an HTTP/1.1 request"))
        else:
            if self._receiving:
                self._measure()

    def _measure(self) -> None:
        """Refuses a request that is not complete yet and is too large already."""
        self._size += self._chunk
        if not self._has_head:
            if self._size > HEAD_BYTES:
                self.refuse(HeadersTooLarge(f"the headers may have {HEAD_BYTES} bytes; send fewer"))
            return
        cycle = cast(RequestCycle, self.cycle)
        if self._size > 2 * HEAD_BYTES + 2 * cycle.received:
            self.refuse(InvalidHttp("the body has more bytes of framing than of content; send larger chunks"))
        elif not cycle.response_complete:
            self._edge.hold(self, cycle.received)

    def _becomes_socket(self) -> bool:
        """Whether the request is the handshake of a WebSocket, and no answer comes before it."""
        modern = self.parser.get_http_version() == "1.1" and self.parser.get_method() == b"GET"
        keyed = any(name == b"sec-websocket-key" for name, _ in self.headers)
        return modern and keyed and self._should_upgrade() and self._open() is None

    def _become_socket(self, rest: bytes) -> None:
        """Gives the connection to uvicorn's WebSocket protocol, and `rest`, which uvicorn would drop."""
        self._forget()
        self.handle_websocket_upgrade()
        if rest and not self.transport.is_closing():
            cast(asyncio.Protocol, self.transport.get_protocol()).data_received(rest)

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Parses the request again without its Upgrade, as the parser takes the body for another protocol."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.refuse(InvalidHttp("this server is no proxy; send another method than CONNECT"))
            return
        version = self.parser.get_http_version().encode()
        head = [method, b" ", self.url, b" HTTP/", version, b"\r\n"]
        for name, value in self.headers:
            if name != b"upgrade":
                head += [name, b": ", value, b"\r\n"]
        self._receiving = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.data_received(b"".join([*head, b"\r\n", rest]))

    def on_message_begin(self) -> None:
        """A request begins."""
        if len(self.pipeline) >= PIPELINED:
            self._fail(PipelineTooDeep(f"at most {PIPELINED} requests may wait for an answer"))
        super().on_message_begin()
        self._receiving = True
        self._has_head = False
        self._since = self._edge.now

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header. Raises HeadersTooLarge for too many. A header after the body is ignored."""
        if self._has_head:
            return
        if len(self.headers) >= HEADERS:
            self._fail(HeadersTooLarge(f"a request may have {HEADERS} headers; send fewer"))
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Starts the handler, or queues it behind the unanswered requests of the connection."""
        if self._size + self._chunk > HEAD_BYTES:
            self._measure_head()
        self.scope["method"] = self.parser.get_method().decode("ascii")
        if self.parser.should_upgrade():
            return
        self._has_head = True
        version = self.parser.get_http_version()
        self._set_target()
        modern = version == "1.1"
        if not modern:
            self.scope["http_version"] = version
        before = self._open()
        self.cycle = (RequestCycle if modern else CloseDelimited)(
            scope=self.scope,
            transport=cast(asyncio.Transport, self._writer),
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=modern and self.expect_100_continue,
            keep_alive=modern and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        scope = cast("dict[str, Any]", self.scope)
        scope[WRITE], scope[WATCH] = self.cycle.write, self.cycle.watch
        if before is None:
            self._start(self.cycle)
        else:
            self.pipeline.appendleft((self.cycle, self._app))

    def _set_target(self) -> None:
        """Puts the path of the request line into the scope. A host in that line counts, not the header."""
        # Two slashes would begin with a host, but only a whole URL may name one here.
        target = httptools.parse_url(b"/" + self.url.lstrip(b"/") if self.url[:1] == b"/" else self.url)
        path = target.path or b"/"
        text = path.decode("ascii")
        self.scope["path"] = unquote(text) if "%" in text else text
        self.scope["raw_path"] = path
        self.scope["query_string"] = target.query or b""
        if target.host:
            host = b"%s:%d" % (target.host, target.port) if target.port else target.host
            self.headers[:] = [(b"host", host), *(pair for pair in self.headers if pair[0] != b"host")]

    def _measure_head(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > HEAD_BYTES:
            self._fail(HeadersTooLarge(f"the headers may have {HEAD_BYTES} bytes; send fewer"))

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        cycle = cast(RequestCycle, self.cycle)
        if cycle.response_complete or self.parser.should_upgrade():
            return
        cycle.received += len(body)
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        """The request is complete."""
        if self.parser.should_upgrade():
            return
        self._receiving = False
        self._size = -self._chunk  # What follows in this chunk belongs to the next request.
        self._edge.waiting.pop(self, None)
        self._edge.release(self)
        cycle = cast(RequestCycle, self.cycle)
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()

    def _fail(self, error: StrettoError) -> None:
        """Stops the parser with `error`."""
        self._error = error
        raise error
