"""What a worker does for a gateway: relayed requests, marks, and answers that another worker began."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import httpx
import msgspec
import pytest

from stretto.config import EngineConfig, ModelConfig, ServeConfig
from stretto.engine.client import EngineClient
from stretto.gateway.upstream.progress import Progress
from stretto.protocol.relay import MARK, RELAY, TOOK_MARK, Mark, error_mark, mark, read_mark
from stretto.server.app import App
from tests.server.fake_engine import FakeEngine, build

DESK = Path(__file__).parents[2] / "src" / "stretto" / "desk"
ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is 17 + 25? Then count to ten."}],
    "stream": True,
    "max_tokens": 24,
    "temperature": 1.0,
    "seed": 7,
    "ignore_eos": True,
}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "n": {"type": "integer"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


@pytest.fixture
async def desk() -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server over a real engine with the bundled model."""
    config = EngineConfig(
        models=(ModelConfig(name="desk", path=str(DESK), dtype="float32"),), kv_bytes=64 << 20
    )
    engine = EngineClient(config)
    await engine.start()
    await engine.wait_ready()
    app = build(ServeConfig(port=0, schedule="deadline"), engine, {"desk": DESK})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        yield client
    await engine.shutdown(1.0)


async def relayed(
    client: httpx.AsyncClient, request: dict[str, Any], continuation: dict[str, Any] | None = None
) -> tuple[list[dict[str, Any]], list[Mark]]:
    """The chunks and the marks of a relayed stream."""
    body = {"operation": "chat", "tenant": "ann", "request": request, "age_ms": 1.0}
    answer = await client.post(RELAY, json=body | {"continuation": continuation})
    assert answer.status_code == 200, answer.text
    events = answer.content.split(b"\n\n")[:-1]
    marks = [read_mark(each) for each in events if each.startswith(MARK) and not each.startswith(TOOK_MARK)]
    texts = [event.removeprefix(b"data: ") for event in events if not event.startswith(MARK)]
    assert texts.pop() == b"[DONE]"
    return [json.loads(text) for text in texts], marks


def parts(chunks: list[dict[str, Any]], index: int = 0, *, near: bool = False) -> list[Any]:
    """All that a client sees of one answer. `near`: a log probability equals others within 0.05, because it
    depends a little on how much of the prompt was in the prefix cache."""
    return [
        (choice["delta"], logprobs(choice.get("logprobs"), near), choice["finish_reason"])
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index
    ]


def logprobs(given: dict[str, Any] | None, near: bool) -> list[tuple[str, Any]]:
    content = (given or {"content": []})["content"]
    return [
        (each["token"], pytest.approx(each["logprob"], abs=0.05) if near else each["logprob"])  # pyright: ignore
        for each in content
    ]


def test_a_mark_is_read_as_it_was_written():
    cases = (Mark(0, [1, 22]), Mark(3, [], True), Mark(1, [5], True, True), Mark(1, [], True, late=True))
    for written in cases:
        line = mark(
            written.answer,
            written.tokens,
            complete=written.complete,
            last=written.last,
            late=written.late,
        )
        assert read_mark(line) == written
    assert read_mark(error_mark("draining")) == Mark(0, [], last=True, error="draining")


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "log probabilities": {"logprobs": True, "top_logprobs": 2},
    "several answers": {"n": 3},
    "penalties": {"frequency_penalty": 1.5, "repetition_penalty": 1.3},
    "stop string": {"stop": ["7 "], "ignore_eos": False},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    "usage": {"stream_options": {"include_usage": True}},
}


