"""An HTTP/1.1 client for streamed answers, cheap enough to read 50,000 tokens a second on one core.

Knows sockets, SSE and the few fields of OpenAI's events that a measurement needs; knows no statistics.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncGenerator, Callable
from typing import cast
from urllib.parse import urlsplit

import httptools
import msgspec
from msgspec import Struct

from stretto.bench.metrics import Sample
from stretto.errors import StartError

DATA = b"data:"
DONE = b"[DONE]"
OVERDUE = "deadline"
OnEvent = Callable[[bytes, float], None]


class StreamedDelta(Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class StreamedChoice(Struct):
    text: str | None = None
    delta: StreamedDelta | None = None
    finish_reason: str | None = None


class ChunkUsage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ChunkError(Struct):
    message: str = ""
    type: str | None = None
    code: str | int | None = None


class Chunk(Struct):
    """What is read of one event of either endpoint; all else is skipped without being built."""

    choices: list[StreamedChoice] = []
    usage: ChunkUsage | None = None
    error: ChunkError | None = None

    @property
    def text(self) -> str:
        """The text of the first choice, reasoning included."""
        choice = self.choices[0]
        if choice.delta is None:
            return choice.text or ""
        return choice.delta.content or choice.delta.reasoning_content or ""

    @property
    def calls(self) -> bool:
        """Whether the first choice brings a piece of a tool call."""
        delta = self.choices[0].delta
        return delta is not None and bool(delta.tool_calls)


decode_chunk = msgspec.json.Decoder(Chunk).decode


class RequestFailed(Exception):
    """A request that got no whole answer. `kind` is short enough to count by."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail


