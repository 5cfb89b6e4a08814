"""HTTP/1.1 to the workers: pooled connections, bodies as they arrive, backpressure, and cancellation.

Parsing is httptools', as in the server. Nothing here knows what a request means.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

import httptools

from stretto.errors import Unavailable

HIGH_WATER = 256 * 1024  # bytes that wait for the reader before the socket is paused
IDLE_S = 30.0  # an idle connection is closed after this, because a worker may close it soon too
SOON_S = 1.0  # before a worker would close it: the time that it says, less this
RACE_S = 1.0  # a kept connection that is closed so soon after a request was closed because it was idle
WARM_S = 5.0  # within which a connection that is kept for later must open
END_S = 1.0  # within which the end of a body must follow its last bytes
MAX_IDLE = 256  # connections kept open to one worker
MOST_BARE = 256 * 1024  # bytes of headers and the like, which wait in memory until they are whole
STALLED_S = 0.1  # a timer that comes so late says that this process was stopped
RELOAD_S = 10.0  # after which trusted certificates are read again if one is not valid
FINAL = 200  # statuses below announce another response
T = TypeVar("T")
BASE = "/v1"  # which OpenAI's clients have at the end of a URL, and all paths here begin with


class WorkerLost(Unavailable):
    """The connection to a worker failed, or the worker broke HTTP."""

    code = "worker_lost"


class ClosedWhenIdle(WorkerLost):
    """The worker closed a kept connection just as a request was sent on it, and so has not begun on it."""


class WorkerSilent(WorkerLost):
    """The worker sent nothing for as long as it may."""

    status = 504
    code = "worker_timeout"


class Address(NamedTuple):
    """Where a worker listens."""

    host: str
    port: int
    tls: bool
    path: str  # in front of every path, without a slash at its end

    @classmethod
    def of(cls, url: str) -> Address:
        """Raises ValueError for a text that is no http or https URL, or has more than a host and a path."""
        form = "write http://HOST:PORT"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ValueError(f"{url!r} is no URL of a worker: {form}") from None
        if parts.username is not None or parts.password is not None:  # a secret, so it is not repeated
            raise ValueError(f"the URL of the worker {parts.hostname} has a user or a password: {form}")
        plain = url.isascii() and url.isprintable() and " " not in url
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not plain:
            raise ValueError(f"{url!r} is no URL of a worker: {form}")
        if parts.query or parts.fragment:
            raise ValueError(f"{url!r} has more than the address of a worker: {form}")
        tls = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix(BASE)
        return cls(parts.hostname, port or (443 if tls else 80), tls, path)

    @property
    def authority(self) -> str:
        """Host and port, as URLs and the header Host have them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(slots=True)
class Head:
    """The status line and the headers of a response."""

    status: int
    headers: dict[str, str]


