"""Which hosts, origins and content types are served: web pages of strangers may neither ask nor read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from stretto.config import ServeConfig
from stretto.errors import StartError
from stretto.http import serving as lifecycle
from stretto.http.hosts import HostRule
from stretto.server import pages
from stretto.server.app import App
from tests.server.conftest import CHAT, HELLO
from tests.server.fake_engine import FakeEngine, build

Headers = dict[str, str]
BODY = json.dumps(HELLO).encode()
PAGE = "https://app.example.org"
JSON = {"content-type": "application/json"}
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, x-a"}


async def ask(app: App, method: str, path: str, headers: Headers, body: bytes = b"") -> httpx.Response:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000"
    ) as client:
        return await client.request(method, path, headers=headers, content=body)


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


HOSTS: list[tuple[str, tuple[str, ...], list[str], list[str]]] = [
    (
        "127.0.0.1",
        (),
        [
            "localhost",
            "LOCALHOST:1",
            "127.0.0.1:8000",
            "[::1]",
            "[::1]:80",
            "[0:0:0:0:0:0:0:1]",
            "localhost.",
        ],
        [
            "evil.test",
            "evil.test:8000",
            "localhost.evil.test",
            "evil.test@localhost",
            "127.0.0.1.evil.test",
            "10.0.0.1",
            "[::2]",
            "",
            ":8000",
            "localhost:99999999",
            "localhost, evil.test",
            "localhost/",
            "local host",
        ],
    ),
    ("127.0.0.2", (), ["127.0.0.2:8000", "localhost"], ["127.0.0.3"]),
    ("::1", (), ["[::1]:8000", "localhost"], ["evil.test"]),
    ("0.0.0.0", (), ["10.0.0.1:80", "[fe80::1]", "localhost"], ["evil.test", "10.0.0.1.evil.test"]),
    ("llm.lan", (), ["llm.lan", "LLM.lan:8000", "192.168.1.5"], ["lan", "a.llm.lan"]),
    (
        "127.0.0.1",
        ("llm.example.org", "*.inner.org", "[fd00::1]"),
        ["llm.example.org:443", "a.inner.org", "a.b.inner.org", "[fd00:0::1]"],
        ["example.org", "inner.org", "evilinner.org", "llm.example.org.evil.test"],
    ),
    ("127.0.0.1", ("*",), ["evil.test", "anything:1"], []),
]


@pytest.mark.parametrize(("bind", "extra", "served", "refused"), HOSTS)
def test_a_server_answers_for_its_own_hosts(
    bind: str, extra: tuple[str, ...], served: list[str], refused: list[str]
) -> None:
    rule = HostRule(ServeConfig(host=bind, allowed_hosts=extra))
    assert [host for host in served if not rule.allows(host)] == []
    assert [host for host in refused if rule.allows(host)] == []


async def test_a_rebound_host_reads_nothing(app: App, engine: FakeEngine) -> None:
    for path in ("/state", "/v1/models", "/metrics", "/", "/health", "/nothing"):
        assert code(await ask(app, "GET", path, {"host": "evil.test"})) == (403, "host_not_allowed")
    assert code(await ask(app, "POST", CHAT, JSON | {"host": "evil.test"}, BODY))[0] == 403
    assert not engine.requests
    assert (
        'stretto_rejected_requests_total{reason="host_not_allowed"} 7.0' in app.server.metrics.text().decode()
    )


@pytest.mark.parametrize("names", [[], [b"localhost", b"localhost"], [b"localhost", b"evil.test"]])
async def test_a_missing_or_second_host_is_refused(app: App, names: list[bytes]) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    headers = [(b"host", name) for name in names]
    scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": "/health", "headers": headers}
    await app(scope, receive, send)
    assert sent[0]["status"] == 400
    sent.clear()
    await app(scope | {"http_version": "1.0"}, receive, send)
    assert sent[0]["status"] == (400 if names else 200), "HTTP/1.0 has no Host"


FOREIGN: list[Headers] = [
    {"origin": "https://evil.test"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:3000"},
    {"origin": "http://localhost:8000"},
    {"origin": "http://127.0.0.1:8000.evil.test"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "cross-site", "origin": "http://127.0.0.1:8000"},
]
OWN: list[Headers] = [
    {},
    {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"},
    {"origin": "HTTP://127.0.0.1:8000"},
    {"origin": "https://127.0.0.1:8000"},
    {"sec-fetch-site": "none"},
]


@pytest.mark.parametrize("headers", FOREIGN)
async def test_a_foreign_page_causes_no_work(app: App, engine: FakeEngine, headers: Headers) -> None:
    for method, path in (("POST", CHAT), ("POST", "/v1/embeddings"), ("DELETE", "/health"), ("PUT", "/")):
        response = await ask(app, method, path, JSON | headers, BODY)
        assert code(response) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in response.headers
    assert not engine.requests
    response = await ask(app, "GET", "/state", headers)
    assert response.status_code == 200, "the browser lets no other page read it"
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("headers", OWN)
async def test_the_own_page_and_other_programs_are_served(app: App, headers: Headers) -> None:
    assert (await ask(app, "POST", CHAT, JSON | headers, BODY)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=a"},
        {"content-type": "text/plain; application/json"},
        {"content-type": ""},
        {"content-type": "application/json, text/plain"},
    ],
)
async def test_a_body_must_be_declared_as_json(app: App, engine: FakeEngine, headers: Headers) -> None:
    for path in (CHAT, "/v1/completions", "/v1/embeddings"):
        assert code(await ask(app, "POST", path, headers, BODY)) == (415, "unsupported_media_type")
    assert not engine.requests


async def test_a_preflight_is_refused_unless_its_origin_is_listed(
    checkpoint: Path, engine: FakeEngine
) -> None:
    closed = build(ServeConfig(), engine, {"tiny": checkpoint})
    opened = build(ServeConfig(cors_origins=(f"{PAGE}/", "null")), engine, {"tiny": checkpoint})
    response = await ask(closed, "OPTIONS", CHAT, PREFLIGHT | {"origin": PAGE})
    assert code(response) == (403, "origin_not_allowed")
    assert not [name for name in response.headers if name.startswith("access-control")]
    for origin in ("https://evil.test", f"{PAGE}.evil.test", "http://app.example.org"):
        assert code(await ask(opened, "OPTIONS", CHAT, PREFLIGHT | {"origin": origin}))[0] == 403
    private = {"access-control-request-private-network": "true"}
    response = await ask(opened, "OPTIONS", CHAT, PREFLIGHT | private | {"origin": PAGE})
    assert response.status_code == 204
    assert response.headers["access-control-allow-origin"] == PAGE
    assert "POST" in response.headers["access-control-allow-methods"]
    assert response.headers["access-control-allow-headers"] == "authorization, x-a"
    assert response.headers["access-control-allow-private-network"] == "true"
    assert response.headers["vary"] == "origin"
    assert code(await ask(opened, "OPTIONS", CHAT, {"origin": PAGE})) == (405, "method_not_allowed")


async def test_a_listed_origin_may_ask_and_read_the_answer(checkpoint: Path, engine: FakeEngine) -> None:
    app = build(ServeConfig(cors_origins=(PAGE,)), engine, {"tiny": checkpoint})
    page = JSON | {"origin": PAGE, "sec-fetch-site": "cross-site"}
    stream = json.dumps(HELLO | {"stream": True}).encode()
    for body, status in ((BODY, 200), (stream, 200), (b"{", 400)):
        response = await ask(app, "POST", CHAT, page, body)
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (status, PAGE)
        assert "x-request-id" in response.headers["access-control-expose-headers"]
    assert (await ask(app, "GET", "/v1/models", page)).headers["access-control-allow-origin"] == PAGE
    response = await ask(app, "GET", "/v1/models", {"origin": "https://evil.test"})
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cors_origins": ("app.example.org",)}, "is no origin"),
        ({"cors_origins": ("https://a.org/path",)}, "is no origin"),
        ({"allowed_hosts": ("http://a.org",)}, "is no host name"),
        ({"allowed_hosts": ("a.org/x",)}, "is no host name"),
        ({"allowed_hosts": ("",)}, "is no host name"),
    ],
)
def test_a_host_or_origin_that_cannot_match_is_a_start_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StartError, match=message):
        ServeConfig(**settings)


async def test_names_of_page_files_that_do_not_exist_are_not_kept(app: App) -> None:
    for number in range(50):
        assert code(await ask(app, "GET", f"/page/{number}{'a' * 20_000}", {})) == (404, "not_found")
    page = pages.PAGE
    assert len(page._made) <= 2 * len(page._files)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(
    ("host", "keys", "warned"),
    [("0.0.0.0", {}, True), ("0.0.0.0", {"key": "a"}, False), ("127.0.0.1", {}, False)],
)
async def test_an_open_server_on_a_network_warns(
    checkpoint: Path, engine: FakeEngine, caplog: pytest.LogCaptureFixture, host: str, keys: Any, warned: bool
) -> None:
    engine.failure = "enough"
    config = ServeConfig(host=host, port=0, api_keys=keys)
    with caplog.at_level(logging.WARNING), pytest.raises(StartError, match="enough"):
        await lifecycle.run(config, build(config, engine, {"tiny": checkpoint}), engine)
    assert ("without API keys" in caplog.text) is warned
