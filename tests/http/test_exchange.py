"""The request id of every response, and the lines of the access log."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from stretto.config import ServeConfig
from stretto.server.app import App
from stretto.types import Reason
from tests.server.conftest import CHAT, HELLO, Served
from tests.server.fake_engine import FakeEngine

LOGGED = ServeConfig(port=0, access_log=True, api_keys={"the-secret-key": "acme"}, max_body_bytes=1024)
KEY = {"Authorization": "Bearer the-secret-key"}
HEADER = "x-request-id"
FIELDS = {
    *("time", "request_id", "tenant", "method", "route", "model", "tier", "variant", "status", "outcome"),
    *("finish_reason", "queue_ms", "ttft_ms", "itl_p99_ms", "total_ms", "bytes_in", "bytes_out"),
    *("prompt_tokens", "cached_tokens", "completion_tokens"),
}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("GET", "/metrics", 200),
        ("GET", "/page/page.css", 200),
        ("GET", "/v1/models/none", 404),
        ("GET", "/no/such/path", 404),
        ("GET", CHAT, 405),
        ("POST", CHAT, 400),
    ],
)
async def test_every_response_has_the_clients_id_or_a_new_one(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    given = await client.request(method, path, headers={HEADER: "my-id_1.2:3"})
    assert (given.status_code, given.headers.get_list(HEADER)) == (status, ["my-id_1.2:3"])
    made = [(await client.request(method, path)).headers[HEADER] for _ in range(2)]
    assert made[0] != made[1] and all(re.fullmatch(r"[0-9a-f]{24}", each) for each in made)


@pytest.mark.parametrize("config", [ServeConfig(port=0, max_body_bytes=1024)])
async def test_refusals_have_an_id_too(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    large = await client.post(CHAT, json=HELLO | {"user": "u" * 2000}, headers={HEADER: "large"})
    assert (large.status_code, large.headers[HEADER]) == (413, "large")
    engine.ready = False
    refused = await client.post(CHAT, json=HELLO, headers={HEADER: "early"})
    assert (refused.status_code, refused.headers[HEADER]) == (503, "early")


@pytest.mark.parametrize(
    "evil", ["", "a b", "a\tb", 'a"b', "a\\b", "<a>", "a;b", "\xe4", "x" * 65, "x" * 60_000]
)
async def test_an_id_that_is_no_plain_token_is_replaced(client: httpx.AsyncClient, evil: str) -> None:
    answer = await client.post(CHAT, json=HELLO, headers={HEADER.encode(): evil.encode("latin-1")})
    assert answer.status_code == 200
    assert re.fullmatch(r"[0-9a-f]{24}", answer.headers[HEADER])


async def test_a_bug_in_a_page_is_a_typed_error_with_an_id_and_its_text_is_nowhere(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken() -> None:
        raise RuntimeError("SECRET")

    monkeypatch.setattr(engine, "worker_state", broken)
    answer = await client.get("/state", headers={HEADER: "abc"})
    assert (answer.status_code, answer.headers[HEADER]) == (500, "abc")
    assert answer.json()["error"]["code"] == "internal_error"
    assert "RuntimeError at " in caplog.text and "SECRET" not in caplog.text + answer.text


async def raw(served: Served, sent: bytes) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(sent)
    answer = (await reader.read()).decode("latin-1")
    writer.close()
    return answer


async def test_what_never_reaches_a_handler_has_an_id_too(served: Served) -> None:
    """Bytes that are no HTTP, headers without an end, and a foreign host."""
    nonsense = await raw(served, b"no http at all\r\n\r\n")
    assert re.match(r"HTTP/1\.1 400 (.|\n)*\r\nx-request-id: [0-9a-f]{24}\r\n", nonsense)
    endless = await raw(served, b"GET / HTTP/1.1\r\nX-Request-Id: mine\r\n" + b"a: b\r\n" * 10_000)
    assert re.match(r"HTTP/1\.1 431 (.|\n)*\r\nx-request-id: mine\r\n", endless)
    foreign = await raw(served, b"GET / HTTP/1.1\r\nHost: evil.test\r\nConnection: close\r\n\r\n")
    assert re.match(r"HTTP/1\.1 403 (.|\n)*\r\nx-request-id: [0-9a-f]{24}\r\n", foreign)


@pytest.mark.parametrize("stream", [True, False])
async def test_the_engine_and_the_id_of_the_answer_have_the_request_id(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    answer = await client.post(CHAT, json=HELLO | {"stream": stream, "n": 2}, headers={HEADER: "abc"})
    assert answer.headers[HEADER] == "abc"
    assert [request.request_id for request in engine.requests] == ["abc", "abc"]
    first = answer.text.removeprefix("data: ").partition("\n\n")[0] if stream else answer.text
    assert json.loads(first)["id"] == "chatcmpl-abc"


async def test_the_openai_client_shows_the_id(served: Served, engine: FakeEngine) -> None:
    ai: Any = AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    answer = await ai.chat.completions.create(**HELLO, model="tiny")
    assert answer._request_id and answer.id == f"chatcmpl-{answer._request_id}"
    assert engine.requests[0].request_id == answer._request_id
    await ai.close()


def lines_of(app: App, capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert app.server.access_log is not None
    app.server.access_log.close()
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


@pytest.mark.parametrize("config", [LOGGED])
async def test_each_request_is_one_line_without_content_or_keys(
    app: App, client: httpx.AsyncClient, engine: FakeEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = {"messages": [{"role": "user", "content": "SECRET\nprompt"}], "user": "SECRET user"}
    await client.post(CHAT, json=secret | {"max_tokens": 2}, headers=KEY | {HEADER: "first"})
    await client.post(CHAT, json=secret | {"model": "SECRET"}, headers=KEY)
    await client.post(CHAT, json=secret, headers={"Authorization": "Bearer SECRET"})
    await client.request("GET", "/v1/models/SECRET?SECRET=1", headers=KEY)
    await client.request("SECRET", "/SECRET")
    engine.script = lambda request: [300, 301, Reason.ERROR]
    await client.post(CHAT, json=secret | {"stream": True, "service_tier": "flex"}, headers=KEY)
    lines = lines_of(app, capfd)
    assert not re.search("secret|prompt\\b|Hello", json.dumps(lines), re.IGNORECASE)
    assert all(line.keys() == FIELDS for line in lines)
    whole, _, locked, _, nothing, broken = lines
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\.\d{3}Z", whole["time"])
    expected = {"request_id": "first", "tenant": "acme", "method": "POST", "route": CHAT, "status": 200}
    expected |= {"model": "tiny", "variant": "tiny", "tier": "default", "outcome": "ok"}
    expected |= {"finish_reason": "length", "queue_ms": 1.5, "cached_tokens": 3, "completion_tokens": 2}
    assert {name: whole[name] for name in expected} == expected
    assert whole["prompt_tokens"] == len(engine.requests[0].prompt)
    assert 0 < whole["ttft_ms"] <= whole["total_ms"] and whole["itl_p99_ms"] > 0
    assert whole["bytes_in"] > 50 and whole["bytes_out"] > 200
    seen = [(line["status"], line["route"], line["outcome"], line["model"]) for line in lines]
    assert seen[1:] == [
        (404, CHAT, "model_not_found", None),
        (401, CHAT, "invalid_api_key", None),
        (404, "/v1/models/{name:path}", "model_not_found", None),
        (404, None, "not_found", None),
        (200, CHAT, "engine_error", "tiny"),
    ]
    assert (locked["tenant"], nothing["method"], broken["tier"]) == (None, "other", "flex")


async def test_there_is_no_access_log_by_default(app: App, client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json=HELLO)
    assert app.server.access_log is None
