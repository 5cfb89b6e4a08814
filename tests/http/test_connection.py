"""Attacks on a server process over raw sockets: each is cut off in a stated time, its memory stays bounded,
and a neighbour is answered meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHAT = "/v1/chat/completions"
TIMEOUT_S = 2.0
MOST_CONNECTIONS = 600
SLACK_S = 8.0  # the machine is busy
MIB = 2**20
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}


@dataclass
class Victim:
    """A server process with the null model."""

    port: int
    pid: int

    def memory(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def files(self) -> int:
        """Open files."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    log = tmp_path_factory.mktemp("edge") / "out"
    limits = {
        "STRETTO_REQUEST_TIMEOUT": str(TIMEOUT_S),
        "STRETTO_SEND_TIMEOUT": str(TIMEOUT_S),
        "STRETTO_MAX_CONNECTIONS": str(MOST_CONNECTIONS),
    }
    with log.open("w") as out:
        command = [sys.executable, "-m", "stretto", "serve", "null=null:0", "--port", "0"]
        process = subprocess.Popen(command, stdout=out, env=os.environ | limits)
    deadline = time.monotonic() + 240
    while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    try:
        yield Victim(int(found[1]), process.pid)
    finally:
        process.terminate()
        process.wait()


@asynccontextmanager
async def connected(victim: Victim) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", victim.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def head(first: str, *headers: str) -> bytes:
    return "\r\n".join((first, "Host: localhost", *headers, "", "")).encode()


def post(body: bytes, *headers: str, version: str = "1.1", path: str = CHAT) -> bytes:
    lines = ("Content-Type: application/json", f"Content-Length: {len(body)}", *headers)
    return head(f"POST {path} HTTP/{version}", *lines) + body


def chat(**fields: Any) -> bytes:
    return json.dumps(HELLO | fields).encode()


async def talk(victim: Victim, data: bytes, seconds: float = TIMEOUT_S + SLACK_S) -> bytes:
    """All that the server answers until it closes the connection."""
    async with connected(victim) as (reader, writer), asyncio.timeout(seconds):
        writer.write(data)
        return await until_closed(reader)


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    received = b""
    try:
        while chunk := await reader.read(65536):
            received += chunk
    except ConnectionError:
        pass
    return received


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:100]
    return int(answer.split(b" ", 2)[1])


def error(answer: bytes) -> tuple[int, str]:
    """Status and code of a typed error."""
    return status(answer), json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]


CLOSE = "Connection: close"
HEALTH = head("GET /health HTTP/1.1", CLOSE)


async def metric(victim: Victim, name: str) -> float:
    text = (await talk(victim, head("GET /metrics HTTP/1.1", CLOSE))).decode()
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


async def rejected(victim: Victim, reason: str) -> float:
    return await metric(victim, f'stretto_rejected_requests_total{{reason="{reason}"}}')


class Neighbour(threading.Thread):
    """Another client, in its own thread: asks for /health and for a short answer until `done` is set."""

    def __init__(self, victim: Victim) -> None:
        super().__init__()
        self.done = threading.Event()
        self.slowest = 0.0
        self.answers: list[int] = []
        self.memory = victim.memory()
        self._victim = victim

    def run(self) -> None:
        """Asks at least once."""
        asked = False
        while not (asked and self.done.wait(0.02)):
            asked = True
            for request in (HEALTH, post(chat(), CLOSE)):
                started = time.monotonic()
                with socket.create_connection(("127.0.0.1", self._victim.port), 20.0) as connection:
                    connection.sendall(request)
                    with connection.makefile("rb") as answer:
                        self.answers.append(status(answer.read()))
                self.slowest = max(self.slowest, time.monotonic() - started)
            self.memory = max(self.memory, self._victim.memory())


@asynccontextmanager
async def neighbour(
    victim: Victim, *, most_s: float = 2.0, most_bytes: int = 40 * MIB
) -> AsyncGenerator[None]:
    """Fails if another client waits for longer than `most_s` meanwhile, or if the memory of the server grows
    by more than `most_bytes`."""
    other = Neighbour(victim)
    before = other.memory
    other.start()
    try:
        yield
    finally:
        other.done.set()
        await asyncio.to_thread(other.join)
    assert set(other.answers) == {200}
    assert other.slowest < most_s
    assert other.memory - before < most_bytes, f"{(other.memory - before) / MIB:.0f} MiB"


