"""Invalid requests: each gets an error with the path of its field and leaves no work behind."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from stretto.config import ServeConfig
from stretto.errors import EngineDied, InvalidGrammar, Overloaded
from stretto.server.admission_gate import AdmissionGate
from stretto.server.app import App
from stretto.text.tokenizer import TextModel
from stretto.types import Grammar, Reason, Request
from tests.server.checkpoint import byte_level, write
from tests.server.conftest import CHAT, HELLO
from tests.server.fake_engine import FakeEngine, Item, build, info

TEXT = "/v1/completions"
EMBED = "/v1/embeddings"
USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[1]"}}


async def refused(client: httpx.AsyncClient, path: str, body: Any) -> tuple[int, str, str | None]:
    response = await client.post(path, json=body)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return response.status_code, error["code"], error["param"]


CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"frobnicate": 1}, "unsupported_field", "$.frobnicate"),
    (
        {"messages": [USER, {"role": "user", "content": [IMAGE]}]},
        "unsupported_field",
        "$.messages[1].content[0].type",
    ),
    ({"messages": [{"role": "oracle", "content": ""}]}, "unsupported_field", "$.messages[0].role"),
    ({"messages": [{"role": "user"}]}, "invalid_value", "$.messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "invalid_value", "$.messages[0].content"),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]},
        "invalid_value",
        "$.messages[1].tool_calls[0].function.arguments",
    ),
    ({"messages": []}, "invalid_value", "$.messages"),
    ({"messages": None}, "invalid_value", "$.messages"),
    ({"max_tokens": 0}, "invalid_value", "$.max_tokens"),
    ({"max_tokens": -5}, "invalid_value", "$.max_tokens"),
    ({"max_tokens": "5"}, "invalid_value", "$.max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "invalid_value", "$.max_completion_tokens"),
    ({"max_tokens": 5, "min_tokens": 6}, "invalid_value", "$.min_tokens"),
    ({"max_tokens": 600}, "context_length_exceeded", "$.max_tokens"),
    ({"temperature": -1}, "invalid_value", "$.temperature"),
    ({"temperature": True}, "invalid_value", "$.temperature"),
    ({"top_p": 0}, "invalid_value", "$.top_p"),
    ({"presence_penalty": 3}, "invalid_value", "$.presence_penalty"),
    ({"n": 0}, "invalid_value", "$.n"),
    ({"n": 17}, "invalid_value", "$.n"),
    ({"n": 10**30}, "invalid_value", "$.n"),
    ({"seed": 2**64}, "invalid_value", "$.seed"),
    ({"stop": ""}, "invalid_value", "$.stop"),
    ({"stop": ["a", ""]}, "invalid_value", "$.stop[1]"),
    ({"stop": ["a"] * 17}, "invalid_value", "$.stop"),
    ({"stop_token_ids": [10**6]}, "invalid_value", "$.stop_token_ids[0]"),
    ({"logit_bias": {"1": 101}}, "invalid_value", "$.logit_bias[...]"),
    ({"logit_bias": {"999999": 1}}, "invalid_value", "$.logit_bias"),
    ({"logit_bias": {"-1": 1}}, "invalid_value", "$.logit_bias"),
    ({"logit_bias": {"x": 1}}, "invalid_value", "$.logit_bias"),
    ({"top_logprobs": 2}, "invalid_value", "$.top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "$.top_logprobs"),
    ({"service_tier": "scale"}, "unsupported_field", "$.service_tier"),
    ({"objective": {"ttft_ms": 0}}, "invalid_value", "$.objective.ttft_ms"),
    ({"objective": {"ttft_ms": -1}}, "invalid_value", "$.objective.ttft_ms"),
    ({"objective": {"ttft_ms": 1e308}}, "invalid_value", "$.objective.ttft_ms"),
    ({"objective": {"ttft_ms": "soon"}}, "invalid_value", "$.objective.ttft_ms"),
    ({"objective": {"itl_ms": 9, "total_ms": 8}, "stream": True}, "invalid_value", "$.objective.total_ms"),
    ({"objective": {"total_ms": 86_400_001}}, "invalid_value", "$.objective.total_ms"),
    ({"objective": {"ttft_ms": 9, "total_ms": 8}}, "invalid_value", "$.objective.total_ms"),
    ({"objective": {"itl_ms": 9}}, "invalid_value", "$.objective.itl_ms"),
    ({"objective": {"min_quality": 0.9}}, "unsupported_field", "$.objective.min_quality"),
    ({"objective": {"on_miss": "cry"}}, "unsupported_field", "$.objective.on_miss"),
    ({"objective": {"speed": 1}}, "unsupported_field", "$.objective.speed"),
    ({"metadata": {"a": 1}}, "invalid_value", "$.metadata[...]"),
    ({"metadata": {"a": "x" * 513}}, "invalid_value", "$.metadata[...]"),
    ({"metadata": {str(at): "" for at in range(17)}}, "invalid_value", "$.metadata"),
    ({"store": True}, "unsupported_field", "$.store"),
    ({"modalities": ["audio"]}, "unsupported_field", "$.modalities[0]"),
    ({"functions": [{"name": "f"}]}, "unsupported_field", "$.functions"),
    ({"prediction": {"type": "content", "content": ""}}, "unsupported_field", "$.prediction"),
    ({"response_format": {"type": "xml"}}, "unsupported_field", "$.response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "invalid_value", "$.response_format.json_schema"),
    ({"structured_outputs": {}}, "invalid_value", "$.structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "invalid_value", "$.structured_outputs"),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "invalid_value",
        "$.structured_outputs",
    ),
    ({"tool_choice": "required"}, "invalid_value", "$.tool_choice"),
    ({"tools": [TOOL], "tool_choice": "some"}, "unsupported_field", "$.tool_choice"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "invalid_value",
        "$.tool_choice.function.name",
    ),
    (
        {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}},
        "invalid_value",
        "$.tool_choice",
    ),
    ({"tools": [{"type": "retrieval"}]}, "unsupported_field", "$.tools[0].type"),
    (
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "invalid_value",
        "$.tools[0].function.name",
    ),
    ({"chat_template_kwargs": {"colour": 1}}, "unsupported_field", "$.chat_template_kwargs.colour"),
    ({"reasoning_effort": "maximum"}, "unsupported_field", "$.reasoning_effort"),
    ({"model": "gpt-7"}, "model_not_found", "$.model"),
    ({"model": 7}, "invalid_value", "$.model"),
]


@pytest.mark.parametrize(("body", "code", "param"), CHATS)
async def test_invalid_chat_fields_are_refused_with_their_path(
    client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], code: str, param: str
) -> None:
    status = 404 if code == "model_not_found" else 400
    assert await refused(client, CHAT, HELLO | body) == (status, code, param)
    assert not engine.requests


OTHERS: list[tuple[str, dict[str, Any], str, str]] = [
    (TEXT, {}, "invalid_value", "$.prompt"),
    (TEXT, {"prompt": ""}, "invalid_value", "$.prompt"),
    (TEXT, {"prompt": []}, "invalid_value", "$.prompt"),
    (TEXT, {"prompt": [[]]}, "invalid_value", "$.prompt"),
    (TEXT, {"prompt": [1, "a"]}, "invalid_value", "$.prompt"),
    (TEXT, {"prompt": ["a", [1]]}, "invalid_value", "$.prompt"),
    (TEXT, {"prompt": [-1]}, "invalid_value", "$.prompt[0]"),
    (TEXT, {"prompt": [10**6]}, "invalid_value", "$.prompt"),
    (TEXT, {"prompt": ["a"] * 33}, "invalid_value", "$.prompt"),
    (TEXT, {"prompt": "a", "best_of": 2}, "unsupported_field", "$.best_of"),
    (TEXT, {"prompt": "a", "suffix": "b"}, "unsupported_field", "$.suffix"),
    (TEXT, {"prompt": "a", "messages": []}, "unsupported_field", "$.messages"),
    (TEXT, {"prompt": "The fox " * 400}, "context_length_exceeded", "$.prompt"),
    (EMBED, {"input": ""}, "invalid_value", "$.input"),
    (EMBED, {"input": "a", "dimensions": 0}, "invalid_value", "$.dimensions"),
    (EMBED, {"input": "a", "encoding_format": "hex"}, "unsupported_field", "$.encoding_format"),
    (EMBED, {"input": "The fox " * 400}, "context_length_exceeded", "$.input"),
]


@pytest.mark.parametrize(("path", "body", "code", "param"), OTHERS)
async def test_invalid_completion_and_embedding_fields_are_refused_with_their_path(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any], code: str, param: str
) -> None:
    assert await refused(client, path, body) == (400, code, param)
    assert not engine.requests


async def test_a_chat_longer_than_the_context_is_refused_not_truncated(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for words in (400, 4000):
        body = {"messages": [{"role": "user", "content": "The fox " * words}]}
        assert await refused(client, CHAT, body) == (400, "context_length_exceeded", "$.messages")
        # litellm tells such a refusal by these words.
        message = (await client.post(CHAT, json=body)).json()["error"]["message"]
        assert "this model's maximum context length is 512 tokens" in message
    assert not engine.requests


async def test_a_token_of_the_template_that_the_model_lacks_is_refused(
    checkpoint: Path, text: TextModel
) -> None:
    """Four tokens were added to the tokenizer, and the model has no embeddings for them."""
    engine = FakeEngine(lambda request: [65], {"tiny": info(vocab=text.tokenizer.get_vocab_size() - 4)})
    quick = {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}}  # has <think>
    app = build(ServeConfig(), engine, {"tiny": checkpoint})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        assert await refused(client, CHAT, quick) == (400, "invalid_value", "$.messages")
        assert not engine.requests
        assert (await client.post(CHAT, json={"messages": [USER], "max_tokens": 1})).status_code == 200


BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"',
    b'{"messages": [}',
    b"\xff\xfe",
    b'{"messages":[{"role":"user","content":"\xff"}]}',
    b'{"a":"\\ud800"}',
    b"[" * 100_000,
    b'{"chat_template_kwargs":{"a":' + b"[" * 50_000,
]


@pytest.mark.parametrize("body", BODIES)
async def test_bodies_that_are_not_json_are_refused(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_wrong_content_types_and_oversized_bodies_are_refused(
    app: App, client: httpx.AsyncClient
) -> None:
    body = json.dumps(HELLO).encode()
    response = await client.post(CHAT, content=body, headers={"content-type": "text/plain"})
    assert (response.status_code, "application/json" in response.json()["error"]["message"]) == (415, True)
    for kind in ("application/json; charset=utf-8", "application/vnd.api+json", "Application/JSON"):
        response = await client.post(CHAT, content=body, headers={"content-type": kind})
        assert response.status_code == 200

    declared = {"content-type": "application/json"}
    many = b'{"chat_template_kwargs":{"a":[' + b"[]," * 100_001
    response = await client.post(CHAT, content=many, headers=declared)
    assert response.status_code == 413

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(10_000):
            yield b" " * 65536

    response = await client.post(CHAT, content=endless(), headers=declared)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    headers = declared | {"content-length": str(app.server.config.max_body_bytes + 1)}
    response = await client.post(CHAT, content=b"", headers=headers)
    assert response.status_code == 413


async def test_unknown_paths_and_methods_get_404_and_405(client: httpx.AsyncClient) -> None:
    for method, path, status, code in (
        ("GET", "/v2", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("GET", "/page/../app.py", 404, "not_found"),
        ("GET", "/page/nothing", 404, "not_found"),
        ("GET", "/v1/models/gpt-7", 404, "model_not_found"),
    ):
        response = await client.request(method, path)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert status != 405 or response.headers["allow"]


async def test_a_wrong_method_is_told_all_methods_of_the_path(client: httpx.AsyncClient) -> None:
    for path, allowed in (("/v1/responses/resp_1", "DELETE, GET, HEAD"), (CHAT, "POST"), ("/", "GET, HEAD")):
        response = await client.request("PATCH", path)
        assert (response.status_code, response.headers["allow"]) == (405, allowed)


async def test_a_byte_order_mark_is_no_part_of_the_json(client: httpx.AsyncClient) -> None:
    body = b"\xef\xbb\xbf" + json.dumps(HELLO).encode()
    assert (await client.post(CHAT, content=body)).status_code == 200


async def test_requests_without_a_valid_api_key_get_401(checkpoint: Path, engine: FakeEngine) -> None:
    config = ServeConfig(api_keys={"sk-ann": "ann", "sk-bob": "bob"})
    app = build(config, engine, {"tiny": checkpoint})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        for header in (
            {},
            {"authorization": "Bearer sk-"},
            {"authorization": "sk-ann"},
            {"authorization": "Basic sk-ann"},
        ):
            for method, path in (("POST", CHAT), ("POST", EMBED), ("GET", "/v1/models"), ("GET", "/state")):
                response = await client.request(method, path, json=HELLO, headers=header)
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/ready", "/metrics", "/", "/openapi.json"):
            assert (await client.get(path)).status_code == 200
        for key, name in config.api_keys.items():
            response = await client.post(CHAT, json=HELLO, headers={"authorization": f"Bearer {key}"})
            assert response.status_code == 200
            assert engine.requests[-1].tenant == name


async def test_an_invalid_grammar_is_a_400_that_names_its_field(checkpoint: Path, engine: FakeEngine) -> None:
    async def check(model: str, grammar: Grammar, tenant: str) -> None:
        raise InvalidGrammar(f"{grammar.source} does not compile")

    app = build(ServeConfig(), engine, {"tiny": checkpoint}, check)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        body = HELLO | {"structured_outputs": {"regex": "("}}
        assert await refused(client, CHAT, body) == (400, "invalid_grammar", "$.structured_outputs")
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}
        body = HELLO | {"response_format": schema}
        path = "$.response_format.json_schema.schema.type"
        assert await refused(client, CHAT, body) == (400, "invalid_grammar", path)
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"format": []}}}
        body = HELLO | {"response_format": schema}
        path = "$.response_format.json_schema.schema.format"
        assert await refused(client, CHAT, body) == (400, "invalid_grammar", path)
        schema["json_schema"] = {"name": "a", "schema": {"type": "object"}}
        assert await refused(client, CHAT, body) == (400, "invalid_grammar", "$.response_format")
    assert not engine.requests


async def test_fields_that_a_chat_template_does_not_support_are_refused(
    tmp_path: Path, engine: FakeEngine
) -> None:
    bare = write(tmp_path / "bare", byte_level(), None, eos="<|stop|>")
    toolless = write(tmp_path / "toolless", byte_level(), "{{ messages[0].content }}", eos="<|stop|>")
    engine.models |= {name: info(name, vocab=400) for name in ("bare", "toolless")}
    app = build(ServeConfig(), engine, {"bare": bare, "toolless": toolless})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        assert await refused(client, CHAT, HELLO) == (400, "unsupported_field", "$.messages")
        for field, value in (("tools", [TOOL]), ("reasoning_effort", "low")):
            body = HELLO | {"model": "toolless", field: value}
            assert await refused(client, CHAT, body) == (400, "unsupported_field", f"$.{field}")
        for nothing in (
            {"reasoning_effort": "none"},
            {"enable_thinking": False},
            {"chat_template_kwargs": {"enable_thinking": False}},
        ):
            body = HELLO | nothing | {"model": "toolless"}
            assert (await client.post(CHAT, json=body)).status_code == 200, nothing
        assert (await client.post(TEXT, json={"prompt": "Hi"})).status_code == 200


async def test_requests_get_503_while_the_server_is_loading_full_or_draining(
    app: App, client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.ready = False
    for request in (
        client.post(CHAT, json=HELLO),
        client.get("/ready"),
        client.post(EMBED, json={"input": "a"}),
    ):
        response = await request
        assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
        assert int(response.headers["retry-after"]) >= 1
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/v1/models")).json()["data"][0]["id"] == "tiny"
    engine.ready = True
    assert (await client.get("/ready")).status_code == 200
    engine.script = lambda request: [60.0]
    waiting = [asyncio.create_task(client.post(CHAT, json=HELLO | {"n": 16})) for _ in range(2)]
    while len(engine.requests) < 32:
        await asyncio.sleep(0)
    response = await client.post(CHAT, json=HELLO)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
    assert int(response.headers["retry-after"]) >= 1
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert (app.server.gate.waiting, engine.open) == (0, set())
    app.server.gate.close()
    response = await client.post(CHAT, json=HELLO)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
    assert (await client.get("/state")).json()["draining"] is True


def test_retry_after_follows_the_rate_of_first_tokens() -> None:
    now = [0.0]
    gate = AdmissionGate(100, clock=lambda: now[0])
    slots = [gate.reserve(1) for _ in range(100)]
    for at in range(200):
        now[0] += 0.5
        slots[at].first_token()
        slots.append(gate.reserve(1))
    with pytest.raises(Overloaded) as caught:
        gate.reserve(1)
    assert caught.value.retry_after == pytest.approx(100 / 2 * 0.5, rel=0.05)
    with slots[-1]:
        pass
    with gate.reserve(1):
        assert gate.waiting == 100
    assert gate.waiting == 99


async def test_an_error_during_a_stream_is_sent_as_a_typed_event(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for script, code in (
        ([5, Reason.ERROR], "engine_error"),
        ([5, EngineDied("gone")], "engine_died"),
        ([5, RuntimeError("a prompt")], "internal_error"),
    ):
        engine.script = lambda request, script=script: script
        for body in (HELLO | {"stream": True}, HELLO | {"stream": True, "n": 2}):
            response = await client.post(CHAT, json=body)
            assert response.status_code == 200
            *_, last = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
            assert json.loads(last)["error"]["code"] == code
            assert "[DONE]" not in response.text
            assert "a prompt" not in response.text
        response = await client.post(CHAT, json=HELLO | {"n": 2})
        assert (response.status_code, response.json()["error"]["code"]) == (
            503 if code == "engine_died" else 500,
            code,
        )
        assert not engine.open


async def test_an_engine_that_dies_between_two_choices_leaves_no_open_stream(
    app: App, client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    def script(request: Request) -> list[Item]:
        if len(engine.requests) == 2:
            raise EngineDied("gone", retry_after=2.0)
        return [60.0]

    engine.script = script
    response = await client.post(CHAT, json=HELLO | {"n": 3})
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
    assert (engine.open, app.server.gate.waiting, app.server.calls) == (set(), 0, set())


async def test_an_internal_error_is_logged_without_request_content(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = lambda request: [RuntimeError("the prompt was: secret")]
    with caplog.at_level(logging.DEBUG, "stretto"):
        response = await client.post(CHAT, json=HELLO)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in caplog.text
    assert "RuntimeError at " in caplog.text
    assert "fake_engine.py" in caplog.text


async def test_tokenizing_a_long_prompt_does_not_block_the_event_loop(
    app: App, client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    """A task that wakes every millisecond must keep running while a long prompt is tokenized."""
    engine.models["tiny"] = info(vocab=1000, context=10**6)
    beats = 0
    done = False

    async def heart() -> None:
        nonlocal beats
        while not done:
            beats += 1
            await asyncio.sleep(0.001)

    beating = asyncio.create_task(heart())
    started = time.perf_counter()
    response = await client.post(
        CHAT, json={"messages": [{"role": "user", "content": "The quick fox. " * 60_000}]}
    )
    seconds = time.perf_counter() - started
    done = True
    await beating
    assert response.status_code == 200
    assert len(engine.requests[0].prompt) > 100_000
    assert seconds > 0.1, "long enough to tell"
    assert beats > seconds / 0.010, f"{beats} beats in {seconds:.2f} s"
