"""An HTTP/1.1 client for streamed answers that reads 50,000 tokens per second on one core.

It parses server-sent events and only those fields of OpenAI's chunks that a measurement needs. It computes
no statistics.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools
import msgspec
from msgspec import Struct

from stretto.bench.metrics import Sample
from stretto.errors import StartError
from stretto.types import Objective

DATA = b"data:"
DONE = b"[DONE]"
DEADLINE = "deadline"  # the finish_reason of an answer whose time ran out
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
    """The fields of an event that the client reads, of either endpoint. The decoder skips all others."""

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
        """Whether the first choice holds a piece of a tool call."""
        delta = self.choices[0].delta
        return delta is not None and bool(delta.tool_calls)


decode_chunk = msgspec.json.Decoder(Chunk).decode


class RequestFailed(Exception):
    """A request failed. Reports count failures by the short `kind`. `retry_after`: seconds, by the server."""

    def __init__(self, kind: str, detail: str = "", retry_after: float | None = None) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail
        self.retry_after = retry_after


class ServerAddress(Struct, frozen=True, kw_only=True):
    """Where a server is. `host` is the value of the Host header; `prefix` is a path that ends in `/v1`."""

    host: str
    hostname: str
    port: int
    tls: bool
    prefix: str

    @classmethod
    def parse(cls, url: str) -> ServerAddress:
        """Parse `http://host:port`, with or without `/v1`. Raises StartError for any other URL."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise StartError(f"{url!r} is not a server's address; write it like http://127.0.0.1:8000")
        tls = parts.scheme == "https"
        path = parts.path.rstrip("/")
        return cls(
            host=parts.netloc.rpartition("@")[2],
            hostname=parts.hostname,
            port=port or (443 if tls else 80),
            tls=tls,
            prefix=path if path.endswith("/v1") else f"{path}/v1",
        )


class ServedModel(Struct, frozen=True):
    """A model of a server, as its `/state` describes it.

    The defaults are for other servers than Stretto's, which have no `/state`: every
    common vocabulary has 1,000 ids. `schedule` is empty when it is unknown, and
    so are `objectives`, those of the tiers.
    """

    name: str
    vocab: int = 1000
    context: int = 16384
    schedule: str = ""
    objectives: dict[str, Objective] = {}


