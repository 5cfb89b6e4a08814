"""The handshake, the limits, and what hostile or unlucky clients get."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import time
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from stretto.config import ServeConfig
from stretto.errors import StrettoError
from tests.server.conftest import Served
from tests.server.fake_engine import FakeEngine
from tests.server.realtime.conftest import Opener, Talk, settled

OPEN = ServeConfig(port=0, max_waiting=32, drain_s=5.0)


@pytest.fixture
def config(request: pytest.FixtureRequest) -> ServeConfig:
    return getattr(request, "param", OPEN)


def configured(**settings: Any) -> Any:
    return pytest.mark.parametrize("config", [ServeConfig(port=0, drain_s=5.0, **settings)], indirect=True)


async def refused(opened: Any) -> tuple[int, dict[str, Any], Any]:
    """The status, the error and the headers of a handshake that is refused."""
    with pytest.raises(InvalidStatus) as caught:
        async with opened:
            pass
    response = caught.value.response
    return response.status_code, json.loads(response.body or b"{}").get("error", {}), response.headers


# The handshake.


async def test_a_plain_request_is_told_to_upgrade(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/realtime")
    assert (answer.status_code, answer.json()["error"]["code"]) == (426, "upgrade_required")


async def test_the_id_of_the_request_is_in_the_handshake_and_in_the_engine(
    open_session: Opener, engine: FakeEngine
) -> None:
    async with open_session(additional_headers={"x-request-id": "mine-1"}) as talk:
        assert talk.socket.response.headers["x-request-id"] == "mine-1"
        await talk.say("Hi")
        await talk.send("response.create")
        await talk.answer()
    assert engine.requests[0].request_id == "mine-1"


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("?model=other", 404, "model_not_found"),
        ("?call_id=1", 400, "unsupported_field"),
        ("?model=tiny&intent=transcription", 400, "unsupported_field"),
    ],
)
async def test_a_wrong_query_is_refused(open_session: Opener, query: str, status: int, code: str) -> None:
    found, error, headers = await refused(open_session(query))
    assert (found, error["code"]) == (status, code) and headers["x-request-id"]


async def test_other_paths_have_no_socket(served: Served) -> None:
    for path in ("/", "/v1/chat/completions", "/v1/realtime/x"):
        status, error, _ = await refused(connect(f"ws://127.0.0.1:{served.port}{path}"))
        assert (status, error["code"]) == (404, "not_found")
    async with connect(f"ws://127.0.0.1:{served.port}/v1/realtime/"):
        pass


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Origin": "https://elsewhere.example"}, "origin_not_allowed"),
        ({"Origin": "null"}, "origin_not_allowed"),
        ({"Sec-Fetch-Site": "cross-site"}, "origin_not_allowed"),
    ],
)
async def test_pages_of_strangers_open_no_socket(
    open_session: Opener, headers: dict[str, str], code: str
) -> None:
    status, error, _ = await refused(open_session(additional_headers=headers))
    assert (status, error["code"]) == (403, code)


@configured(cors_origins=("https://app.example.org",))
async def test_a_page_that_is_allowed_opens_one(open_session: Opener, served: Served) -> None:
    for origin in ("https://app.example.org", f"http://127.0.0.1:{served.port}"):
        async with open_session(additional_headers={"Origin": origin}):
            pass


async def test_a_foreign_host_is_refused(served: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        "GET /v1/realtime HTTP/1.1",
        "Host: rebound.example",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 403") and b"host_not_allowed" in answer
    writer.close()


@configured(api_keys={"secret": "anna", "other": "ben"})
async def test_keys(open_session: Opener, engine: FakeEngine) -> None:
    status, error, _ = await refused(open_session())
    assert (status, error["code"]) == (401, "invalid_api_key")
    assert (await refused(open_session(additional_headers={"Authorization": "Bearer no"})))[0] == 401
    assert (await refused(open_session(subprotocols=["realtime", "openai-insecure-api-key.no"])))[0] == 401
    protocols = ["realtime", "openai-insecure-api-key.other", "openai-beta.realtime-v1"]
    async with open_session(subprotocols=protocols) as talk:
        assert talk.socket.subprotocol == "realtime"
        await talk.say("Hi")
        await talk.send("response.create")
        await talk.answer()
        assert "response.text.delta" in talk.types
    async with open_session(additional_headers={"Authorization": "Bearer secret"}) as talk:
        await talk.say("Hi")
        await talk.send("response.create")
        await talk.answer()
    assert [request.tenant for request in engine.requests] == ["ben", "anna"]


@configured(max_sessions=2, api_keys={"secret": "anna", "other": "ben"})
async def test_a_tenant_has_so_many_sessions(open_session: Opener) -> None:
    anna, ben = ({"Authorization": f"Bearer {key}"} for key in ("secret", "other"))
    async with open_session(additional_headers=anna):
        async with open_session(additional_headers=anna):
            status, error, headers = await refused(open_session(additional_headers=anna))
            assert (status, error["code"]) == (503, "overloaded") and headers["retry-after"]
            async with open_session(additional_headers=ben):
                pass

        async def opened() -> bool:
            try:
                async with open_session(additional_headers=anna):
                    return True
            except InvalidStatus:
                return False

        async with asyncio.timeout(20):
            while not await opened():
                await asyncio.sleep(0.05)


# Limits of time and size.


@configured(session_timeout_s=0.3)
async def test_a_silent_session_ends(open_session: Opener, engine: FakeEngine) -> None:
    engine.script = lambda request: [65, 0.8, 66]
    async with open_session() as talk:
        await talk.say("Hi")
        await talk.send("response.create")
        assert (await talk.answer())["status"] == "completed", "an answer keeps it open"
        assert (await talk.error())["code"] == "session_expired"
        with pytest.raises(ConnectionClosed):
            await talk.next()
        assert (talk.socket.close_code, talk.socket.close_reason) == (1000, "session_expired")


@configured(max_body_bytes=2048)
async def test_a_huge_message_ends_the_session(open_session: Opener) -> None:
    async with open_session() as talk:
        await talk.send("input_text.append", text="x" * 5000)
        with pytest.raises(ConnectionClosed):
            await talk.next()
        assert talk.socket.close_code == 1009


async def test_a_thousand_events_at_once_and_then_a_pace(talk: Talk, engine: FakeEngine) -> None:
    engine.script = lambda request: [] if request.spare_time else [65]
    for _ in range(1000):
        await talk.send("input_text.append", text="word ")
    await talk.send("input_text.commit", create_response=False)
    item = (await talk.until("conversation.item.done"))["item"]
    assert item["content"][0]["text"] == "word " * 1000, "nothing is lost"
    started = time.monotonic()
    for _ in range(500):
        await talk.send("input_text.append", text="b")
    await talk.send("input_text.commit", create_response=False)
    item = (await talk.until("conversation.item.done"))["item"]
    assert item["content"][0]["text"] == "b" * 500
    assert time.monotonic() - started > 0.4, "500 a second"


@configured(send_timeout_s=0.3)
async def test_a_client_that_reads_nothing_holds_up_itself_alone(
    open_session: Opener, engine: FakeEngine, served: Served
) -> None:
    engine.script = lambda request: [65] * 400_000
    async with open_session(max_queue=1) as slow, open_session() as quick:
        await slow.say("Hi")
        await slow.send("response.create")
        slow.socket.transport.pause_reading()
        await settled(lambda: len(engine.open) == 1)
        await quick.send("conversation.item.retrieve", item_id="none")
        await quick.error()
        await settled(lambda: not engine.open)
        assert engine.streams[0].emitted < 400_000
        slow.socket.transport.abort()
    async with httpx.AsyncClient() as client:
        metrics = (await client.get(f"{served.url}/metrics")).text
    assert 'stretto_rejected_requests_total{reason="blocked_send"} 1.0' in metrics


# Endings.


async def test_a_drain_lets_the_answer_end_and_says_so(
    open_session: Opener, engine: FakeEngine, app: Any
) -> None:
    engine.script = lambda request: [65, 0.5, 66]
    async with open_session() as busy, open_session() as idle:
        await busy.say("Hi")
        await busy.send("response.create")
        await busy.until("response.output_text.delta")
        app.server.close()
        assert (await idle.error())["code"] == "draining"
        with pytest.raises(ConnectionClosed):
            await idle.next()
        assert idle.socket.close_code == 1001
        assert (await busy.answer())["status"] == "completed"
        assert (await busy.error())["code"] == "draining"
        with pytest.raises(ConnectionClosed):
            await busy.next()
        assert busy.socket.close_code == 1001
    async with asyncio.timeout(20):
        await app.server.idle()
    assert (await refused(open_session()))[0] == 503


async def test_a_drain_that_takes_too_long_ends_the_answer(
    open_session: Opener, engine: FakeEngine, app: Any
) -> None:
    engine.script = lambda request: [65, 3600.0]
    async with open_session() as talk:
        await talk.say("Hi")
        await talk.send("response.create")
        await talk.until("response.output_text.delta")
        app.server.close()
        app.server.end_calls(StrettoError("too long"))
        assert (await talk.answer())["status"] == "failed"
        with pytest.raises(ConnectionClosed):
            await talk.until("nothing")
        assert talk.socket.close_code == 1001
    await settled(lambda: not engine.open)


# Garbage.


async def test_the_server_outlives_garbage(
    served: Served, open_session: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    draw = random.Random(7)
    for _ in range(60):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        key = base64.b64encode(os.urandom(16)).decode()
        head = (
            "GET /v1/realtime HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        ).encode()
        garbage = draw.randbytes(draw.randrange(1, 400))
        writer.write(head + garbage if draw.random() < 0.3 else head)
        if draw.random() < 0.7:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await reader.readuntil(b"\r\n\r\n")
            writer.write(garbage)
        if draw.random() < 0.5 and not writer.is_closing():
            with contextlib.suppress(OSError):
                writer.write_eof()
        await asyncio.sleep(0.01)
        writer.transport.abort() if draw.random() < 0.5 else writer.close()
    async with open_session() as talk:
        await talk.say("Hi")
        await talk.send("response.create")
        assert (await talk.answer())["status"] == "completed"
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


async def test_binary_frames_fragments_and_pings(talk: Talk) -> None:
    await talk.socket.send(b"\xff\xfe\x00 no json")
    assert (await talk.error())["type"] == "invalid_request_error"
    await talk.socket.send(b'{"type": "input_text.append", "text": "binary"}')
    await talk.socket.send(iter(['{"type": "input_text', '.append", "text": " and ', 'fragments"}']))
    await asyncio.wait_for(await talk.socket.ping(), 10)
    await talk.send("input_text.commit", create_response=False)
    item = (await talk.until("conversation.item.done"))["item"]
    assert item["content"][0]["text"] == "binary and fragments"
    await talk.socket.send("[" * 100_000)
    await talk.error()
    await talk.socket.send('{"type": "input_text.append", "text": "\\ud83d"}')
    await talk.send("input_text.commit", create_response=False)
    assert "\ufffd" in (await talk.until("conversation.item.done"))["item"]["content"][0]["text"]


async def test_text_that_is_none_ends_the_session_and_is_not_logged(
    open_session: Opener, caplog: pytest.LogCaptureFixture, engine: FakeEngine
) -> None:
    async with open_session() as talk:
        await talk.socket.send(b"\xff\xfe", text=True)
        with pytest.raises(ConnectionClosed):
            await talk.next()
        assert talk.socket.close_code == 1007
    assert not [record for record in caplog.records if record.name.startswith(("uvicorn", "stretto.http"))]


@configured(access_log=True)
async def test_a_session_has_a_line_in_the_access_log(open_session: Opener, app: Any) -> None:
    lines: list[bytes] = []
    app.server.access_log.write = lines.append
    async with open_session() as talk:
        await talk.say("private words")
    await settled(lambda: len(lines) == 1)
    line = json.loads(lines[0])
    assert (line["route"], line["status"], line["method"]) == ("/v1/realtime", 101, "GET")
    assert line["bytes_in"] > 50 and line["bytes_out"] > 500 and b"private" not in lines[0]


@pytest.mark.parametrize("handshake", ["no version", "no key", "old version", "http 1.0", "post"])
async def test_a_handshake_that_is_none(served: Served, handshake: str) -> None:
    lines = {
        "first": "GET /v1/realtime HTTP/1.1",
        "host": "Host: localhost",
        "upgrade": "Upgrade: websocket",
        "connection": "Connection: Upgrade",
        "key": "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        "version": "Sec-WebSocket-Version: 13",
    }
    if handshake in ("no version", "no key"):
        del lines[handshake.removeprefix("no ")]
    elif handshake == "old version":
        lines["version"] = "Sec-WebSocket-Version: 7"
    elif handshake == "http 1.0":
        lines["first"] = "GET /v1/realtime HTTP/1.0"
    else:
        lines["first"] = "POST /v1/realtime HTTP/1.1"
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write("\r\n".join([*lines.values(), "", ""]).encode())
    async with asyncio.timeout(20):
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        error = json.loads(await reader.readexactly(length))["error"]
    assert answer.split()[1] in (b"400", b"405", b"426") and b"application/json" in answer
    assert error["message"] and error["type"] == "invalid_request_error"
    writer.close()


EVENTS = st.sampled_from(
    [
        {"type": "input_text.append", "text": "a word and more words to read "},
        {"type": "input_text.replace", "text": "other", "start": 3, "end": 9},
        {"type": "input_text.clear"},
        {"type": "input_text.commit"},
        {"type": "input_text.commit", "create_response": False},
        {"type": "response.create"},
        {"type": "response.create", "response": {"conversation": "none", "input": []}},
        {"type": "response.cancel"},
        {"type": "conversation.item.create", "item": {"id": "a", "role": "user", "content": "Hi"}},
        {"type": "conversation.item.create", "item": {"id": "b", "role": "assistant", "content": "Hi"}},
        {"type": "conversation.item.delete", "item_id": "a"},
        {"type": "conversation.item.truncate", "item_id": "b", "text_end": 1},
        {"type": "session.update", "session": {"instructions": "Be brief."}},
        {"type": "session.update", "session": {"max_output_tokens": 2}},
        {"type": "nonsense"},
    ]
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=st.lists(EVENTS, max_size=30), cut=st.booleans())
async def test_events_in_any_order(
    served: Served, engine: FakeEngine, events: list[dict[str, Any]], cut: bool
) -> None:
    """Each response has one end, and nothing is left open."""
    engine.script = lambda request: [0.01] if request.spare_time else [65, 0.01, 66]
    async with connect(f"ws://127.0.0.1:{served.port}/v1/realtime", compression=None) as socket:
        talk = Talk(socket)
        for event in events:
            await socket.send(json.dumps(event))
        if not cut:
            await talk.send("conversation.item.retrieve", item_id="the end")
            while "the end" not in str(await talk.next()):
                pass
            begun = talk.types.count("response.created")
            while talk.types.count("response.done") < begun:
                await talk.next()
            done = [event["response"]["id"] for event in talk.seen if event["type"] == "response.done"]
            assert len(set(done)) == len(done) == begun
            errors = [event["error"] for event in talk.seen if event["type"] == "error"]
            assert not [error for error in errors if error["type"] == "server_error"]
    await settled(lambda: not engine.open)
