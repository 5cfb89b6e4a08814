"""Requests that real clients sent, replayed: `python -m benchmarks.clients --record` writes them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from stretto.gateway.app import Gateway
from stretto.gateway.settings import GatewayConfig
from stretto.http import serving
from tests.gateway.cluster import running
from tests.server.recorded.shapes import Recorded, check

FILES = sorted((Path(__file__).parent / "bodies").glob("*.json"))
CLIENTS = {path.stem: path for path in FILES}
# Pages of a worker whose content is checked elsewhere. A gateway has its own.
PAGES = {"/health", "/ready", "/metrics", "/version"}
AT_ONCE, TRIES = 4, 5
UNKNOWN = "there is no model"
# A request that is refused, by client and path: its status, and what the answer says.
REFUSED: dict[tuple[str, str], tuple[int, str]] = {
    # lm-eval asks for the chat template of a vLLM that is told to show it, and goes on without.
    ("lm-eval", "/tokenizer_info"): (404, "/tokenizer_info"),
}


def recorded(path: Path) -> list[Recorded]:
    read = json.loads(path.read_text())
    return [Recorded(client=read["client"], **{"body": {}} | each) for each in read["requests"]]


async def replay(client: httpx.AsyncClient, requests: Sequence[Recorded]) -> None:
    """Sends the requests, some at once, and checks each answer."""
    places = asyncio.Semaphore(AT_ONCE)
    answers = await asyncio.gather(*(send(client, each, places) for each in requests))
    for request, answer in zip(requests, answers, strict=True):
        try:
            judge(request, answer)
        except Exception as error:
            body = json.dumps(request.body, ensure_ascii=False)
            error.add_note(f"{request.client}: {request.method} {request.path} {body[:1000]}")
            error.add_note(f"{answer.status_code}: {answer.text[:1000]}")
            raise


async def send(client: httpx.AsyncClient, request: Recorded, places: asyncio.Semaphore) -> httpx.Response:
    """Sends a request again while the server has too much to do, as the clients do."""
    made = client.build_request(
        request.method,
        request.path,
        headers=request.headers,
        content=json.dumps(request.body) if request.body else None,
    )
    async with places:
        answer = await client.send(made)
        for _ in range(TRIES):
            if answer.status_code not in (503, 529):
                break
            await asyncio.sleep(float(answer.headers["retry-after"]))
            answer = await client.send(made)
        return answer


def judge(request: Recorded, answer: httpx.Response) -> None:
    status, says = REFUSED.get((request.client, request.path), (200, ""))
    if request.body.get("model") == "no-such-model":
        status, says = 404, UNKNOWN
    assert answer.status_code == request.status == status
    if status != 200:
        assert says in answer.text
    elif request.path not in PAGES:
        check(request, answer.headers["content-type"], answer.text)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIENTS)
async def test_what_a_client_sent_is_answered_in_its_words(desk_url: str, name: str):
    requests = recorded(CLIENTS[name])
    assert requests
    async with httpx.AsyncClient(base_url=desk_url, timeout=100) as client:
        await replay(client, requests)


@pytest.mark.slow
async def test_a_gateway_answers_each_kind_of_request(desk_url: str):
    """One request of each path, in one piece and as a stream, of each kind of client."""
    kinds = {
        (each.method, each.path, each.streamed, each.headers.get("user-agent")): each
        for path in FILES
        for each in recorded(path)
        if each.path not in PAGES and each.status == 200
    }
    gateway = Gateway(GatewayConfig(workers=(desk_url,), port=0, drain_s=0.3), seed=0)
    async with (
        running(serving.run, gateway.config, gateway, gateway) as url,
        httpx.AsyncClient(base_url=url, timeout=100) as client,
    ):
        for _ in range(500):
            if (await client.get("/ready")).status_code == 200:
                break
            await asyncio.sleep(0.02)
        await replay(client, [*kinds.values()])


def test_the_recordings_hold_no_secret_and_are_small():
    assert len(FILES) >= 22
    assert sum(path.stat().st_size for path in FILES) < 1_000_000
    for path in FILES:
        text = path.read_text().lower()
        assert not any(
            word in text for word in ("authorization", "api-key", "bearer", "sk-", "/tmp/", "/root/")
        )
