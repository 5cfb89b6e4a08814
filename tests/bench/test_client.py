"""The benchmark client against a scripted server: whole, split, malformed and missing responses."""

from __future__ import annotations

import asyncio
import time

import pytest

from stretto.bench.client import Client, RequestFailed, ServerAddress
from stretto.errors import StartError
from tests.bench.serving import DONE, OK, chat, chunked, event, plain, serving, usage

CHAT = "chat/completions"


async def test_every_event_with_text_gets_a_timestamp() -> None:
    role = event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    end = event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    answer = [OK, *chunked(role, chat("a"), chat("b"), end, usage(7, 2), DONE)]
    async with serving(lambda *_: answer) as server:
        client = Client(server.url, api_key="secret")
        sample = await client.sample(CHAT, b"{}")
        client.close()
    assert sample.error is None
    assert (len(sample.stamps), sample.prompt_tokens, sample.output_tokens) == (2, 7, 2)
    assert sample.started < sample.stamps[0] <= sample.ended
    assert server.requests == [("/v1/chat/completions", b"{}")]
    assert b"Authorization: Bearer secret\r\n" in server.heads[0]


async def test_timestamps_show_the_pauses_of_the_server() -> None:
    first, second, *rest = chunked(chat("a"), chat("b"), DONE)
    async with serving(lambda *_: [OK, 0.05, first, 0.1, second, *rest]) as server:
        client = Client(server.url)
        sample = await client.sample(CHAT, b"{}")
        client.close()
    assert sample.ttft >= 0.045
    assert sample.itls[0] >= 0.09
    assert sample.output_tokens == 2, "without usage, events count"


@pytest.mark.parametrize("size", [1, 7, 64])
async def test_events_split_at_any_byte_are_reassembled(size: int) -> None:
    whole = OK + b"".join(chunked(chat("Grüße"), chat(" 🎼"), b": ping\n\n", usage(1, 2), DONE))
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    async with serving(lambda *_: pieces) as server:
        client = Client(server.url)
        assert [piece async for piece in client.pieces(CHAT, b"{}")] == ["Grüße", " 🎼"]
        client.close()