class Target(Struct, frozen=True, kw_only=True):
    """Where a server is: `prefix` ends in `/v1`, `host` is as in the Host header."""

    host: str
    address: str
    port: int
    tls: bool
    prefix: str

    @classmethod
    def of(cls, url: str) -> Target:
        """Parses `http://host:port`, with or without `/v1`. Raises StartError when it is no such URL."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise StartError(f"{url!r} is not a server's address: give one like http://127.0.0.1:8000")
        tls = parts.scheme == "https"
        path = parts.path.rstrip("/")
        return cls(
            host=parts.netloc.rpartition("@")[2],
            address=parts.hostname,
            port=port or (443 if tls else 80),
            tls=tls,
            prefix=path if path.endswith("/v1") else f"{path}/v1",
        )


class Connection(asyncio.Protocol):
    """One socket, one request at a time. Hands each whole SSE event, or a plain body, to the reader."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._tail = b""
        self._now = 0.0
        self._whole = False
        self._lost = False
        self.status = 0
        self.body = b""
        self.heard = False

    async def exchange(self, message: bytes, on_event: OnEvent | None) -> None:
        """Send a request and read its answer to the end. Raises ConnectionError when the socket is lost.

        With status 200, each event's data and its time go to `on_event`; any other body is left in `body`.
        """
        if self._transport is None or self._lost:
            raise ConnectionResetError("the connection is lost")
        self._done = asyncio.get_running_loop().create_future()
        self._on_event = on_event
        self._parser = httptools.HttpResponseParser(self)
        self._tail, self.body, self.status, self.heard, self._whole = b"", b"", 0, False, False
        self._transport.write(message)
        await self._done

    @property
    def reusable(self) -> bool:
        """Whether the answer was read whole and another request may follow on this socket."""
        return self._whole and self._keep and not self._lost

    def close(self) -> None:
        """Cut the socket: the server takes it as a cancellation of what is under way."""
        self._lost = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        self._now, self.heard = time.perf_counter(), True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(ConnectionResetError("the server closed the connection"))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._keep = self._parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        if self.status != 200 or self._on_event is None:
            self.body += data
            return
        *events, self._tail = (self._tail + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            if not event.startswith(DATA):
                event = event[event.find(b"\ndata:") + 1 :]
            if event.startswith(DATA):
                self._on_event(event[5:].strip(), self._now)

    def on_message_complete(self) -> None:
        self._whole = True
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _fail(self, error: ConnectionError) -> None:
        self._lost = True
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


class Reading:
    """What one streamed answer has shown so far."""

    __slots__ = (
        "ended",
        "error",
        "finished",
        "on_text",
        "output_tokens",
        "prompt_tokens",
        "reason",
        "stamps",
    )

    def __init__(self, on_text: Callable[[str], None] | None) -> None:
        self.stamps: list[float] = []
        self.ended = 0.0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.finished = False
        self.error: RequestFailed | None = None
        self.reason: str | None = None
        self.on_text = on_text

    def __call__(self, data: bytes, now: float) -> None:
        """Take in one event."""
        if data == DONE:
            self.finished = True
            return
        try:
            chunk = decode_chunk(data)
        except msgspec.DecodeError as error:
            self.error = RequestFailed("malformed event", str(error))
            return
        if chunk.error is not None:
            kind = chunk.error.code or chunk.error.type or "unknown"
            self.error = RequestFailed(f"stream error {kind}", chunk.error.message)
        if chunk.choices:
            self.ended = now
            self.reason = chunk.choices[0].finish_reason or self.reason
            text = chunk.text
            if text or chunk.calls:
                self.stamps.append(now)
            if text and self.on_text is not None:
                self.on_text(text)
        if chunk.usage is not None:
            self.prompt_tokens = chunk.usage.prompt_tokens
            self.output_tokens = chunk.usage.completion_tokens


class Client:
    """Requests to one OpenAI-compatible server, over as many kept connections as are under way at once."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        self.target = Target.of(url)
        self._ssl = ssl.create_default_context() if self.target.tls else None
        self._timeout_s = timeout_s
        self._idle: list[Connection] = []
        self._headers = f"Host: {self.target.host}\r\nAccept: */*\r\n"
        if api_key:
            self._headers += f"Authorization: Bearer {api_key}\r\n"

    async def sample(self, path: str, body: bytes) -> Sample:
        """Send one streaming request and time its answer. Never raises: a failure is a Sample too."""
        reading = Reading(None)
        started = time.perf_counter()
        try:
            await self._stream(path, body, reading)
        except RequestFailed as failure:
            return Sample(
                started=started, ended=time.perf_counter(), error=failure.kind, detail=failure.detail
            )
        return Sample(
            started=started,
            stamps=tuple(reading.stamps),
            ended=reading.ended,
            reason=reading.reason,
            prompt_tokens=reading.prompt_tokens,
            output_tokens=reading.output_tokens or len(reading.stamps),
        )

    async def pieces(self, path: str, body: bytes) -> AsyncGenerator[str]:
        """The text of one streamed answer as it comes. Closing it cancels it. Raises RequestFailed."""
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        task = asyncio.create_task(self._stream(path, body, Reading(queue.put_nowait)))
        task.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (piece := await queue.get()) is not None:
                yield piece
            await task
        finally:
            task.cancel()

    async def get(self, path: str) -> bytes:
        """The body of a page under the prefix, or of `/path` when it starts so. Raises RequestFailed."""
        route = path if path.startswith("/") else f"{self.target.prefix}/{path}"
        connection = await self._exchange(f"GET {route} HTTP/1.1\r\n{self._headers}\r\n".encode(), None)
        return connection.body

    async def models(self) -> list[str]:
        """The names the server answers to. Raises RequestFailed."""
        try:
            page = msgspec.json.decode(await self.get("models"), type=_Models)
        except msgspec.DecodeError as error:
            raise RequestFailed("not an OpenAI-compatible server", f"/v1/models: {error}") from error
        return [entry.id for entry in page.data]

    def close(self) -> None:
        """Close the connections kept."""
        while self._idle:
            self._idle.pop().close()

    async def _stream(self, path: str, body: bytes, reading: Reading) -> None:
        head = (
            f"POST {self.target.prefix}/{path} HTTP/1.1\r\n{self._headers}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        await self._exchange(head.encode() + body, reading)
        if reading.error is not None:
            raise reading.error
        if not reading.stamps and reading.reason == OVERDUE:
            raise RequestFailed(OVERDUE, "the answer's time was over before its first token")
        if not reading.stamps:
            raise RequestFailed("no token", "the answer ended without any text")
        if not reading.finished:
            raise RequestFailed("cut off", "the answer ended without [DONE]")

    async def _exchange(self, message: bytes, on_event: OnEvent | None) -> Connection:
        """A kept connection may have been closed by the server meanwhile: only then is it tried anew."""
        while True:
            reused = bool(self._idle)
            connection = self._idle.pop() if reused else await self._connect()
            try:
                async with asyncio.timeout(self._timeout_s):
                    await connection.exchange(message, on_event)
            except TimeoutError as error:
                raise RequestFailed("timeout", f"no whole answer within {self._timeout_s:g} s") from error
            except ConnectionError as error:
                if reused and not connection.heard:
                    continue
                raise RequestFailed("connection lost", str(error)) from error
            finally:
                if connection.reusable:
                    self._idle.append(connection)
                else:
                    connection.close()
            if connection.status != 200:
                raise _refusal(connection.status, connection.body)
            return connection

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        address, port = self.target.address, self.target.port
        try:
            _, connection = await loop.create_connection(Connection, address, port, ssl=self._ssl)
        except OSError as error:
            raise RequestFailed("cannot connect", f"{address}:{port}: {error.strerror or error}") from error
        return connection


class _Model(Struct):
    id: str


class _Models(Struct):
    data: list[_Model]


def _refusal(status: int, body: bytes) -> RequestFailed:
    try:
        error = decode_chunk(body).error or ChunkError()
    except msgspec.DecodeError:
        error = ChunkError(body[:200].decode(errors="replace"))
    return RequestFailed(f"HTTP {status}" + (f" {error.code}" if error.code else ""), error.message)
