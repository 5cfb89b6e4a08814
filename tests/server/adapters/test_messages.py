"""Anthropic's Messages API. `anthropic_bodies.json` holds what the `anthropic` Python client 2.14 sent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import json, structs

from stretto.errors import EngineError, Overloaded
from stretto.protocol.openai import CalledFunction, MadeCall
from stretto.server.adapters.naming import arguments_of
from stretto.server.app import App
from stretto.text.tokenizer import TextModel
from stretto.types import Finish, Reason, TokenEvent
from tests.server.fake_engine import FakeEngine

URL = "/v1/messages"
HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "input_schema": SCHEMA}
CALL = 'One moment. <tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>'
RECORDED = json.decode((Path(__file__).parent / "anthropic_bodies.json").read_bytes())
SetAnswer = Callable[[str], list[int]]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 100, "messages": HI} | fields


async def events(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream; each has the name that its data has."""
    response = await client.post(URL, json=body(stream=True, **fields))
    assert response.status_code == 200
    found: list[dict[str, Any]] = []
    for part in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        found.append(json.decode(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def folded(stream: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of a stream."""
    assert [stream[0]["type"], stream[1]["type"]] == ["message_start", "ping"]
    assert [each["type"] for each in stream[-2:]] == ["message_delta", "message_stop"]
    message = stream[0]["message"]
    for event in stream[2:-2]:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"] | {"partial": ""})
        elif event["type"] == "content_block_delta":
            block, delta = message["content"][event["index"]], event["delta"]
            field = delta["type"].removesuffix("_delta")
            key = {"input_json": "partial_json"}.get(field, field)
            target = {"input_json": "partial"}.get(field, field)
            block[target] = block.get(target, "") + delta[key]
    for block in message["content"]:
        partial = block.pop("partial")
        if block["type"] == "tool_use":
            block["input"] = json.decode(partial)
    message |= stream[-2]["delta"]
    message["usage"] |= stream[-2]["usage"]
    return message


def rendered(engine: FakeEngine, text: TextModel) -> str:
    return text.tokenizer.decode(list(engine.requests[-1].prompt), skip_special_tokens=False)


@pytest.mark.parametrize("recorded", RECORDED, ids=range(len(RECORDED)))
async def test_what_the_client_sends_is_answered(
    client: httpx.AsyncClient, engine: FakeEngine, recorded: dict[str, Any]
) -> None:
    engine.models["tiny"] = structs.replace(engine.models["tiny"], context=4096)
    response = await client.post(recorded["path"], json=recorded["body"])
    assert response.status_code == 200, response.text
    assert response.headers["request-id"] == response.headers["x-request-id"]


async def test_a_message_has_content_a_reason_and_usage(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    found = (await client.post(URL, json=body(temperature=0.5, top_k=3, top_p=0.9))).json()
    assert found["content"] == [{"type": "text", "text": "Hello, world!", "citations": None}]
    assert (found["type"], found["role"], found["model"]) == ("message", "assistant", "tiny")
    assert (found["stop_reason"], found["stop_sequence"]) == ("end_turn", None)
    request = engine.requests[0]
    assert found["usage"] == {
        "input_tokens": len(request.prompt) - 3,
        "cache_read_input_tokens": 3,
        "cache_creation_input_tokens": 0,
        "output_tokens": 5,
    }
    assert found["stretto"]["variant"] == "tiny"
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_tokens) == (0.5, 3, 0.9, 100)


@pytest.mark.parametrize(
    ("answer", "fields"),
    [
        ("Grüße 世界 😀", {}),
        ("", {}),
        (CALL, {"tools": [WEATHER]}),
        (CALL + CALL[12:], {"tools": [WEATHER]}),
        ("<think>Hmm, 42?</think>Yes.", {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
        ("one two three four", {"stop_sequences": ["three"]}),
        ("one two three four", {"max_tokens": 2}),
    ],
)
async def test_a_stream_adds_up_to_the_whole_message(
    client: httpx.AsyncClient, set_answer: SetAnswer, answer: str, fields: dict[str, Any]
) -> None:
    set_answer(answer)
    whole = (await client.post(URL, json=body(**fields))).json()
    made = folded(await events(client, **fields))
    for message in (whole, made):
        for name in ("id", "stretto"):
            del message[name]
        for block in message["content"]:
            block.pop("id", None)
            block.pop("signature", None)
    assert made == whole


async def test_tools_are_called_and_their_results_read(
    client: httpx.AsyncClient, set_answer: SetAnswer, engine: FakeEngine, text: TextModel
) -> None:
    set_answer(CALL)
    found = (await client.post(URL, json=body(tools=[WEATHER]))).json()
    said, call = found["content"]
    assert (said["text"], call["name"], call["input"]) == ("One moment. ", "weather", {"city": "Köln"})
    assert found["stop_reason"] == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "no such city", "is_error": True}
    after = [{"role": "assistant", "content": found["content"]}, {"role": "user", "content": [result]}]
    assert (await client.post(URL, json=body(messages=HI + after, tools=[WEATHER]))).status_code == 200
    prompt = rendered(engine, text)
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>' in prompt
    assert "tool\nError: no such city<|stop|>" in prompt


@pytest.mark.parametrize(
    ("choice", "kind"),
    [
        ({"type": "any"}, "json_schema"),
        ({"type": "tool", "name": "weather"}, "json_schema"),
        ({"type": "auto"}, None),
        ({"type": "none"}, None),
    ],
)
async def test_the_choice_of_a_tool_is_enforced(
    client: httpx.AsyncClient, engine: FakeEngine, choice: dict[str, Any], kind: str | None
) -> None:
    choice = choice if choice["type"] == "none" else choice | {"disable_parallel_tool_use": True}
    await client.post(URL, json=body(tools=[WEATHER], tool_choice=choice))
    grammar = engine.requests[0].sampling.grammar
    assert (None if grammar is None else grammar.kind) == kind
    if choice["type"] == "any":
        assert grammar is not None
        assert json.decode(grammar.source)["maxItems"] == 1


async def test_a_cut_call_has_the_members_that_are_whole(
    client: httpx.AsyncClient, set_answer: SetAnswer
) -> None:
    set_answer('<tool_call>{"name": "weather", "arguments": {"days": 3, "city": "Kö')
    found = (await client.post(URL, json=body(tools=[WEATHER]))).json()
    assert found["content"][-1]["input"] == {"days": 3}


def test_arguments_that_are_nested_too_deeply_are_an_error_of_the_answer() -> None:
    text = '{"a": ' + "[" * 9000 + "]" * 9000 + "}"
    with pytest.raises(EngineError, match="too deeply"):
        arguments_of(MadeCall(id="a", function=CalledFunction(name="weather", arguments=text)))


async def test_reasoning_is_asked_for_and_left_out(
    client: httpx.AsyncClient, set_answer: SetAnswer, engine: FakeEngine, text: TextModel
) -> None:
    set_answer("<think>Hmm, 42?</think>Yes.")
    found = (await client.post(URL, json=body(thinking={"type": "adaptive"}))).json()
    assert [block["type"] for block in found["content"]] == ["thinking", "text"]
    assert found["content"][0]["signature"]
    assert not rendered(engine, text).rstrip().endswith("</think>")
    back = [*HI, {"role": "assistant", "content": found["content"]}, *HI]
    for thinking in (None, {"type": "disabled"}):
        assert (await client.post(URL, json=body(messages=back, thinking=thinking))).status_code == 200
        assert rendered(engine, text).rstrip().endswith("</think>")
    assert "<think>Hmm, 42?</think>" in rendered(engine, text)


async def test_a_schema_forms_the_answer(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    form = {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "high"}
    edits = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    await client.post(
        URL, json=body(output_config=form, context_management=edits, thinking={"type": "adaptive"})
    )
    grammar = engine.requests[0].sampling.grammar
    assert grammar is not None
    assert json.decode(grammar.source)["required"] == ["city"]


async def test_users_do_not_share_the_prefix_cache(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for user in ("ann", "bob"):
        await client.post(URL, json=body(metadata={"user_id": user}))
    ann, bob = (request.salt for request in engine.requests)
    assert ann != bob


async def test_a_stop_sequence_may_be_a_special_token(
    client: httpx.AsyncClient, engine: FakeEngine, text: TextModel
) -> None:
    end = text.tokenizer.token_to_id("<|end|>")
    engine.script = lambda request: [300, TokenEvent(0, finish=Finish(Reason.STOP, 1, 1, 0, 0.0, end))]
    found = (await client.post(URL, json=body(stop_sequences=["x", "<|end|>"]))).json()
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", "<|end|>")
    found = (await client.post(URL, json=body(stop_sequences=["x"]))).json()
    assert (found["stop_reason"], found["stop_sequence"]) == ("end_turn", None)


async def test_tokens_are_counted_without_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    asked = {"model": "tiny", "messages": HI, "system": "Be brief.", "tools": [WEATHER]}
    count = (await client.post(f"{URL}/count_tokens", json=asked)).json()
    assert not engine.requests
    await client.post(URL, json=asked | {"max_tokens": 1})
    assert count == {"input_tokens": len(engine.requests[0].prompt)}
    long = asked | {"messages": [{"role": "user", "content": "word " * 5000}]}
    assert (await client.post(f"{URL}/count_tokens", json=long)).json()["input_tokens"] > 512


REFUSED: list[tuple[dict[str, Any], int, str, str]] = [
    ({"model": "gpt-7"}, 404, "not_found_error", "no model"),
    ({"max_tokens": 0}, 400, "invalid_request_error", "$.max_tokens"),
    ({"max_tokens": None}, 400, "invalid_request_error", "$.max_tokens"),
    ({"max_tokens": 9000}, 400, "invalid_request_error", "maximum context length"),
    ({"frobnicate": 1}, 400, "invalid_request_error", "$.frobnicate"),
    ({"messages": []}, 400, "invalid_request_error", "$.messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        400,
        "invalid_request_error",
        "$.messages[0].content[0].type",
    ),
    (
        {"messages": [*HI, {"role": "assistant", "content": "We"}]},
        400,
        "invalid_request_error",
        "$.messages[1]",
    ),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "invalid_request_error", "$.tools[0]"),
    (
        {"tools": [{"name": "w", "input_schema": {"type": "array"}}], "tool_choice": {"type": "any"}},
        400,
        "invalid_request_error",
        "$.tools[0].input_schema",
    ),
    (
        {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "sun"}},
        400,
        "invalid_request_error",
        "$.tool_choice.name",
    ),
    ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "$.tool_choice"),
    ({"stop_sequences": ["x"] * 100}, 400, "invalid_request_error", "$.stop_sequences"),
    (
        {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
        400,
        "invalid_request_error",
        "$.context_management.edits[0]",
    ),
    ({"mcp_servers": [{"url": "x"}]}, 400, "invalid_request_error", "$.mcp_servers"),
    ({"objective": {"ttft_ms": 9, "total_ms": 1}}, 400, "invalid_request_error", "$.objective.total_ms"),
]


@pytest.mark.parametrize(("fields", "status", "kind", "words"), REFUSED)
async def test_errors_have_their_shape_and_name_the_field(
    client: httpx.AsyncClient, fields: dict[str, Any], status: int, kind: str, words: str
) -> None:
    response = await client.post(URL, json=body(**fields))
    found = response.json()
    assert (response.status_code, found["type"], found["error"]["type"]) == (status, "error", kind)
    assert words in found["error"]["message"]
    assert found["request_id"] == response.headers["request-id"]


async def test_a_wrong_key_is_an_authentication_error(app: App, client: httpx.AsyncClient) -> None:
    app.server.config = structs.replace(app.server.config, api_keys={"right": "ann"})
    for key, status in (("right", 200), ("wrong", 401)):
        response = await client.post(URL, json=body(), headers={"x-api-key": key})
        assert response.status_code == status
    assert response.json()["error"]["type"] == "authentication_error"
    counted = await client.post(f"{URL}/count_tokens/", json={"messages": HI})
    assert (counted.status_code, counted.json()["type"]) == (401, "error")


async def test_an_error_ends_a_stream_that_has_begun(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [300, Reason.ERROR]
    last = (await events(client))[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")
    assert "caught fire" in last["error"]["message"]


async def test_an_overloaded_server_says_so(
    client: httpx.AsyncClient, engine: FakeEngine, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(answers: int) -> None:
        raise Overloaded("the queue is full", retry_after=2.0)

    engine.ready = False
    loading = await client.post(URL, json=body())
    assert (loading.status_code, loading.json()["error"]["type"]) == (503, "overloaded_error")
    engine.ready = True
    monkeypatch.setattr(app.server.gate, "reserve", full)
    busy = await client.post(URL, json=body())
    assert (busy.status_code, busy.json()["error"]["type"]) == (529, "overloaded_error")
    assert busy.headers["retry-after"] == "2"
    wrong_type = await client.post(URL, content=b"{}", headers={"content-type": "text/plain"})
    assert (wrong_type.status_code, wrong_type.json()["type"]) == (415, "error")