async def send_all(writer: asyncio.StreamWriter, piece: bytes, times: int) -> None:
    """Writes until the server closes."""
    try:
        for _ in range(times):
            writer.write(piece)
            await writer.drain()
    except ConnectionError:
        pass


ENDLESS = [
    pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", b"a" * 65536, 431, id="header line"),
    pytest.param(b"GET /", b"a" * 65536, 431, id="request line"),
    pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"a: b\r\n" * 10_000, 431, id="headers"),
    pytest.param(head("GET / HTTP/1.1", "X: y")[:-2], b"a" * 65536, 431, id="header name"),
    pytest.param(
        post(b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"") + b"0\r\nX: ",
        b"a" * 65536,
        400,
        id="trailer",
    ),
    pytest.param(
        post(b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"") + b"1;x=",
        b"a" * 65536,
        400,
        id="chunk extension",
    ),
    pytest.param(
        post(b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b""),
        b"1\r\n \r\n" * 10_000,
        400,
        id="tiny chunks",
    ),
    pytest.param(
        post(b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b""),
        b"10000\r\n" + b" " * 65536 + b"\r\n",
        413,
        id="body",
    ),
]


@pytest.mark.parametrize(("start", "piece", "expected"), ENDLESS)
async def test_what_never_ends_is_refused_early(
    victim: Victim, start: bytes, piece: bytes, expected: int
) -> None:
    async with neighbour(victim), connected(victim) as (reader, writer), asyncio.timeout(10):
        writer.write(start)
        sending = asyncio.create_task(send_all(writer, piece, 100))
        answer = await until_closed(reader)
        await sending
    assert error(answer)[0] == expected


async def test_the_exact_limits_of_headers(victim: Victim) -> None:
    long = "X: " + "a" * 30_000
    assert status(await talk(victim, head("GET /health HTTP/1.1", CLOSE, long))) == 200
    many = [f"X-{number}: y" for number in range(120)]
    assert status(await talk(victim, head("GET /health HTTP/1.1", CLOSE, *many))) == 200
    before = await rejected(victim, "headers_too_large")
    answer = await talk(victim, head("GET /health HTTP/1.1", "X: " + "a" * 33_000))
    assert error(answer) == (431, "headers_too_large")
    answer = await talk(victim, head("GET /health HTTP/1.1", *many, *many))
    assert error(answer) == (431, "headers_too_large")
    assert await rejected(victim, "headers_too_large") == before + 2
    async with connected(victim) as (reader, writer), asyncio.timeout(5):
        for _ in range(2):  # A limit counts for each request of a connection, not for all together.
            writer.write(head("GET /health HTTP/1.1", "X: " + "a" * 20_000))
            assert status(await reader.readuntil(b"}}")) == 200
        writer.write(head("GET /health HTTP/1.1", "X: " + "a" * 33_000))
        assert error(await until_closed(reader))[0] == 431


async def test_a_flood_of_pipelined_requests_is_cut(victim: Victim) -> None:
    request = head("GET /health HTTP/1.1")
    async with neighbour(victim), connected(victim) as (reader, writer), asyncio.timeout(20):
        sending = asyncio.create_task(send_all(writer, request * 1000, 200))
        answer = await until_closed(reader)
        await sending
    assert 1 <= answer.count(b"HTTP/1.1 200") <= 100


async def test_a_few_pipelined_requests_are_answered_in_order(victim: Victim) -> None:
    bodies = [post(chat(max_tokens=number + 1)) for number in range(9)]
    answer = await talk(victim, b"".join(bodies) + HEALTH)
    counts = [int(found) for found in re.findall(rb'"completion_tokens":(\d+)', answer)]
    assert counts == list(range(1, 10))
    assert b'{"status":"ok"' in answer


async def drip(victim: Victim, start: bytes) -> tuple[float, bytes]:
    """Sends a byte now and then. Returns when the connection was closed, and the answer."""
    started = time.monotonic()
    async with connected(victim) as (reader, writer):
        answer = asyncio.create_task(until_closed(reader))
        writer.write(start)
        while not answer.done() and time.monotonic() - started < 4 * TIMEOUT_S:
            await asyncio.wait({answer}, timeout=0.3)
            if not answer.done():
                writer.write(b"a")
        answer.cancel()
        return time.monotonic() - started, await answer


SLOW = [
    pytest.param(b"GET / HTTP/1.1\r\nX-", id="header"),
    pytest.param(
        post(b"")[:-4].replace(b"Content-Length: 0", b"Content-Length: 1000") + b"\r\n\r\n", id="body"
    ),
]


