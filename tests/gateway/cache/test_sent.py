"""Kept answers of Messages, Responses and Ollama's API: a hit has the shape of a worker's answer."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from stretto.gateway.cache import sent
from stretto.gateway.cache.policy import AskedText, CachePolicy, question_of
from stretto.gateway.cache.semantic import ErrorBound
from stretto.protocol.relay import OperationName
from stretto.types import Reason
from tests.gateway.cache.test_answers import settled
from tests.gateway.cluster import cluster, fake
from tests.server.fake_engine import FakeEngine, info

HELLO = [{"role": "user", "content": "Hi"}]
BODIES: dict[OperationName, tuple[str, dict[str, Any]]] = {
    "messages": ("/v1/messages", {"model": "tiny", "messages": HELLO, "max_tokens": 9, "temperature": 0}),
    "responses": ("/v1/responses", {"input": "Hi", "temperature": 0, "store": False}),
    "ollama_chat": ("/api/chat", {"model": "tiny", "messages": HELLO, "options": {"temperature": 0}}),
    "ollama_generate": ("/api/generate", {"model": "tiny", "prompt": "Hi", "options": {"seed": 1}}),
}
ON: dict[str, Any] = {"caches": {"*": CachePolicy()}}
NEW = {
    "created_at",
    "total_duration",
    "ttft_ms",
    "on_time",
    "queue_ms",
    "itl_p99_ms",
    "cached_tokens",
    "cached",
}


def objects(answer: httpx.Response) -> list[Any]:
    """The JSON objects of an answer in their order, with the names of its events."""
    assert answer.status_code == 200, answer.text
    if "event-stream" not in answer.headers["content-type"]:
        return [json.loads(line) for line in answer.text.splitlines() if line]
    found = re.findall(r"event: (.*)\ndata: (.*)\n\n", answer.text)
    assert answer.text == "".join(f"event: {name}\ndata: {data}\n\n" for name, data in found)
    return [{"event": name, "data": json.loads(data)} for name, data in found]


def bare(value: Any) -> Any:
    """A JSON value without what differs between two answers; of an id its kind and its length."""
    if isinstance(value, list):
        return [bare(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        name: (each.partition("_")[0], len(each)) if name in ("id", "item_id") else bare(each)
        for name, each in value.items()
        if name not in NEW
    }


def ids(answer: httpx.Response) -> set[str]:
    return set(re.findall(r'"(?:id|item_id)":"([^"]+)"', answer.text))


def report(answer: httpx.Response) -> dict[str, Any]:
    """The last report in an answer."""
    found = re.findall(r'"stretto":(\{[^}]*\})', answer.text)
    return json.loads(found[-1])


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("operation", BODIES)
async def test_a_hit_has_the_shape_of_a_workers_answer(
    checkpoint: Path, operation: OperationName, stream: bool
):
    path, body = BODIES[operation]
    engine = fake(65, 66, 67)
    async with cluster(checkpoint, engine, **ON) as (client, gateway):
        first = await client.post(path, json=body | {"stream": stream})
        await settled(gateway)
        hits = [await client.post(path, json=body | {"stream": stream}) for _ in range(2)]
        assert len(engine.requests) == 1
        for hit in hits:
            assert hit.headers["x-stretto-cached"] == report(hit)["cached"] == "exact"
            assert bare(objects(hit)) == bare(objects(first))
            names = ("content-type", "cache-control", "x-accel-buffering")
            assert [hit.headers.get(name) for name in names] == [first.headers.get(name) for name in names]
            if operation == "messages":
                assert hit.headers["request-id"] == hit.headers["x-request-id"]
                assert ids(hit) == {f"msg_{hit.headers['request-id']}"}
        if operation in ("messages", "responses"):
            assert not ids(first) & ids(hits[0]) and not ids(hits[0]) & ids(hits[1])
        other = await client.post(path, json=body | {"stream": not stream})
        assert "x-stretto-cached" not in other.headers and len(engine.requests) == 2
        again = gateway.answers.stats.report()
        assert (again.exact_hits, again.kept) == (2, 2)


async def test_ollamas_answers_are_streams_unless_they_are_told_not_to(checkpoint: Path):
    path, body = BODIES["ollama_chat"]
    engine = fake(65)
    async with cluster(checkpoint, engine, **ON) as (client, gateway):
        await client.post(path, json=body)
        await settled(gateway)
        assert "x-stretto-cached" in (await client.post(path, json=body | {"stream": True})).headers
        assert "x-stretto-cached" not in (await client.post(path, json=body | {"stream": False})).headers


@pytest.mark.parametrize(
    ("operation", "change"),
    [
        ("messages", {"temperature": 1}),
        ("messages", {"system": "Be brief."}),
        ("messages", {"metadata": {"user_id": "eve"}}),
        ("responses", {"temperature": 1}),
        ("responses", {"instructions": "Be brief."}),
        ("ollama_chat", {"options": {"temperature": 0, "num_predict": 5}}),
        ("ollama_generate", {"system": "Be brief."}),
    ],
)
async def test_what_shapes_an_answer_is_not_served_another_one(
    checkpoint: Path, operation: OperationName, change: dict[str, Any]
):
    path, body = BODIES[operation]
    async with cluster(checkpoint, fake(65), **ON) as (client, gateway):
        for each in (body, body | change):
            answer = await client.post(path, json=each | {"stream": False})
            assert answer.status_code == 200 and "x-stretto-cached" not in answer.headers
            await settled(gateway)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("operation", BODIES)
async def test_an_answer_that_was_cut_or_failed_is_not_kept(
    checkpoint: Path, operation: OperationName, stream: bool
):
    path, body = BODIES[operation]
    for reason in (Reason.DEADLINE, Reason.ERROR):
        engine = FakeEngine(lambda request, end=reason: [65, end], {"tiny": info(vocab=600)})
        async with cluster(checkpoint, engine, **ON) as (client, gateway):
            for _ in range(2):
                answer = await client.post(path, json=body | {"stream": stream})
                assert "x-stretto-cached" not in answer.headers
                await settled(gateway)
            assert gateway.answers.stats.report().kept == 0 and len(engine.requests) == 2


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("operation", "limit"),
    [
        ("messages", {"max_tokens": 2}),
        ("responses", {"max_output_tokens": 2}),
        ("ollama_chat", {"options": {"temperature": 0, "num_predict": 2}}),
        ("ollama_generate", {"options": {"temperature": 0, "num_predict": 2}}),
    ],
)
async def test_an_answer_as_long_as_its_request_allows_is_whole(
    checkpoint: Path, operation: OperationName, limit: dict[str, Any], stream: bool
):
    path, body = BODIES[operation]
    async with cluster(checkpoint, fake(65, 66, 67), **ON) as (client, gateway):
        await client.post(path, json=body | limit | {"stream": stream})
        await settled(gateway)
        hit = await client.post(path, json=body | limit | {"stream": stream})
        assert hit.headers.get("x-stretto-cached") == "exact"


async def test_a_response_that_a_worker_keeps_passes_the_cache_by(checkpoint: Path):
    path, body = BODIES["responses"]
    engine = fake(65)
    async with cluster(checkpoint, engine, worker={"response_store": 1 << 20}, **ON) as (client, gateway):
        for stored in ({"store": True}, {"store": None}):
            for _ in range(2):
                answer = await client.post(path, json=body | stored)
                assert "x-stretto-cached" not in answer.headers
                await settled(gateway)
            id = answer.json()["id"]
            assert (await client.get(f"{path}/{id}")).status_code == 200
        for _ in range(2):
            follow = await client.post(path, json=body | {"previous_response_id": id})
            assert follow.status_code == 200 and "x-stretto-cached" not in follow.headers
        assert gateway.answers.stats.report().kept == 0


async def test_metadata_is_repeated_from_the_request_that_is_answered(checkpoint: Path):
    path, body = BODIES["responses"]
    async with cluster(checkpoint, fake(65), **ON) as (client, gateway):
        await client.post(path, json=body | {"metadata": {"a": "1"}})
        await settled(gateway)
        hit = await client.post(path, json=body | {"metadata": {"b": "2"}})
        assert hit.headers["x-stretto-cached"] == "exact" and hit.json()["metadata"] == {"b": "2"}


async def test_equal_requests_share_an_answer_in_flight_and_erasure_reaches_it(checkpoint: Path):
    gate = asyncio.Event()
    engine = FakeEngine(lambda request: [65, 1.0, 66], {"tiny": info(vocab=600)})
    engine.pause = lambda seconds: gate.wait()
    path, body = BODIES["messages"]
    body = body | {"metadata": {"user_id": "eve"}}
    async with cluster(checkpoint, engine, **ON) as (client, gateway):
        asked = [asyncio.create_task(client.post(path, json=body)) for _ in range(2)]
        async with asyncio.timeout(20):
            while gateway.answers.stats.report().joined < 1:
                await asyncio.sleep(0.01)
        gate.set()
        assert len({(await each).text for each in asked}) == 1 == len(engine.requests)
        await settled(gateway)
        assert (await client.delete("/v1/cache?subject=eve")).json()["answers"] == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("operation", BODIES)
async def test_the_same_question_in_other_words_gets_the_kept_answer(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, operation: OperationName, stream: bool
):
    """The bound on errors is taken to hold."""
    monkeypatch.setattr(ErrorBound, "bound", 0.0)
    monkeypatch.setattr("stretto.gateway.cache.semantic.VERIFY_SHARE", 0.0)
    path, body = BODIES[operation]
    field = {"responses": "input", "ollama_generate": "prompt"}.get(operation, "messages")

    def asking(text: str) -> dict[str, Any]:
        asked = [{"role": "user", "content": text}] if field == "messages" else text
        return body | {field: asked, "stream": stream}

    engine = fake(65, 66)
    async with cluster(checkpoint, engine, caches={"*": CachePolicy(semantic=True)}) as (client, gateway):
        first = await client.post(path, json=asking("What is the price of the lamp?"))
        await settled(gateway)
        near = await client.post(path, json=asking("Please tell me the price of the lamp"))
        assert near.headers.get("x-stretto-cached") == report(near)["cached"] == "semantic"
        assert bare(objects(near)) == bare(objects(first))
        far = await client.post(path, json=asking("Please tell me the price of the chair"))
        assert "x-stretto-cached" not in far.headers and len(engine.requests) == 2


def test_questions_of_other_shapes_are_none():
    assert question_of("responses", {"input": "Hi"}) == AskedText("Hi", {"input": ""})
    listed = [{"role": "assistant", "content": "x"}, {"role": "user", "content": "Hi"}]
    assert question_of("responses", {"input": listed}) is not None
    assert question_of("ollama_generate", {"prompt": "Hi"}) is not None
    for operation, body in (
        ("completions", {"prompt": "Hi"}),
        ("ollama_generate", {"prompt": ["Hi"]}),
        ("ollama_chat", {"messages": [{"role": "user", "content": "Hi", "images": ["x"]}]}),
        ("responses", {"input": [{"type": "function_call_output", "output": "x"}]}),
        ("messages", {"messages": "Hi"}),
    ):
        assert question_of(operation, body) is None, body  # type: ignore[arg-type]


def test_what_is_no_answer_is_not_read():
    for kind, body in (
        ("application/json", b"{}"),
        ("application/json", b"[1]"),
        ("text/event-stream", b"data: {}\n\n"),
        ("text/event-stream", b'event: message_stop\ndata: {"type":"message_stop"}\n\n'),
        ("application/x-ndjson", b'{"done":false}\n'),
        ("text/html", b"<p>"),
        ("application/json", b""),
    ):
        for operation in BODIES:
            assert sent.read(operation, 200, sent.SentBody({"content-type": kind}, body, 9)) is None
    assert sent.load(b"") is None and sent.load(b"\x94\xa8messages\xa1x\x90\x90") is None