class UpstreamConnection(asyncio.Protocol):
    """One connection. It carries one exchange at a time.

    `patience`: seconds that the worker may send nothing of what is waited for.
    """

    def __init__(self) -> None:
        self.open = True
        self.patience = inf
        self._idle_since = time.monotonic()
        self._lasts = IDLE_S  # seconds that it is kept idle
        self._kept = False  # whether it was idle before this exchange
        self._heard = False  # whether anything of the response has come
        self._begun = False  # whether anything of its body has come
        self._sent = 0.0  # when the request was sent
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._head: asyncio.Future[Head] | None = None
        self._status_headers: dict[str, str] = {}
        self._chunks: deque[bytes] = deque()
        self._waiting = 0
        self._paused = False
        self._done = True
        self._error: WorkerLost | None = None
        self._arrived: asyncio.Future[None] | None = None
        self._taker: Callable[[bytes], bool] | None = None
        self._bare = 0  # bytes since the last that belonged to a body
        self._interim = False  # whether the response only says that another one follows
        self._until_closed = False  # whether the body ends with the connection

    async def exchange(self, request: bytes) -> Head:
        """Sends a request and waits for the head of its response. Raises WorkerLost."""
        assert self._transport is not None and self._done
        self._parser = httptools.HttpResponseParser(self)
        self._status_headers, self._done, self._taker, self._bare = {}, False, None, 0
        self._until_closed = self._heard = self._begun = False
        self._sent = time.monotonic()
        self._head = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._within_patience(self._head)
        except asyncio.CancelledError:
            self.close()
            raise

    async def read(self) -> bytes:
        """What has arrived of the body since the last call; empty at its end. Raises WorkerLost."""
        while not self._chunks:
            if self._done:
                return b""
            if self._error is not None:
                raise self._error
            self._arrived = asyncio.get_running_loop().create_future()
            await self._within_patience(self._arrived)
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._waiting = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    def hand_over(self, taker: Callable[[bytes], bool]) -> None:
        """From now on, while `read` waits, what arrives goes to `taker` at once, which costs no turn of the
        event loop. If it returns False, `read` gets it. A ValueError that it raises ends the exchange."""
        self._taker = taker

    async def read_all(self, limit: int) -> bytes:
        """The whole body. Raises WorkerLost, also for more than `limit` bytes."""
        chunks: list[bytes] = []
        size = 0
        while chunk := await self.read():
            size += len(chunk)
            if size > limit:
                self.close()
                raise WorkerLost(f"a worker answered more than {limit} bytes")
            chunks.append(chunk)
        return b"".join(chunks)

    async def finish(self) -> None:
        """Takes the end of a body that has told all. A connection on which it does not come is closed."""
        if self._done:  # nearly always: it comes with the last bytes
            return
        try:
            async with asyncio.timeout(END_S):
                while not self._done:
                    await self.read()
        except (WorkerLost, TimeoutError):
            self.close()

    @property
    def reusable(self) -> bool:
        """Whether the exchange is over and the connection can carry another one."""
        return self.open and self._done

    @property
    def lasting(self) -> bool:
        """Whether it is reusable, and the worker will not close it at once because it has been idle."""
        return self.reusable and time.monotonic() - self._idle_since < self._lasts

    def keep(self) -> None:
        """From now on it is idle."""
        self._kept, self._idle_since, self.patience = True, time.monotonic(), inf

    def close(self) -> None:
        """Closes the connection. The worker takes that as the end of its client, and cancels the work."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    def lose(self) -> None:
        """The worker is known to be lost: ends the exchange in WorkerLost."""
        self._fail("the worker does not answer")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None and self._until_closed and not self._done and self._error is None:
            self.open, self._done = False, True
            self._wake()
        elif self._kept and not (self._done or self._heard) and time.monotonic() - self._sent < RACE_S:
            self._fail("the worker closed an idle connection", ClosedWhenIdle)
        else:
            self._fail("the worker closed the connection")

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._done:
            self._fail("the worker sent bytes that nobody asked for")
            return
        self._heard = True
        self._bare += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail("the worker's response is not HTTP/1.1")
            return
        if self._bare > MOST_BARE:
            self._fail(f"the worker sent more than {MOST_BARE} bytes of headers")
            return
        chunks, taker, arrived = self._chunks, self._taker, self._arrived
        if not chunks:
            return
        if taker is None or self._done or arrived is None or arrived.done():
            self._wake()
        else:
            # The reader has all that came before.
            try:
                if taker(chunks[0] if len(chunks) == 1 else b"".join(chunks)):
                    chunks.clear()
                    self._waiting = 0
                    return
            except ValueError as error:
                chunks.clear()
                self._fail(f"the worker sent a malformed stream: {error}")
                return
            self._wake()
        if self._waiting > HIGH_WATER and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._status_headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status, headers = self._parser.get_status_code(), self._status_headers
        self._interim = status < FINAL
        if self._interim:
            self._status_headers = {}
            return
        chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        self._until_closed = not chunked and "content-length" not in headers
        self._lasts = min(IDLE_S, _announced(headers.get("keep-alive", "")) - SOON_S)
        if self._head is not None and not self._head.done():
            self._head.set_result(Head(status, headers))

    def on_body(self, body: bytes) -> None:
        self._bare, self._begun = 0, True
        self._chunks.append(body)
        self._waiting += len(body)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if self._interim:
            return
        self._done = True
        self.open = self.open and self._parser.should_keep_alive()
        self.keep()
        self._wake()

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    async def _within_patience(self, coming: asyncio.Future[T]) -> T:
        if self.patience == inf:  # nearly always: reports tell whether a Stretto is well
            return await coming
        loop = asyncio.get_running_loop()
        due = loop.time() + self.patience
        timer = loop.call_at(due, self._silent, coming, due)
        try:
            return await coming
        finally:
            timer.cancel()

    def _silent(self, coming: asyncio.Future[Any], due: float) -> None:
        """Its patience has ended at `due`."""
        loop = asyncio.get_running_loop()
        if coming.done():
            return
        if loop.time() > due + STALLED_S:  # what has come meanwhile is read first
            loop.call_later(STALLED_S, self._silent, coming, inf)
        elif self._begun:
            self._fail(f"the worker has sent nothing for {self.patience:.3g} s", WorkerSilent)
        else:
            waited = time.monotonic() - self._sent
            self._fail(f"the worker has not begun its answer after {waited:.3g} s", WorkerSilent)

    def _fail(self, reason: str, kind: type[WorkerLost] = WorkerLost) -> None:
        self.open = False
        self._error = kind(reason)
        if self._head is not None and not self._head.done():
            self._head.set_exception(self._error)
            self._head.exception()  # it may be that nobody waits any more
        self._wake()
        if self._transport is not None:
            self._transport.abort()


def _announced(keep_alive: str) -> float:
    """The seconds that a worker keeps an idle connection, as its header Keep-Alive says; inf without one."""
    for each in keep_alive.split(","):
        name, _, value = each.partition("=")
        if name.strip().lower() == "timeout" and value.strip().isdecimal():
            return float(value)
    return inf


@dataclass(slots=True)
class Pool:
    """The connections to one worker, and how long its network takes.

    `round_trip`: seconds of a short exchange, smoothed. `streams` hold a function for each exchange and each
    session, to call when the worker is lost.
    """

    address: Address
    tls: ssl.SSLContext | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    round_trip: float = 0.0
    streams: set[Callable[[], None]] = field(default_factory=set[Callable[[], None]])
    _trusted: float = -inf  # when the trusted certificates were read
    _idle: list[UpstreamConnection] = field(default_factory=list[UpstreamConnection])
    _warming: asyncio.Task[None] | None = None

    async def acquire(self, within: float) -> UpstreamConnection:
        """An idle connection, or a new one. Raises WorkerLost when none can be made `within` seconds."""
        while self._idle:
            connection = self._idle.pop()
            if connection.lasting:
                return connection
            connection.close()
        return await self._connect(within)

    async def send(
        self, connection: UpstreamConnection, request: Callable[[], bytes], within: float
    ) -> tuple[UpstreamConnection, Head]:
        """Sends a request on a connection that was acquired. Returns the one that carries the response, which
        the caller releases, and the response's head. Raises WorkerLost; then the connection is closed.

        A worker may close a kept connection just as a request is sent on it. Then it has not begun on the
        request, which is sent once more over a connection that is made `within` seconds.
        """
        try:
            return connection, await self._send(connection, request())
        except ClosedWhenIdle:
            fresh = await self._connect(within)
            fresh.patience = connection.patience
            return fresh, await self._send(fresh, request())

    async def _send(self, connection: UpstreamConnection, request: bytes) -> Head:
        self.streams.add(connection.lose)
        try:
            return await connection.exchange(request)
        except BaseException:
            self.drop(connection)
            raise

    @property
    def idle(self) -> int:
        """How many connections are open and carry nothing."""
        return sum(each.open for each in self._idle)

    def warm(self, count: int) -> None:
        """Has idle connections opened until `count` are open. Returns at once; a failure changes nothing."""
        self._idle = [each for each in self._idle if each.open]
        if self._warming is None and sum(each.lasting for each in self._idle) < count:
            self._warming = asyncio.create_task(self._open_one())
            self._warming.add_done_callback(self._warmed)

    async def _open_one(self) -> None:
        connection = await self._connect(WARM_S)
        self.release(connection)

    def _warmed(self, task: asyncio.Task[None]) -> None:
        self._warming = None
        if not task.cancelled():
            task.exception()  # the next report finds out

    def release(self, connection: UpstreamConnection) -> None:
        """Gives a connection back. One whose exchange is not over is closed, which cancels the exchange."""
        if connection.lasting and len(self._idle) < MAX_IDLE:
            self.streams.discard(connection.lose)
            connection.keep()
            self._idle.append(connection)
        else:
            self.drop(connection)

    def drop(self, connection: UpstreamConnection) -> None:
        """Closes a connection, which cancels its exchange."""
        self.streams.discard(connection.lose)
        connection.close()

    def lose(self) -> None:
        """The worker is known to be lost: ends all exchanges and sessions."""
        for tell in list(self.streams):
            tell()

    def request(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
        """The bytes of a request to this worker."""
        address = self.address
        lines = [f"{method} {address.path}{path} HTTP/1.1", f"Host: {address.authority}"]
        lines += [f"{name}: {value}" for name, value in {**self.headers, **headers}.items()]
        lines.append(f"Content-Length: {len(body)}")
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body

    def close(self) -> None:
        """Closes all idle connections."""
        if self._warming is not None:
            self._warming.cancel()
        while self._idle:
            self._idle.pop().close()

    def context(self) -> ssl.SSLContext:
        """What checks the worker's certificate. It takes a while to make, so it is kept."""
        if self.tls is None:
            self.tls, self._trusted = ssl.create_default_context(), time.monotonic()
        return self.tls

    async def _connect(self, within: float) -> UpstreamConnection:
        loop, address = asyncio.get_running_loop(), self.address
        try:
            async with asyncio.timeout(within):
                _, connection = await loop.create_connection(
                    UpstreamConnection,
                    address.host,
                    address.port,
                    ssl=self.context() if address.tls else None,
                )
        except ssl.SSLCertVerificationError as error:
            if time.monotonic() > self._trusted + RELOAD_S:
                self.tls = None  # the trusted ones may have been renewed
            raise WorkerLost(
                f"the certificate of {address.host} is not valid: {error.verify_message}"
            ) from error
        except (OSError, TimeoutError) as error:
            raise WorkerLost(
                f"no connection to {address.host}:{address.port}: {error or 'timeout'}"
            ) from error
        return connection

    def note_round_trip(self, seconds: float) -> None:
        """Smooths the round trip; a shorter one counts at once, because only queueing makes it longer."""
        known = self.round_trip
        self.round_trip = seconds if not known or seconds < known else known + 0.1 * (seconds - known)