async def test_completions_reasoning_and_tool_calls_count_as_text() -> None:
    completion = event({"choices": [{"text": "x"}]}).replace(b"\n\n", b"\r\n\r\n")
    reasoning = event({"choices": [{"delta": {"reasoning_content": "y", "content": None}}]})
    call = event({"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}}]})
    named = b"event: message\n" + chat("z")
    async with serving(lambda *_: [OK, *chunked(completion, reasoning, call, named, DONE)]) as server:
        client = Client(server.url)
        assert [piece async for piece in client.pieces(CHAT, b"{}")] == ["x", "y", "z"]
        assert len((await client.sample(CHAT, b"{}")).stamps) == 4
        client.close()


async def test_one_connection_serves_many_requests() -> None:
    async with serving(lambda *_: [OK, *chunked(chat("a"), DONE)]) as server:
        client = Client(server.url)
        for _ in range(5):
            assert (await client.sample(CHAT, b"{}")).error is None
        assert server.connections == 1
        await asyncio.gather(*(client.sample(CHAT, b"{}") for _ in range(3)))
        assert server.connections == 3
        client.close()


@pytest.mark.parametrize("pause", [0.0, 0.05], ids=["while it sends", "while it is idle"])
async def test_a_kept_alive_connection_closed_by_the_server_is_replaced(pause: float) -> None:
    async with serving(lambda *_: [OK, *chunked(chat("a"), DONE), None]) as server:
        client = Client(server.url)
        for _ in range(3):
            assert (await client.sample(CHAT, b"{}")).error is None
            await asyncio.sleep(pause)
        assert (server.connections, len(server.requests)) == (3, 3)
        client.close()


REFUSED = b'{"error": {"message": "the queue is full", "type": "unavailable_error", "code": "overloaded"}}'
DIED = {"error": {"message": "the engine ended", "type": "unavailable_error", "code": "engine_died"}}


@pytest.mark.parametrize(
    ("answer", "kind", "detail"),
    [
        (plain("503 Service Unavailable", REFUSED), "HTTP 503 overloaded", "the queue is full"),
        (plain("502 Bad Gateway", b"<html>"), "HTTP 502", "<html>"),
        ([OK, *chunked(chat("a"), event(DIED), DONE)], "stream error engine_died", "the engine ended"),
        ([OK, *chunked(chat("a"))], "cut off", "without [DONE]"),
        ([OK, *chunked(usage(3, 0), DONE)], "no token", "without any text"),
        ([OK, *chunked(b"data: {oops\n\n", DONE)], "malformed event", "JSON"),
        ([OK, chunked(chat("a"))[0], None], "connection lost", "closed"),
        ([b"SSH-2.0-nope\r\n\r\n"], "connection lost", "not HTTP"),
    ],
)
async def test_each_failure_has_a_kind_and_a_detail(
    answer: list[bytes | float | None], kind: str, detail: str
) -> None:
    async with serving(lambda *_: answer) as server:
        client = Client(server.url)
        sample = await client.sample(CHAT, b"{}")
        client.close()
    assert sample.error == kind
    assert detail in sample.detail


async def test_a_refused_connection_is_a_failed_sample() -> None:
    sample = await Client("127.0.0.1:9").sample(CHAT, b"{}")
    assert sample.error == "cannot connect"
    assert "127.0.0.1:9" in sample.detail


async def test_a_silent_server_times_out() -> None:
    async with serving(lambda *_: [OK, 30.0]) as server:
        sample = await Client(server.url, timeout_s=0.1).sample(CHAT, b"{}")
    assert sample.error == "timeout"


async def test_closing_the_iterator_closes_the_connection() -> None:
    endless = [OK] + [piece for _ in range(2000) for piece in (0.005, chunked(chat("a"))[0])]
    async with serving(lambda *_: endless) as server:
        pieces = Client(server.url).pieces(CHAT, b"{}")
        assert await anext(pieces) == "a"
        await pieces.aclose()
        await asyncio.wait_for(server.cut.wait(), 5)


async def test_the_models_of_a_server_are_listed() -> None:
    page = plain("200 OK", b'{"object": "list", "data": [{"id": "desk"}, {"id": "big"}]}')
    async with serving(lambda *_: page) as server:
        client = Client(server.url)
        assert await client.models() == ["desk", "big"]
        client.close()
    async with serving(lambda *_: plain("200 OK", b"hello")) as server:
        with pytest.raises(RequestFailed, match="not an OpenAI-compatible server"):
            await Client(server.url).models()


def test_an_address_may_have_a_scheme_a_port_and_a_path_prefix() -> None:
    assert ServerAddress.parse("http://localhost:8000").prefix == "/v1"
    seen = ServerAddress.parse("https://api.example.org/base/v1/")
    assert (seen.tls, seen.port, seen.prefix, seen.host) == (True, 443, "/base/v1", "api.example.org")
    assert ServerAddress.parse("127.0.0.1:81").port == 81
    for wrong in ("ftp://x", "http://", "http://x:port"):
        with pytest.raises(StartError, match="not a server's address"):
            ServerAddress.parse(wrong)


async def test_reading_an_event_costs_less_than_fifty_microseconds() -> None:
    """The time for 20,000 events includes the scripted server, which runs on the same core."""
    blob = b"".join(chunked(*[chat("tok")] * 20_000, DONE))
    pieces = [OK] + [blob[at : at + 65536] for at in range(0, len(blob), 65536)]
    async with serving(lambda *_: pieces) as server:
        client = Client(server.url)
        before = time.process_time()
        sample = await client.sample(CHAT, b"{}")
        spent = time.process_time() - before
        client.close()
    assert len(sample.stamps) == 20_000
    assert spent < 1.0
