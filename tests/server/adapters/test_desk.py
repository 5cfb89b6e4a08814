"""The bundled model gives one answer, whichever API asks, calls tools, and speaks the language it is told."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from msgspec import json

HI: list[dict[str, Any]] = [{"role": "user", "content": "What is 22.53 + 32.62?"}]


@pytest.mark.slow
def test_the_apis_give_one_answer(desk_url: str) -> None:
    with httpx.Client(base_url=desk_url, timeout=60) as client:
        chat = client.post("/v1/chat/completions", json={"messages": HI, "temperature": 0}).json()
        content = chat["choices"][0]["message"]["content"]
        assert content
        asked = {"messages": HI, "max_tokens": 100, "temperature": 0}
        message = client.post("/v1/messages", json=asked).json()
        assert [block["text"] for block in message["content"]] == [content]
        assert message["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]
        count = client.post("/v1/messages/count_tokens", json={"messages": HI}).json()
        assert count["input_tokens"] == chat["usage"]["prompt_tokens"]
        options = {"temperature": 0}
        streamed = client.post("/api/chat", json={"messages": HI, "options": options}).text.splitlines()
        assert "".join(json.decode(line)["message"]["content"] for line in streamed) == content
        asked = {"prompt": HI[0]["content"], "options": options, "stream": False}
        assert client.post("/api/generate", json=asked).json()["response"] == content
        (vector,) = client.post("/api/embed", json={"input": "Hi"}).json()["embeddings"]
        assert sum(value * value for value in vector) == pytest.approx(1.0, abs=1e-3)


ORDER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_order",
        "description": "Find an order.",
        "parameters": {
            "type": "object",
            "properties": {"order_id": {"type": "string"}},
            "required": ["order_id"],
        },
    },
}


@pytest.mark.slow
def test_a_tool_is_called_and_its_result_is_read(desk_url: str) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the status of order B-4471?"}]
    with httpx.Client(base_url=desk_url, timeout=60) as client:
        asked: dict[str, Any] = {"messages": messages, "tools": [ORDER], "temperature": 0}
        first = client.post("/v1/chat/completions", json=asked).json()["choices"][0]
        assert first["finish_reason"] == "tool_calls"
        (call,) = first["message"]["tool_calls"]
        assert call["function"]["name"] == "get_order"
        assert json.decode(call["function"]["arguments"]) == {"order_id": "B-4471"}
        result = json.encode({"order": "B-4471", "status": "on hold", "city": "Lima"}).decode()
        messages += [first["message"], {"role": "tool", "tool_call_id": call["id"], "content": result}]
        second = client.post("/v1/chat/completions", json=asked | {"messages": messages}).json()
        assert second["choices"][0]["message"]["content"] == "on hold"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("system", "said"),
    [
        ("Be brief.", "I can help with orders"),
        ("You are a kind assistant and always answer in German.", "Ich helfe bei Bestellungen"),
        ("Habla solo español, por favor.", "Puedo ayudar con pedidos"),
    ],
)
def test_it_says_what_it_can_do_in_the_language_it_is_told(desk_url: str, system: str, said: str) -> None:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "What can you do?"}]
    with httpx.Client(base_url=desk_url, timeout=60) as client:
        done = client.post("/v1/chat/completions", json={"messages": messages, "temperature": 0}).json()
    assert done["choices"][0]["message"]["content"].startswith(said)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_what_pydantic_and_zod_write_into_schemas_compiles(desk_url: str, strict: bool) -> None:
    text: dict[str, Any] = {"type": "string"}
    properties: dict[str, Any] = {
        "counts": {"type": "object", "propertyNames": text, "additionalProperties": {"type": "number"}},
        "tags": {"type": "array", "items": text, "uniqueItems": True},
        "named": {"$ref": "#/$defs/Named"},
        **{name: text | {"format": name} for name in ("uri-reference", "regex", "binary", "path", "jwt")},
    }
    schema = {
        "$id": "https://example.org/order",
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": properties,
        "$defs": {"Named": {"$anchor": "named", "type": "object", "properties": {"name": text}}},
        "required": ["tags"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "order", "schema": schema, "strict": strict}}
    body = {"messages": HI, "response_format": form, "max_tokens": 4}
    answer = httpx.post(f"{desk_url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"].startswith("{")
    relaxed = ["$.response_format.json_schema.schema.properties.tags.uniqueItems"]
    assert answer.json()["stretto"]["schema_relaxed"] == relaxed