@pytest.mark.parametrize("start", SLOW)
async def test_a_slow_request_gets_408_in_time(victim: Victim, start: bytes) -> None:
    before = await rejected(victim, "request_timeout")
    seconds, answer = await drip(victim, start)
    assert error(answer) == (408, "request_timeout")
    assert TIMEOUT_S - 0.6 < seconds < TIMEOUT_S + SLACK_S
    assert await rejected(victim, "request_timeout") == before + 1


@pytest.mark.parametrize("start", SLOW)
async def test_a_thousand_slow_connections_keep_nobody_out(victim: Victim, start: bytes) -> None:
    """There are more of them than connections. The oldest make room."""
    files = victim.files()
    async with neighbour(victim):
        outcomes = await asyncio.gather(*(drip(victim, start) for _ in range(1000)))
    assert max(seconds for seconds, _ in outcomes) < TIMEOUT_S + SLACK_S
    assert await rejected(victim, "evicted") > 0
    await until(lambda: victim.files() <= files + 5)


async def until(condition: Callable[[], bool], seconds: float = TIMEOUT_S + SLACK_S) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.05)


async def test_unfinished_bodies_share_a_bounded_memory(victim: Victim) -> None:
    """200 bodies of nearly 4 MiB: the largest yield, so small requests of others are answered meanwhile."""
    start = post(b"").replace(b"Content-Length: 0", b"Content-Length: 4000000")

    async def begin() -> bytes:
        async with connected(victim) as (reader, writer), asyncio.timeout(30):
            writer.write(start)
            sending = asyncio.create_task(send_all(writer, b" " * 65536, 60))
            answer = await until_closed(reader)
            await sending
            return answer

    async with neighbour(victim, most_s=3.0, most_bytes=120 * MIB):
        answers = await asyncio.gather(*(begin() for _ in range(200)))
    codes = {error(answer) for answer in answers if answer}
    assert codes <= {(408, "request_timeout"), (503, "overloaded")}
    assert (503, "overloaded") in codes


async def test_readers_that_never_read_are_cancelled(victim: Victim) -> None:
    """Their answers end in a stated time, and nothing of them stays in the engine."""
    before = await rejected(victim, "blocked_send")
    request = post(chat(stream=True, max_tokens=8000, logprobs=True, n=2))
    readers = [socket.socket() for _ in range(3)]
    async with neighbour(victim, most_s=10.0, most_bytes=200 * MIB):
        for reader in readers:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", victim.port))
            reader.sendall(request)
        async with asyncio.timeout(60):
            while await rejected(victim, "blocked_send") < before + len(readers):
                await asyncio.sleep(0.2)
    assert await metric(victim, "stretto_open_requests") == 0
    for reader in readers:
        reader.close()


# Requests that other servers read differently.


@pytest.mark.parametrize("protocol", ["h2c", "websocket", "TLS/1.0, HTTP/1.1", "foo"])
async def test_an_upgrade_is_ignored(victim: Victim, protocol: str) -> None:
    extra = (
        f"Upgrade: {protocol}",
        "Connection: Upgrade, HTTP2-Settings",
        "HTTP2-Settings: AAMAAABkAAQAAP__",
    )
    request = post(chat(), *extra)
    for pieces in ([request], [request[:50], request[50:]], [request[:-20], request[-20:]]):
        async with connected(victim) as (reader, writer), asyncio.timeout(5):
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.05)
            assert status(await reader.readuntil(b"}]")) == 200
            await asyncio.sleep(0.1)
            writer.write(HEALTH)
            assert b'{"status":"ok"' in await until_closed(reader)
    answer = await talk(victim, head("GET /health HTTP/1.1", *extra) + HEALTH)
    assert answer.count(b"HTTP/1.1 200 OK") == 2


async def test_expect_100_continue(victim: Victim) -> None:
    body = chat()
    whole = post(body, "Expect: 100-continue", CLOSE)
    async with connected(victim) as (reader, writer), asyncio.timeout(5):
        writer.write(whole[: -len(body)])
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert status(await until_closed(reader)) == 200
    large = head(
        f"POST {CHAT} HTTP/1.1",
        "Content-Type: application/json",
        "Content-Length: 9000000",
        "Expect: 100-continue",
    )
    assert error(await talk(victim, large)) == (413, "request_too_large")


