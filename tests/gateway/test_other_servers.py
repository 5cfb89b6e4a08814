"""Workers that are OpenAI servers of another kind, or no good ones: what they send, and what clients see."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from stretto.errors import EngineDied
from stretto.gateway import registry
from stretto.gateway.registry import EJECTED
from stretto.gateway.relay import ATTEMPTS
from stretto.gateway.upstream import health
from stretto.gateway.upstream.connection import Address
from stretto.protocol.relay import RELAY
from tests.gateway.cluster import ASK, CHAT, cluster, fake, in_front, until
from tests.gateway.test_bad_workers import report

Answer = Callable[[asyncio.StreamWriter], Awaitable[bool]]
MODELS = json.dumps({"object": "list", "data": [{"id": "tiny", "created": 1}]}).encode()
WORDS = ("Once", " upon", " a", " time")


def sized(body: bytes, status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def event(word: str) -> bytes:
    return b"data: %b\n\n" % json.dumps({"choices": [{"index": 0, "delta": {"content": word}}]}).encode()


class OtherServer:
    """A server with OpenAI's API and one model. `answer` writes the response to a POST, and tells whether the
    connection stays open. `asked`: how many came."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked = 0
        self.host = ""  # the last header Host
        self.url = ""
        self.open = set[asyncio.StreamWriter]()
        self.report: bytes | None = None  # once a Stretto has come in its place

    def abort(self) -> None:
        """Breaks all connections off."""
        for writer in self.open:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open.add(writer)
        try:
            stays = True
            while stays:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
                self.host = fields["Host"]
                await reader.readexactly(int(fields.get("Content-Length", 0)))
                if self.report is not None and head.split()[1] == RELAY:
                    writer.write(sized(self.report))
                elif head.split()[1] == "/api/tags":
                    writer.write(sized(b'{"models":[{"x":1}]}'))
                elif head.startswith("GET"):
                    found = head.split()[1] == "/v1/models"
                    writer.write(sized(MODELS) if found else sized(b"{}", "404 Not Found"))
                else:
                    self.asked += 1
                    stays = await self.answer(writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()
        self.open.discard(writer)


@asynccontextmanager
async def other(answer: Answer, host: str = "127.0.0.1") -> AsyncGenerator[OtherServer]:
    made = OtherServer(answer)
    server = await asyncio.start_server(made.serve, host, 0)
    shown = f"[{host}]" if ":" in host else host
    made.url = f"http://{shown}:{server.sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        server.close()
        made.abort()
        await asyncio.sleep(0.01)


async def whole(writer: asyncio.StreamWriter) -> bool:
    """A stream in chunks, to its end."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    for part in (*map(event, WORDS), b"data: [DONE]\n\n"):
        writer.write(b"%x\r\n%b\r\n" % (len(part), part))
    writer.write(b"0\r\n\r\n")
    return True


async def broken_off(writer: asyncio.StreamWriter) -> bool:
    """The first two words of such a stream."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    for word in WORDS[:2]:
        writer.write(b"%x\r\n%b\r\n" % (len(event(word)), event(word)))
    return False


async def until_closed(writer: asyncio.StreamWriter) -> bool:
    """A stream that ends with its connection, as many small servers send it."""
    writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
    for part in (*map(event, WORDS), b"data: [DONE]\n\n"):
        writer.write(part)
        await asyncio.sleep(0.01)
    return False


async def announced(writer: asyncio.StreamWriter) -> bool:
    """A response after one that only announces it."""
    writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
    return await whole(writer)


async def failing(writer: asyncio.StreamWriter) -> bool:
    writer.write(sized(b'{"error":{"message":"the device is gone"}}', "500 Internal Server Error"))
    return True


async def endless_headers(writer: asyncio.StreamWriter) -> bool:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(10_000):
        writer.write(b"X-%d: %b\r\n" % (number, b"a" * 1000))
        await writer.drain()
    writer.write(b"Content-Length: 2\r\n\r\n{}")
    return True


def words_of(answer: httpx.Response) -> list[str]:
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    return [choice["delta"]["content"] for each in events for choice in each.get("choices", [])]


@pytest.mark.parametrize("answer", [whole, until_closed, announced])
async def test_a_stream_passes_whole_however_its_server_frames_it(answer: Answer):
    async with other(answer) as server, in_front(server.url) as (client, gateway):
        for _ in range(2):
            got = await client.post(CHAT, json=ASK)
            assert got.status_code == 200 and words_of(got) == list(WORDS), got.text
            assert got.text.endswith("data: [DONE]\n\n") and "error" not in got.text
        assert all(each.view.usable for each in gateway.registry.workers.values())


async def test_a_stream_that_such_a_server_breaks_off_ends_in_an_error_and_begins_nowhere_else():
    async with (
        other(broken_off) as first,
        other(broken_off) as second,
        in_front(first.url, second.url) as (client, gateway),
    ):
        got = await client.post(CHAT, json=ASK)
        assert words_of(got) == list(WORDS[:2]) and "worker_lost" in got.text and "[DONE]" not in got.text
        assert first.asked + second.asked == 1 and gateway.relay.retries == 0


async def test_a_begun_answer_does_not_move_to_a_server_that_cannot_go_on(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(health, "FIRST_PAUSE_S", 0.05)
    dying = fake(10, 11, EngineDied("the engine ended"))
    async with other(whole) as server, cluster(checkpoint, dying, route="least-load") as (client, gateway):
        worker = gateway.registry.join(server.url)
        await until(lambda: worker.view.usable)
        worker.view.active += 1  # so the other one begins
        got = await client.post(CHAT, json=ASK)
        assert server.asked == 0 and "[DONE]" not in got.text and "error" in got.text


async def test_a_request_that_kills_its_workers_does_not_kill_all_of_them(checkpoint: Path):
    engines = [fake(10, 11, EngineDied("the engine ended")) for _ in range(6)]
    async with cluster(checkpoint, *engines) as (client, gateway):
        got = await client.post(CHAT, json=ASK)
        assert "worker_lost" in got.text and "[DONE]" not in got.text
        assert sum(len(engine.requests) for engine in engines) == ATTEMPTS
        assert [each.view.usable for each in gateway.registry.workers.values()].count(True) == 2


async def test_a_server_that_fails_at_once_does_not_attract_all_requests():
    async with (
        other(failing) as broken,
        other(whole) as well,
        in_front(broken.url, well.url, route="least-load") as (client, gateway),
    ):
        got = [await client.post(CHAT, json=ASK) for _ in range(12)]
        assert [each.status_code for each in got].count(500) == broken.asked == 3
        row = next(each for each in gateway.registry.workers.values() if not each.view.usable)
        assert "500" in row.error and row.breaker.broken


async def test_what_fails_everywhere_leaves_most_workers_in_use():
    async with other(failing) as first, other(failing) as second, other(failing) as third:
        async with in_front(first.url, second.url, third.url, route="round-robin") as (client, gateway):
            for _ in range(20):
                assert (await client.post(CHAT, json=ASK)).status_code == 500
            out = [each for each in gateway.registry.workers.values() if not each.view.usable]
            assert len(out) == len(gateway.registry.workers) // EJECTED


async def test_headers_without_end_cost_no_memory():
    async with other(endless_headers) as server, in_front(server.url) as (client, gateway):
        got = await client.post(CHAT, json=ASK)
        (worker,) = gateway.registry.workers.values()
        assert got.status_code == 503 and "bytes of headers" in worker.error


async def test_another_server_may_come_in_the_place_of_one():
    """What was no Stretto may be one after its connections have ended."""
    async with other(whole) as server, in_front(server.url) as (_, gateway):
        (worker,) = gateway.registry.workers.values()
        assert worker.plain and worker.view.outlooks["tiny"].seen is None
        server.report = report()
        server.abort()
        await until(lambda: worker.view.outlooks["tiny"].seen is not None)
        assert not worker.plain


async def test_lists_and_rewards_that_a_worker_garbles_are_its_own_mistake(checkpoint: Path):
    async def garbled(writer: asyncio.StreamWriter) -> bool:
        writer.write(sized(b'{"a":1}'))
        return True

    async with other(garbled) as server, cluster(checkpoint, fake(10)) as (client, gateway):
        server.report = report()
        worker = gateway.registry.join(server.url)
        await until(lambda: worker.view.usable)
        worker.models = {"another": None}  # so that it is asked too
        assert (await client.get("/api/tags")).status_code == 200
        for path in ("/v1/feedback", "/v1/feedback/policies"):
            got = await client.get(path)
            assert got.status_code == 503 and worker.name in got.json()["error"]["message"]
        assert (await client.delete("/v1/feedback")).status_code == 503


async def test_a_worker_is_reached_at_an_address_with_colons():
    try:
        context = other(whole, "::1")
        server = await context.__aenter__()
    except OSError:
        pytest.skip("this machine has no IPv6")
    async with in_front(server.url) as (client, gateway):
        assert words_of(await client.post(CHAT, json=ASK)) == list(WORDS)
        assert server.host == server.url.removeprefix("http://") and list(gateway.registry.workers) == [
            server.host
        ]
    await context.__aexit__(None, None, None)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://ann:secret@a:1", "has a user or a password"),
        ("http://a:1?key=x", "has more than the address"),
        ("http://a:1/#x", "has more than the address"),
        ("http://a:0", "is no URL of a worker"),
        ("http://a:1/a b", "is no URL of a worker"),
        ("http://b\u00fccher:1", "is no URL of a worker"),
        ("http://a:1\r\n", "is no URL of a worker"),
    ],
)
def test_a_url_with_more_than_an_address_is_refused(url: str, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        Address.of(url)
    assert "secret" not in str(caught.value)


def test_the_base_url_of_an_openai_client_is_the_url_of_a_worker():
    assert Address.of("http://a:1/v1/") == Address.of("http://a:1")
    assert Address.of("https://a/proxy/v1") == Address("a", 443, True, "/proxy")


async def test_a_gateway_that_was_stopped_blames_no_worker(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    """A pause of its own makes all reports late."""
    monkeypatch.setattr(registry, "SILENT_S", 0.3)
    engines = [fake(10, 0.1, 11, 0.1, 12, 0.1, 13) for _ in range(2)]
    async with cluster(checkpoint, *engines) as (client, gateway):
        streams = [asyncio.create_task(client.post(CHAT, json=ASK)) for _ in range(4)]
        await until(lambda: sum(len(engine.requests) for engine in engines) == 4)
        lost = list[str]()
        monkeypatch.setattr(gateway.registry, "_silent", lambda worker, reason, last: lost.append(reason))
        asyncio.get_running_loop().call_soon(time.sleep, 1.0)
        await asyncio.sleep(0.1)
        await asyncio.gather(*streams)
        assert lost == [] and gateway.relay.failovers == 0


async def silent(writer: asyncio.StreamWriter) -> bool:
    """Accepts a request and never answers."""
    await asyncio.sleep(60)
    return False


async def silent_after_head(writer: asyncio.StreamWriter) -> bool:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    return await silent(writer)


async def silent_in_body(writer: asyncio.StreamWriter) -> bool:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
    return await silent(writer)


async def silent_in_stream(writer: asyncio.StreamWriter) -> bool:
    """The first two words of a stream, and no more."""
    await broken_off(writer)
    return await silent(writer)


@pytest.mark.parametrize("answer", [silent, silent_after_head])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_server_that_never_answers_costs_its_client_an_error_in_time(answer: Answer, stream: bool):
    async with other(answer) as server, in_front(server.url, answer_timeout_s=0.3) as (client, gateway):
        got = await client.post(CHAT, json=ASK | {"stream": stream})
        assert (got.status_code, got.json()["error"]["code"]) == (504, "worker_timeout"), got.text
        assert "has not begun its answer after" in got.json()["error"]["message"]
        assert server.asked == 1 and gateway.relay.retries == 0
        (worker,) = gateway.registry.workers.values()
        assert worker.view.usable and worker.view.active == 0, "it may be slow at this request"


@pytest.mark.parametrize("answer", [silent, silent_after_head])
async def test_a_request_with_an_objective_goes_on_from_a_server_that_never_answers(answer: Answer):
    ask = ASK | {"objective": {"ttft_ms": 200}}
    async with (
        other(answer) as hung,
        other(whole) as well,
        in_front(hung.url, well.url, route="round-robin") as (client, gateway),
    ):
        got = [await client.post(CHAT, json=ask) for _ in range(2)]
        assert [words_of(each) for each in got] == [list(WORDS)] * 2 and gateway.relay.retries == 1
        assert hung.asked == 1 and well.asked == 2


async def test_a_server_that_often_never_answers_is_left_out():
    ask = ASK | {"objective": {"ttft_ms": 200}}
    async with (
        other(silent) as hung,
        other(whole) as well,
        in_front(hung.url, well.url, route="round-robin") as (client, gateway),
    ):
        worker = gateway.registry.workers[hung.url.removeprefix("http://")]
        for _ in range(12):
            if hung.asked == 3:
                break
            assert words_of(await client.post(CHAT, json=ask)) == list(WORDS)
        assert worker.breaker.broken and "504" in worker.error and not worker.view.usable


async def test_an_answer_in_which_a_server_falls_silent_ends_in_an_error():
    async with other(silent_in_stream) as server, in_front(server.url, silence_timeout_s=0.3) as (client, _):
        got = await client.post(CHAT, json=ASK)
        assert words_of(got) == list(WORDS[:2]) and "worker_timeout" in got.text and "[DONE]" not in got.text
    async with other(silent_in_body) as server, in_front(server.url, silence_timeout_s=0.3) as (client, _):
        got = await client.post(CHAT, json=ASK | {"stream": False})
        assert (got.status_code, got.json()["error"]["code"]) == (504, "worker_timeout")


async def test_a_slow_server_that_sends_now_and_then_is_waited_for():
    """No bound is on the whole answer, nor on one that may be late."""

    async def slow(writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(0.5)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for part in (*map(event, WORDS), b"data: [DONE]\n\n"):
            writer.write(part)
            await asyncio.sleep(0.3)
        return False

    late = ASK | {"objective": {"ttft_ms": 10, "on_miss": "late"}}
    async with other(slow) as server, in_front(server.url, silence_timeout_s=1.0) as (client, _):
        assert words_of(await client.post(CHAT, json=late)) == list(WORDS)
