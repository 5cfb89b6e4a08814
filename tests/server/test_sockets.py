"""A server on real sockets: clients that disconnect, read slowly or arrive together, and shutdown."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, cast

import httpx
import pytest

from stretto.config import ServeConfig
from stretto.engine.client import EngineClient
from stretto.errors import StartError
from stretto.http import serving as lifecycle
from stretto.server.app import App
from stretto.server.pages import VIEWERS
from stretto.types import Reason, Request
from tests.server.conftest import CHAT, HELLO, Served
from tests.server.fake_engine import FakeEngine, Item, build

STREAM = json.dumps(HELLO | {"stream": True}).encode()


def post(body: bytes, path: str = CHAT) -> bytes:
    lines = ("Host: localhost", "Content-Type: application/json", f"Content-Length: {len(body)}")
    return "\r\n".join((f"POST {path} HTTP/1.1", *lines, "", "")).encode() + body


@asynccontextmanager
async def connected(served: Served) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def until(condition: Any, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def steady(request: Request) -> list[Item]:
    """A script of one token every few milliseconds for a very long time."""
    return [item for _ in range(20_000) for item in (0.002, 300)]


@pytest.mark.parametrize("blanks", [0, 300_000], ids=["", "after_a_body_that_stopped_reading"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_disconnects_cancels_its_request(
    served: Served, engine: FakeEngine, stream: bool, blanks: int
) -> None:
    engine.script = steady
    async with connected(served) as (reader, writer):
        writer.write(post(json.dumps(HELLO | {"stream": stream}).encode() + b" " * blanks))
        if stream:
            await reader.readuntil(b"data: ")
        else:
            await until(lambda: engine.streams and engine.streams[0].emitted > 3)
        assert len(engine.open) == 1
    await until(lambda: not engine.open)
    (request,) = engine.streams
    emitted = request.emitted
    await asyncio.sleep(0.02)
    assert request.emitted <= emitted + 1, "within a step"


async def test_a_client_that_disconnects_inside_its_body_is_counted_as_gone(served: Served, app: App) -> None:
    async with connected(served) as (_, writer):
        writer.write(post(STREAM)[:-5])
        await writer.drain()
    await until(lambda: 'outcome="client_gone"' in app.server.metrics.text().decode())
    assert not app.server.calls


async def test_a_slow_reader_delays_no_other_client(served: Served, engine: FakeEngine) -> None:
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", served.port))
    engine.script = lambda request: [[300] * 500 for _ in range(2000)]
    slow.sendall(post(STREAM))
    await until(lambda: engine.streams and engine.streams[0].emitted > 0)
    before = -1
    while engine.streams[0].emitted != before:
        before = engine.streams[0].emitted
        await asyncio.sleep(0.2)
    assert before < 1_000_000, "the server stops reading from the engine, and its buffers stay bounded"
    engine.script = lambda request: [300] * 50
    async with httpx.AsyncClient(base_url=served.url) as client:
        for _ in range(5):
            assert (await client.post(CHAT, json=HELLO)).status_code == 200
    slow.close()
    await until(lambda: not engine.open)


async def test_a_thousand_connections_are_all_answered_or_refused(
    served: Served, app: App, engine: FakeEngine
) -> None:
    """As many as may wait get tokens. The others get 503 with Retry-After."""
    gate = asyncio.Event()
    engine.pause = lambda seconds: gate.wait()
    engine.script = lambda request: [1.0, 300, 301]
    answers: list[bytes] = []

    async def one() -> None:
        async with connected(served) as (reader, writer):
            writer.write(post(STREAM))
            answers.append(await reader.readuntil(b"\r\n\r\n"))

    tasks = [asyncio.create_task(one()) for _ in range(1000)]
    await until(lambda: len(answers) == 1000 - app.server.config.max_waiting, 60)
    assert app.server.gate.waiting == len(engine.open) == app.server.config.max_waiting
    gate.set()
    await asyncio.gather(*tasks)
    refused = [answer for answer in answers if answer.startswith(b"HTTP/1.1 503")]
    assert len(refused) == 1000 - app.server.config.max_waiting
    assert all(b"retry-after: " in answer for answer in refused)
    assert sum(answer.startswith(b"HTTP/1.1 200") for answer in answers) == app.server.config.max_waiting
    await until(lambda: not engine.open)
    assert app.server.gate.waiting == 0


async def last_event(reader: asyncio.StreamReader) -> Any:
    body = (await reader.read()).decode()
    assert "[DONE]" not in body
    return json.loads(body.rpartition("data: ")[2].partition("\n\n")[0])


async def test_sigterm_finishes_running_answers_and_refuses_new_ones(
    served: Served, app: App, engine: FakeEngine
) -> None:
    """Running answers finish. New requests and `/ready` get 503 at once. Then the server exits."""
    finish = asyncio.Event()
    engine.pause = lambda seconds: finish.wait()
    engine.script = lambda request: [300, 1.0, 301, Reason.STOP]
    async with connected(served) as (reader, writer), httpx.AsyncClient(base_url=served.url) as client:
        writer.write(post(STREAM))
        await reader.readuntil(b"data: ")
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: app.server.gate.draining)
        for response in (await client.get("/ready"), await client.post(CHAT, json=HELLO)):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
            assert response.headers["retry-after"]
        assert (await client.get("/health")).status_code == 200
        finish.set()
        assert b"data: [DONE]" in await reader.read()
    await asyncio.wait_for(served.task, 5)
    assert engine.ended


async def test_answers_longer_than_the_drain_time_end_in_a_typed_error(
    served: Served, engine: FakeEngine
) -> None:
    engine.script = steady
    async with connected(served) as (reader, writer), httpx.AsyncClient(base_url=served.url) as client:
        writer.write(post(STREAM))
        await reader.readuntil(b"data: ")
        whole = asyncio.create_task(client.post(CHAT, json=HELLO))
        await until(lambda: len(engine.open) == 2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await last_event(reader))["error"]["code"] == "draining"
        response = await whole
        assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
    await asyncio.wait_for(served.task, 5)
    assert not engine.open


@pytest.mark.parametrize("config", [ServeConfig(port=0, drain_s=3600)])
async def test_a_second_signal_stops_the_server_at_once(served: Served, engine: FakeEngine) -> None:
    engine.script = steady
    async with connected(served) as (reader, writer):
        writer.write(post(STREAM))
        await reader.readuntil(b"data: ")
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: served.task and engine.streams[0].emitted > 20)
        assert engine.open, "an hour to drain"
        os.kill(os.getpid(), signal.SIGINT)
        assert (await last_event(reader))["error"]["code"] == "draining"
    await asyncio.wait_for(served.task, 5)


async def test_the_live_view_has_a_limit_of_viewers(served: Served) -> None:
    """A viewer that leaves makes room for another one."""
    request = b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    opened = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(VIEWERS)]
    for reader, writer in opened:
        writer.write(request)
        await reader.readuntil(b"data: ")
    async with connected(served) as (reader, writer):
        writer.write(request)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 503")
    for _, writer in opened:
        writer.transport.abort()
    for _ in range(50):
        async with connected(served) as (reader, writer):
            writer.write(request)
            if (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200"):
                return
        await asyncio.sleep(0.1)
    pytest.fail("no room")


async def test_a_port_in_use_and_an_unknown_host_are_start_errors(
    served: Served, app: App, engine: FakeEngine
) -> None:
    with pytest.raises(StartError, match=f"port {served.port} on 127.0.0.1 is in use"):
        await lifecycle.run(ServeConfig(port=served.port), app, engine)
    with pytest.raises(StartError, match=r"--host no\.such\.host\.invalid"):
        lifecycle.listen("no.such.host.invalid", 0)


async def test_an_engine_that_cannot_load_ends_the_server(app: App, engine: FakeEngine) -> None:
    engine.failure = "no such checkpoint"
    with pytest.raises(StartError, match="no such checkpoint"):
        await asyncio.wait_for(lifecycle.run(ServeConfig(port=0), app, engine), 10)
    assert engine.ended


def test_wildcard_and_ipv6_hosts_make_a_usable_url() -> None:
    assert lifecycle.url("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert lifecycle.url("::1", 80) == "http://[::1]:80"


async def test_bytes_that_are_not_http_get_400(served: Served) -> None:
    async with connected(served) as (reader, writer):
        writer.write(b"\x16\x03\x01\x02\x00 not http\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400")


async def test_the_page_loads_nothing_from_other_hosts(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.url) as client:
        page = await client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        for asset, kind in (("page/page.css", "text/css"), ("page/page.js", "text/javascript")):
            assert asset in page.text
            response = await client.get(f"/{asset}")
            assert (response.status_code, response.headers["content-type"].startswith(kind)) == (200, True)
            assert "http:" not in response.text
            assert "https:" not in response.text
        assert "http" not in page.text


async def test_a_model_without_a_tokenizer_is_a_start_error(engine: FakeEngine, tmp_path: Any) -> None:
    with pytest.raises(StartError, match=r"tokenizer\.json"):
        build(ServeConfig(), cast(EngineClient, engine), {"tiny": tmp_path})
