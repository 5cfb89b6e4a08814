"""Every API of the workers through the gateway, also when a worker dies in the middle of an answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from stretto.errors import EngineDied
from stretto.gateway.app import Gateway
from stretto.gateway.settings import GatewayConfig
from stretto.http import serving
from tests.gateway.cluster import cluster, fake, running
from tests.server.checkpoint import byte_level

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
FUNCTION = {"name": "add", "parameters": {"type": "object"}}
CALL = byte_level().encode('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>').ids
STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (
        "/v1/chat/completions",
        {"messages": HELLO, "stream": True, "tools": [{"type": "function", "function": FUNCTION}]},
    ),
    "responses": (
        "/v1/responses",
        {"input": "Hi", "stream": True, "tools": [{"type": "function"} | FUNCTION]},
    ),
    "messages": (
        "/v1/messages",
        {
            "model": "tiny",
            "messages": HELLO,
            "max_tokens": 99,
            "stream": True,
            "tools": [{"name": "add", "input_schema": {"type": "object"}}],
        },
    ),
    "ollama": (
        "/api/chat",
        {"model": "tiny:latest", "messages": HELLO, "tools": [{"type": "function", "function": FUNCTION}]},
    ),
    "generate": ("/api/generate", {"model": "tiny", "prompt": "Hi"}),
    "completions": ("/v1/completions", {"prompt": "Hi", "stream": True, "max_tokens": 99}),
}
CHANGING = {"stretto", "id", "item_id", "call_id", "created", "created_at", "usage"}
WHOLE: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/responses", {"input": "Hi"}, "response"),
    ("/v1/messages", {"model": "tiny", "messages": HELLO, "max_tokens": 9}, "message"),
    ("/v1/messages/count_tokens", {"model": "tiny", "messages": HELLO}, "input_tokens"),
    ("/api/chat", {"model": "tiny", "messages": HELLO, "stream": False}, "message"),
    ("/api/show", {"model": "tiny"}, "model_info"),
    ("/tokenize", {"prompt": "Hi there"}, "tokens"),
    ("/detokenize", {"tokens": [60, 61]}, "prompt"),
]
EMPTY_MESSAGES: dict[str, Any] = {"model": "tiny", "max_tokens": 1, "messages": []}


def steady(value: Any) -> Any:
    """What two streams of one request have in common."""
    if isinstance(value, dict):
        return {
            name: steady(each)
            for name, each in value.items()  # pyright: ignore
            if name not in CHANGING and not str(name).endswith("_duration")  # pyright: ignore
        }
    return [steady(each) for each in value] if isinstance(value, list) else value  # pyright: ignore


def events(answer: httpx.Response) -> list[Any]:
    assert answer.status_code == 200 and ":~" not in answer.text, answer.text
    lines = [line for line in answer.text.splitlines() if line and not line.startswith("event:")]
    return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]


@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream_of_any_api_survives_its_worker(checkpoint: Path, name: str):
    path, body = STREAMS[name]
    cut = len(CALL) // 2
    async with cluster(checkpoint, fake(*CALL)) as (client, _):
        undisturbed = events(await client.post(path, json=body))
    dying = fake(*CALL[:cut], 0.05, EngineDied("the engine ended"))
    async with cluster(checkpoint, dying, fake(*CALL), route="round-robin") as (client, gateway):
        # One of them begins on the worker that dies.
        answers = [events(await client.post(path, json=body)) for _ in range(2)]
        assert [steady(answer) for answer in answers] == [steady(undisturbed)] * 2
        assert gateway.relay.failovers + gateway.relay.retries == 1  # Ollama sends calls whole
    for answer in answers if name == "responses" else ():
        ids: dict[int, set[str]] = {}
        for event in answer:
            if "item" in event:
                ids.setdefault(event["output_index"], set()).add(event["item"]["call_id"])
        assert all(len(each) == 1 for each in ids.values()) and ids


async def test_whole_answers_and_pages_of_every_api_pass(checkpoint: Path):
    async with cluster(checkpoint, fake(60, 61)) as (client, _):
        for path, body, member in WHOLE:
            answer = await client.post(path, json=body)
            assert answer.status_code == 200, (path, answer.text)
            found = answer.json()
            assert member in (*found, found.get("object"), found.get("type")), (path, found)
        loaded = await client.post("/api/chat", json={"model": "tiny", "messages": []})
        assert loaded.json()["done_reason"] == "load"
        assert (await client.get("/version")).json()["version"]
        assert (await client.get("/api/version")).json()["version"]
        assert [each["name"] for each in (await client.get("/api/tags")).json()["models"]] == ["tiny"]
        assert (await client.get("/v1/models/tiny")).json()["id"] == "tiny"
        assert (await client.get("/v1/models/none")).status_code == 404


@pytest.mark.parametrize("name", STREAMS)
async def test_half_of_an_emoji_is_read_as_a_worker_reads_it(checkpoint: Path, name: str):
    path, body = STREAMS[name]
    half = json.dumps(body | {"tools": []}).replace('"Hi"', r'"Hi \ud83d"').replace(', "tools": []', "")
    headers = {"content-type": "application/json"}
    async with cluster(checkpoint, fake(60)) as (client, _):
        answer = await client.post(path, content=half, headers=headers)
    assert answer.status_code == 200, answer.text


async def test_a_body_that_cannot_be_read_is_refused_as_a_worker_refuses_it(checkpoint: Path):
    async with cluster(checkpoint, fake(60)) as (client, _):
        for content, status, param in (
            ("[]", 400, "$"),
            ('{"messages": ' + "[" * 4000 + "]" * 4000 + "}", 400, "$.messages"),
            ('{"messages": ' + "[" * 200_000 + "]" * 200_000 + "}", 413, None),
            ('{"messages": "\\', 400, None),
        ):
            answer = await client.post(
                "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
            )
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (status, param), error


async def test_errors_are_in_the_words_of_each_api(checkpoint: Path):
    async with cluster(checkpoint, fake(60)) as (client, _):
        wrong = await client.post("/v1/messages", json=EMPTY_MESSAGES)
        assert (wrong.status_code, wrong.json()["type"]) == (400, "error")
        unknown = await client.post("/api/chat", json={"model": "gpt-9", "messages": HELLO})
        assert unknown.status_code == 404 and isinstance(unknown.json()["error"], str)


async def test_a_worker_learns_what_of_a_prompt_it_is_believed_to_have_cached(checkpoint: Path):
    engine = fake(60)
    body = {"messages": [{"role": "user", "content": "A long story. " * 35}], "max_tokens": 4}
    async with cluster(checkpoint, engine) as (client, _):
        for _ in range(2):
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
    first, second = engine.requests
    assert (first.cached, first.prompt) == (0, second.prompt)
    assert 100 < second.cached < len(second.prompt)


async def test_a_kept_response_is_found_on_its_worker(checkpoint: Path):
    engines = fake(60, 61), fake(60, 61)
    async with cluster(checkpoint, *engines, worker={"response_store": 1 << 20}, route="round-robin") as (
        client,
        _,
    ):
        for _ in range(4):
            first = (await client.post("/v1/responses", json={"input": "Hi"})).json()
            follow = {"input": "And then?", "previous_response_id": first["id"]}
            answer = await client.post("/v1/responses", json=follow)
            assert answer.status_code == 200, answer.text
            assert (await client.get(f"/v1/responses/{first['id']}")).json() == first
            streamed = await client.get(f"/v1/responses/{first['id']}", params={"stream": "true"})
            assert (streamed.status_code, streamed.json()["error"]["param"]) == (400, "stream")
            assert (await client.delete(f"/v1/responses/{first['id']}")).json()["deleted"]
            gone = await client.get(f"/v1/responses/{first['id']}")
            assert (gone.status_code, gone.json()["error"]["code"]) == (404, "previous_response_not_found")
        lost = await client.post("/v1/responses", json={"input": "Hi", "previous_response_id": "resp_none"})
        assert lost.status_code == 404


async def test_a_reference_finds_the_worker_that_keeps_its_item(checkpoint: Path):
    engines = fake(60, 61), fake(60, 61)
    async with (
        cluster(checkpoint, *engines, worker={"response_store": 1 << 20}, route="round-robin") as (
            client,
            one,
        ),
        another(one) as second,
    ):
        answers: dict[str, dict[str, Any]] = {}
        for _ in range(4):
            answer = (await client.post("/v1/responses", json={"input": "Hi"})).json()
            answers[answer["id"][:13]] = answer  # by worker
            said = answer["output"][0]["id"]
            for item in ({"type": "item_reference", "id": said}, {"id": said}):
                body = {
                    "input": [{"role": "user", "content": "Hi"}, item, {"role": "user", "content": "And?"}]
                }
                for gateway in (client, second):
                    follow = await gateway.post("/v1/responses", json=body)
                    assert follow.status_code == 200, follow.text
                    assert follow.json()["id"][:13] == answer["id"][:13]
        assert len(answers) == 2
        here, there = answers.values()
        back = [{"type": "item_reference", "id": each["output"][0]["id"]} for each in (here, there)]
        parted = await client.post("/v1/responses", json={"input": back})
        assert parted.status_code == 404 and parted.json()["error"]["param"] == "$.input", parted.text
        body = {"input": [back[1]], "previous_response_id": here["id"]}
        assert (await client.post("/v1/responses", json=body)).json()["error"]["param"] == "$.input"
        lost = await client.post(
            "/v1/responses", json={"input": [{"type": "item_reference", "id": "msg_none"}]}
        )
        assert lost.status_code == 404 and lost.json()["error"]["param"] == "$.input[0].id"


@asynccontextmanager
async def another(gateway: Gateway) -> AsyncGenerator[httpx.AsyncClient]:
    """A client of a second gateway in front of the same workers."""
    second = Gateway(gateway.config, seed=1)
    async with (
        running(serving.run, second.config, second, second) as url,
        httpx.AsyncClient(base_url=url, timeout=20) as client,
    ):
        while not all(each.view.usable for each in second.registry.workers.values()):
            await asyncio.sleep(0.02)
        yield client


async def test_what_servers_of_another_kind_lack_is_refused_by_name():
    asked: list[str] = []

    async def plain(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope["path"])
        body, status = b'{"detail":"Not Found"}', 404
        if scope["path"] == "/v1/models":
            body, status = b'{"object":"list","data":[{"id":"other","created":1}]}', 200
        elif scope["path"] == "/v1/responses":
            body, status = b'{"object":"response"}', 200
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    server = uvicorn.Server(uvicorn.Config(plain, port=0, log_level="error", lifespan="off"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    gateway = Gateway(GatewayConfig(workers=(f"http://127.0.0.1:{port}",), port=0))
    async with (
        running(serving.run, gateway.config, gateway, gateway) as url,
        httpx.AsyncClient(base_url=url, timeout=20) as client,
    ):
        for _ in range(200):
            if (await client.get("/ready")).status_code == 200:
                break
            await asyncio.sleep(0.02)
        assert (await client.post("/v1/responses", json={"input": "Hi"})).json() == {"object": "response"}
        await client.post("/api/chat", json={"model": "other", "messages": HELLO})
        answer = await client.post("/api/chat", json={"model": "other", "messages": HELLO})
        assert answer.status_code == 501 and "/api/chat" in answer.json()["error"]
        assert asked.count("/api/chat") == 1
    server.should_exit = True
    await task