async def test_http_1_0_gets_no_chunks(victim: Victim) -> None:
    """The end of the connection ends the body."""
    answer = await talk(victim, post(chat(stream=True), version="1.0"))
    before, _, body = answer.partition(b"\r\n\r\n")
    assert status(answer) == 200
    assert b"transfer-encoding" not in before.lower()
    assert b"content-length" not in before.lower()
    assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")
    answer = await talk(victim, b"GET /health HTTP/1.0\r\n\r\n")
    assert b'\r\n\r\n{"status":"ok"' in answer
    assert b"content-length: " in answer


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, gzip"])
async def test_a_compressed_body_is_refused_by_name(victim: Victim, coding: str) -> None:
    answer = await talk(victim, post(b"\x1f\x8b" + b"\0" * 100, f"Content-Encoding: {coding}", CLOSE))
    assert error(answer) == (415, "unsupported_media_type")
    assert coding.encode() in answer
    transfer = post(b"", f"Transfer-Encoding: {coding}, chunked", CLOSE).replace(
        b"Content-Length: 0\r\n", b""
    )
    assert error(await talk(victim, transfer + b"0\r\n\r\n")) == (415, "unsupported_media_type")
    assert status(await talk(victim, post(chat(), "Content-Encoding: identity", CLOSE))) == 200


CHUNKED = "Transfer-Encoding: chunked"
SMUGGLED = [
    pytest.param(["Content-Length: 5", CHUNKED], id="both lengths"),
    pytest.param([CHUNKED, "Content-Length: 5"], id="both lengths, reversed"),
    pytest.param(["Content-Length: 5", "Content-Length: 6"], id="two lengths"),
    pytest.param(["Content-Length: 5", "Content-Length: 5"], id="the same length twice"),
    pytest.param(["Content-Length: +5"], id="signed length"),
    pytest.param(["Content-Length: 5, 6"], id="list of lengths"),
    pytest.param(["Content-Length: 0x5"], id="hexadecimal length"),
    pytest.param(["Content-Length : 5"], id="space before the colon"),
    pytest.param(["Transfer-Encoding: xchunked"], id="unknown coding"),
    pytest.param(["Transfer-Encoding: chunked, identity"], id="chunked is not last"),
    pytest.param([CHUNKED, "Transfer-Encoding: identity"], id="two codings"),
    pytest.param(["X: a\r\n b", "Content-Length: 5"], id="folded header"),
    pytest.param(["X: a\nContent-Length: 5"], id="bare line feed"),
]


@pytest.mark.parametrize("headers", SMUGGLED)
async def test_an_ambiguous_length_is_refused_and_what_follows_is_not_read(
    victim: Victim, headers: list[str]
) -> None:
    first = head(f"POST {CHAT} HTTP/1.1", "Content-Type: application/json", *headers)
    answer = await talk(victim, first + b"0\r\n\r\n" + HEALTH)
    assert 400 <= status(answer) < 500
    assert len(re.findall(rb"HTTP/1\.1 \d", answer)) == 1


async def test_two_slashes_begin_a_path_and_no_host(victim: Victim) -> None:
    for target in ("//v1/models", "///v1//models/", "http://localhost//v1/models"):
        assert status(await talk(victim, head(f"GET {target} HTTP/1.1", "Connection: close"))) == 200, target


async def test_head_of_a_stream_has_no_body_and_ends(victim: Victim) -> None:
    answer = await talk(victim, head("HEAD /live HTTP/1.1", "Connection: close"))
    assert b"text/event-stream" in answer and answer.endswith(b"\r\n\r\n")


async def test_a_connection_is_for_requests_only(victim: Victim) -> None:
    for data in (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n",
        b"\x16\x03\x01\x02\x00 not http\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX\0: y\r\n\r\n",
    ):
        assert error(await talk(victim, data)) == (400, "invalid_http"), data
    absolute = b"GET http://localhost:%d/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert status(await talk(victim, absolute % victim.port)) == 200
    foreign = b"GET http://evil.test/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert error(await talk(victim, foreign)) == (403, "host_not_allowed")


async def test_an_early_answer_reaches_a_client_that_is_still_sending(victim: Victim) -> None:
    body = b" " * 8_000_000
    async with connected(victim) as (reader, writer), asyncio.timeout(10):
        sending = asyncio.create_task(send_all(writer, post(body), 1))
        assert error(await until_closed(reader)) == (413, "request_too_large")
        await sending