async def test_an_answer_goes_on_after_any_mark_as_if_it_had_not_been_cut(desk: httpx.AsyncClient):
    for name, extra in CASES.items():
        request = ASK | extra
        whole, marks = await relayed(desk, request)
        for cut in sorted({0, min(1, len(marks) - 1), len(marks) // 2, len(marks) - 1}):
            answers = [(list[int](), [False]) for _ in range(request.get("n", 1))]
            for seen in marks[:cut]:
                answers[seen.answer][0].extend(seen.tokens)
                answers[seen.answer][1][0] |= seen.complete
            emitted = [[tokens, complete] for tokens, (complete,) in answers]
            rest, more = await relayed(desk, request, {"id": "chatcmpl-1", "created": 5, "answers": emitted})
            assert {(chunk["id"], chunk["created"]) for chunk in rest} == {("chatcmpl-1", 5)}
            for index, (tokens, _) in enumerate(answers):
                before, after = parts(whole, index, near=True), parts(rest, index)
                assert after == before[len(before) - len(after) :], (name, cut, index)
                total, left = (
                    sum(len(made.tokens) for made in some if made.answer == index) for some in (marks, more)
                )
                assert len(tokens) + left == total, (name, cut, index)
            assert more[-1].last
            assert usage(rest) == usage(whole)


CHAT = {"messages": [{"role": "user", "content": "Where is my order?"}]}
OTHER_APIS: list[tuple[str, dict[str, Any]]] = [
    ("responses", {"input": "Where is my order?", "stream": True, "max_output_tokens": 20, "seed": 3}),
    ("messages", CHAT | {"model": "desk", "max_tokens": 20, "stream": True, "temperature": 0}),
    ("ollama_chat", CHAT | {"model": "desk", "options": {"num_predict": 20, "seed": 3}}),
    (
        "ollama_generate",
        {"model": "desk:latest", "prompt": "Where is it?", "options": {"num_predict": 20, "seed": 3}},
    ),
]
CHANGING = {"stretto", "usage", "created_at", "total_duration", "prompt_eval_duration", "eval_duration"}


def seen_by_client(body: bytes) -> list[Any]:
    """The events of a stream of any API, without marks, times and what counts cached tokens."""
    lines = [line for line in body.split(b"\n") if line and not line.startswith((MARK, b"event:"))]
    return [steady(json.loads(line.removeprefix(b"data: "))) for line in lines]


def steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: steady(each) for name, each in value.items() if name not in CHANGING}  # pyright: ignore
    return [steady(each) for each in value] if isinstance(value, list) else value  # pyright: ignore


async def test_streams_of_every_api_go_on_on_another_worker(desk: httpx.AsyncClient):
    for operation, request in OTHER_APIS:
        body = {"operation": operation, "tenant": "ann", "request": request, "nonce": "n1"}
        whole = await desk.post(RELAY, json=body, headers={"x-request-id": "r1"})
        assert whole.status_code == 200, whole.text
        progress, cuts = Progress(lambda: 0.0), list[tuple[bytes, Any]]()
        for at, line in enumerate(whole.content.splitlines(keepends=True)):
            if line.startswith(MARK):
                passed = progress.push(b"".join(whole.content.splitlines(keepends=True)[: at + 2]))
                cuts.append((passed, progress.continuation(0.0)))
                progress = Progress(lambda: 0.0)
        for passed, continuation in (cuts[0], cuts[len(cuts) // 2]):
            if continuation is None or passed == cuts[-1][0]:
                continue  # the client has nothing, or all
            left = body | {"continuation": json.loads(msgspec.json.encode(continuation))}
            rest = await desk.post(RELAY, json=left, headers={"x-request-id": "r1"})
            assert seen_by_client(passed + rest.content) == seen_by_client(whole.content), operation


async def test_a_late_token_of_the_first_worker_makes_the_whole_answer_late(desk: httpx.AsyncClient):
    request = ASK | {"objective": {"itl_ms": 60_000.0}}
    for late, when in ((True, 5.0), (False, 5.0), (False, 200_000.0)):
        emitted = [[1, 2], False, late, 1.0, when]
        body: dict[str, Any] = {"operation": "chat", "tenant": "ann", "request": request}
        # With 200 s since the first token, the third one is due after 120 s: the pause counts too.
        age = {"age_ms": when, "continuation": {"id": "c", "created": 1, "answers": [emitted]}}
        answer = await desk.post(RELAY, json=body | age)
        (report,) = [event["stretto"] for event in seen(answer.content) if event.get("stretto")]
        assert report["on_time"] is (not late and when < 1000), (late, when)
        assert report["ttft_ms"] == pytest.approx(1.0)
        assert when < 1000 or report["itl_p99_ms"] >= 0


def seen(body: bytes) -> list[dict[str, Any]]:
    lines = [line.removeprefix(b"data: ") for line in body.splitlines() if line.startswith(b"data: {")]
    return [json.loads(line) for line in lines]


async def test_errors_are_written_as_the_api_of_the_operation_has_them(desk: httpx.AsyncClient):
    for operation, kind in (("messages", "error"), ("chat", None)):
        body = {"operation": operation, "tenant": "ann", "request": {"model": "desk", "messages": 3}}
        answer = await desk.post(RELAY, json=body)
        assert (answer.status_code, answer.json().get("type")) == (400, kind)
        assert answer.headers["x-stretto-error"] == "invalid_value"


def usage(chunks: list[dict[str, Any]]) -> list[int]:
    return [chunk["usage"]["completion_tokens"] for chunk in chunks if not chunk["choices"]]


async def test_an_answer_at_its_limit_ends_at_once(desk: httpx.AsyncClient):
    whole, marks = await relayed(desk, ASK)
    tokens = [token for seen in marks for token in seen.tokens]
    emitted = {"id": "c", "created": 1, "answers": [[tokens, False]]}
    rest, _ = await relayed(desk, ASK, emitted)
    assert len(tokens) == ASK["max_tokens"]
    assert [(delta, reason) for delta, _, reason in parts(rest)] == [({}, "length")]
    assert parts(whole)[-1][2] == "length"


async def test_only_a_gateway_may_relay(engine: FakeEngine, checkpoint: Path):
    body = {"operation": "chat", "tenant": "ann", "request": ASK}
    cases: list[tuple[ServeConfig, str | None, int]] = [
        (ServeConfig(), None, 200),
        (ServeConfig(gateway_key="g"), None, 401),
        (ServeConfig(gateway_key="g"), "g", 200),
        (ServeConfig(gateway_key="g"), "x", 401),
        (ServeConfig(api_keys={"k": "ann"}), "k", 401),
        (ServeConfig(api_keys={"k": "ann"}, gateway_key="g"), "k", 401),
        (ServeConfig(api_keys={"k": "ann"}, gateway_key="g"), "g", 200),
    ]
    for config, key, status in cases:
        app: App = build(config, cast(EngineClient, engine), {"tiny": checkpoint})
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost"
        ) as client:
            answer = await client.post(RELAY, json=body, headers=headers)
        assert answer.status_code == status, (config, key, answer.text)
    assert engine.requests[-1].tenant == "ann"


async def test_the_name_of_a_relayed_tenant_has_a_limit(client: httpx.AsyncClient):
    """The server remembers tenants, and without keys anybody may relay."""
    body = {"operation": "chat", "tenant": "a" * 257, "request": ASK}
    answer = await client.post(RELAY, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "$.tenant")


async def test_a_gateway_drops_the_cached_prompts_of_a_subject(desk: httpx.AsyncClient):
    words = " ".join(["Please read this long text again."] * 12)

    async def cached_tokens(user: str) -> int:
        asked = {"messages": [{"role": "user", "content": words}], "max_tokens": 2, "user": user}
        body = {"operation": "chat", "tenant": "ann", "request": asked}
        answer = (await desk.post(RELAY, json=body)).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    async def erase(**body: Any) -> dict[str, int]:
        answer = await desk.request("DELETE", RELAY, json={"tenant": "ann"} | body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    assert [await cached_tokens(user) for user in ("u1", "u2")] == [0, 0]
    assert await cached_tokens("u1") > 32
    assert await erase(subject="u3") == {"blocks": 0, "held": 0}
    erased = await erase(subject="u1")
    assert erased["blocks"] > 2 and erased["held"] == 0
    assert await cached_tokens("u1") == 0 and await cached_tokens("u2") > 32
    assert (await erase())["blocks"] > 4
    assert await cached_tokens("u2") == 0
    wrong = await desk.request("DELETE", RELAY, json={"tenant": 1})
    assert wrong.status_code == 400