class Connection(asyncio.Protocol):
    """One socket that carries one request at a time.

    It passes on each complete SSE event, or keeps the body.
    """

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._tail = b""
        self._now = 0.0
        self._whole = False
        self._lost = False
        self.status = 0
        self.body = b""
        self.received = False
        self.retry_after: float | None = None

    async def exchange(self, message: bytes, on_event: OnEvent | None) -> None:
        """Send a request and read its whole answer. Raises ConnectionError when the socket is lost.

        With status 200, `on_event` gets the data of each event and its time in seconds. The body of any other
        answer is kept in `body`.
        """
        self._tail, self.body, self.status, self.received, self._whole = b"", b"", 0, False, False
        self.retry_after = None
        if self._transport is None or self._lost:
            raise ConnectionResetError("the connection is lost")
        self._done = asyncio.get_running_loop().create_future()
        self._on_event = on_event
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(message)
        await self._done

    @property
    def reusable(self) -> bool:
        """Whether the answer is complete and another request may follow on this socket."""
        return self._whole and self._keep and not self._lost

    def close(self) -> None:
        """Close the socket at once. The server takes this as a cancellation of the request."""
        self._lost = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(
            asyncio.Transport, transport
        )  # uvloop's transport has the methods but not the base class

    def data_received(self, data: bytes) -> None:
        self._now, self.received = time.perf_counter(), True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(ConnectionResetError("the server closed the connection"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after" and value.isdigit():
            self.retry_after = float(value)

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


@dataclass(slots=True)
class StreamedAnswer:
    """One streamed answer as received so far. `stamps`: when each event with text arrived."""

    on_text: Callable[[str], None] | None = None
    stamps: list[float] = field(default_factory=list[float])
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    finished: bool = False
    error: RequestFailed | None = None
    reason: str | None = None

    def __call__(self, data: bytes, now: float) -> None:
        """Read one event."""
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
    """Requests to one OpenAI-compatible server. Connections are kept and reused."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        self.address = ServerAddress.parse(url)
        self._ssl = ssl.create_default_context() if self.address.tls else None
        self._timeout_s = timeout_s
        self._idle: list[Connection] = []
        self._headers = f"Host: {self.address.host}\r\nAccept: */*\r\n"
        if api_key:
            self._headers += f"Authorization: Bearer {api_key}\r\n"

    async def sample(self, path: str, body: bytes) -> Sample:
        """Send one streaming request and time its answer. A failure is a Sample too, never an exception."""
        answer = StreamedAnswer()
        started = time.perf_counter()
        try:
            await self._stream(path, body, answer)
        except RequestFailed as failure:
            return Sample(
                started=started,
                ended=time.perf_counter(),
                error=failure.kind,
                detail=failure.detail,
                retry_after=failure.retry_after,
            )
        return Sample(
            started=started,
            stamps=tuple(answer.stamps),
            ended=answer.ended,
            reason=answer.reason,
            prompt_tokens=answer.prompt_tokens,
            output_tokens=answer.output_tokens or len(answer.stamps),
        )

    async def samples(
        self,
        path: str,
        timed: Sequence[tuple[float, bytes]],
        on_done: Callable[[Sample], None],
        concurrency: int | None = None,
    ) -> list[Sample]:
        """Send each body at its time, in seconds from now, or later when `concurrency` requests are open.

        `on_done` is called with each sample. The result is in the order of the bodies.
        """
        start, queue = time.perf_counter(), iter(enumerate(timed))
        found: dict[int, Sample] = {}

        async def work() -> None:
            for number, (instant, body) in queue:
                await asyncio.sleep(start + instant - time.perf_counter())
                found[number] = await self.sample(path, body)
                on_done(found[number])

        await asyncio.gather(*(work() for _ in range(min(concurrency or len(timed), len(timed)))))
        return [found[number] for number in range(len(timed))]

    async def pieces(self, path: str, body: bytes) -> AsyncGenerator[str]:
        """The text of one streamed answer as it comes. Closing the iterator cancels. Raises RequestFailed."""
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        task = asyncio.create_task(self._stream(path, body, StreamedAnswer(queue.put_nowait)))
        task.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (piece := await queue.get()) is not None:
                yield piece
            await task
        finally:
            task.cancel()

    async def get(self, path: str) -> bytes:
        """The body at a path: below the prefix, or below the root if it starts with `/`.

        Raises RequestFailed when the status is not 200 or the connection fails.
        """
        route = path if path.startswith("/") else f"{self.address.prefix}/{path}"
        connection = await self._exchange(f"GET {route} HTTP/1.1\r\n{self._headers}\r\n".encode(), None)
        return connection.body

    async def models(self) -> list[str]:
        """The names of the models that the server offers. Raises RequestFailed."""
        try:
            page = msgspec.json.decode(await self.get("models"), type=_ModelList)
        except msgspec.DecodeError as error:
            raise RequestFailed("not an OpenAI-compatible server", f"/v1/models: {error}") from error
        return [entry.id for entry in page.data]

    async def served_model(self, name: str | None = None) -> ServedModel:
        """The model of that name, or the server's first. Raises StartError when the server offers none."""
        if name is None:
            try:
                names = await self.models()
            except RequestFailed as failure:
                raise StartError(
                    f"{self.address.host} does not answer as a model server: {failure}"
                ) from failure
            if not names:
                raise StartError(f"{self.address.host} serves no model; load one there first")
            name = names[0]
        try:
            state = msgspec.json.decode(await self.get("/state"), type=_ServerState)
        except (RequestFailed, msgspec.DecodeError):
            return ServedModel(name)
        found = next((model for model in state.models if model.name == name), ServedModel(name))
        return msgspec.structs.replace(found, schedule=state.schedule, objectives=state.objectives)

    def close(self) -> None:
        """Close all kept connections."""
        while self._idle:
            self._idle.pop().close()

    async def _stream(self, path: str, body: bytes, answer: StreamedAnswer) -> None:
        head = (
            f"POST {self.address.prefix}/{path} HTTP/1.1\r\n{self._headers}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        await self._exchange(head.encode() + body, answer)
        if answer.error is not None:
            raise answer.error
        if not answer.stamps and answer.reason == DEADLINE:
            raise RequestFailed(DEADLINE, "the deadline passed before the first token")
        if not answer.stamps:
            raise RequestFailed("no token", "the answer ended without any text")
        if not answer.finished:
            raise RequestFailed("cut off", "the answer ended without [DONE]")

    async def _exchange(self, message: bytes, on_event: OnEvent | None) -> Connection:
        """Send on a kept connection or a new one.

        A kept one that the server has closed meanwhile is replaced.
        """
        while True:
            reused = bool(self._idle)
            connection = self._idle.pop() if reused else await self._connect()
            try:
                async with asyncio.timeout(self._timeout_s):
                    await connection.exchange(message, on_event)
            except TimeoutError as error:
                raise RequestFailed("timeout", f"no whole answer within {self._timeout_s:g} s") from error
            except ConnectionError as error:
                if reused and not connection.received:
                    continue
                raise RequestFailed("connection lost", str(error)) from error
            finally:
                if connection.reusable:
                    self._idle.append(connection)
                else:
                    connection.close()
            if connection.status != 200:
                raise _refusal(connection)
            return connection

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        host, port = self.address.hostname, self.address.port
        try:
            _, connection = await loop.create_connection(Connection, host, port, ssl=self._ssl)
        except OSError as error:
            raise RequestFailed("cannot connect", f"{host}:{port}: {error.strerror or error}") from error
        return connection


class _ListedModel(Struct):
    id: str


class _ModelList(Struct):
    data: list[_ListedModel]


class _ServerState(Struct):
    models: list[ServedModel]
    schedule: str = ""
    objectives: dict[str, Objective] = {}


def _refusal(connection: Connection) -> RequestFailed:
    status, body = connection.status, connection.body
    try:
        error = decode_chunk(body).error or ChunkError()
    except msgspec.DecodeError:
        error = ChunkError(body[:200].decode(errors="replace"))
    return RequestFailed(
        f"HTTP {status}" + (f" {error.code}" if error.code else ""), error.message, connection.retry_after
    )
