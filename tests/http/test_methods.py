"""Every path of a worker and of a gateway, asked with every method: what it takes, 404 and 405."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Match, Route

from stretto.config import ServeConfig
from stretto.gateway.app import Gateway
from stretto.gateway.settings import GatewayConfig
from stretto.http.errors import NothingAt
from stretto.http.guard import METHODS
from tests.server.fake_engine import FakeEngine, build, info

ASKED = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PURGE")
STREAMS = "/live"  # a GET of it does not end
PAGE = "https://app.example.org"
ABSENT = (
    "/v1",
    "/v1/nothing",
    "/v1/chat/completions/1",
    "/v1/responses/input_tokens",
    "/v1/responses/compact",
    "/v1/responses/resp_1/cancel",
    "/v1/messages/batches",
    "/api/pull",
    "/health/1",
)


@pytest.fixture(params=["worker", "gateway"])
def served(request: pytest.FixtureRequest, checkpoint: Path) -> Starlette:
    if request.param == "gateway":
        return Gateway(GatewayConfig(cors_origins=(PAGE,)))
    engine = FakeEngine(lambda request: [10], {"tiny": info(vocab=300)})
    return build(ServeConfig(cors_origins=(PAGE,)), engine, {"tiny": checkpoint})


@asynccontextmanager
async def talking(app: Starlette) -> AsyncGenerator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        yield client


def taken(app: Starlette) -> dict[str, set[str]]:
    """The methods of each path, with 1 in the place of a parameter."""
    routes = [each for each in app.routes if isinstance(each, Route)]
    routes = [each for each in routes if not isinstance(each.endpoint, NothingAt)]
    found: dict[str, set[str]] = {}
    for each in routes:
        path = re.sub(r"\{[^}]*\}", "1", each.path)
        scope: dict[str, Any] = {
            "type": "http",
            "method": "GET",
            "path": path,
            "root_path": "",
            "headers": [],
        }
        matching = [other for other in routes if other.matches(scope)[0] is not Match.NONE]
        found[path] = {method for other in matching for method in other.methods or ()}
    return found


async def test_a_path_takes_its_methods_and_names_them_to_the_others(served: Starlette) -> None:
    async with talking(served) as client:
        paths = taken(served)
        assert len(paths) > 30
        for path, methods in paths.items():
            for method in ASKED:
                if (path, method) == (STREAMS, "GET"):
                    continue
                answer = await client.request(method, path)
                refused = answer.status_code == 405
                assert refused == (method not in methods), (method, path, answer.status_code)
                allowed = ", ".join(sorted(methods)) if refused else None
                assert answer.headers.get("allow") == allowed, (method, path)
            assert ("HEAD" in methods) == ("GET" in methods), path


async def test_a_path_without_anything_is_404_for_every_method(served: Starlette) -> None:
    async with talking(served) as client:
        for path in ABSENT:
            for method in ASKED:
                answer = await client.request(method, path)
                assert answer.status_code == 404, (method, path, answer.text)
                assert "allow" not in answer.headers
                assert method == "HEAD" or f"there is nothing at {path}" in answer.text


async def test_a_preflight_allows_the_methods_that_some_path_takes(served: Starlette) -> None:
    asked = {"origin": PAGE, "access-control-request-method": "POST"}
    async with talking(served) as client:
        answer = await client.options("/v1/models", headers=asked)
        assert answer.status_code == 204
        assert answer.headers["access-control-allow-methods"] == METHODS
        methods = {method for each in taken(served).values() for method in each}
        assert set(METHODS.split(", ")) == methods - {"HEAD"}, "HEAD needs no preflight's leave"
