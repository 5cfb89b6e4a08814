"""The table of limits: one beyond each is refused by path, length and limit, and the docs hold it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import json as wire

from stretto.errors import InvalidRequest
from stretto.protocol.limits import LIMITS, check_json, reference
from stretto.protocol.openai import ChatRequest, CompletionRequest
from stretto.protocol.parsing import parse
from stretto.protocol.relay import RelayedRequest
from tests.server.conftest import CHAT, HELLO

CHATS = wire.Decoder(ChatRequest)
TEXTS = wire.Decoder(CompletionRequest)
USER: dict[str, Any] = {"role": "user", "content": "a"}


def over(name: str) -> int:
    return LIMITS[name].most + 1


def text(name: str) -> str:
    return "x" * over(name)


def entries(name: str, entry: Any = 1) -> list[Any]:
    return [entry] * over(name)


def members(name: str) -> dict[str, Any]:
    return {str(at): 1 for at in range(over(name))}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f"} | function}


def called(**call: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": "{}"}
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function} | call]}


BEYOND: list[tuple[str, str, dict[str, Any]]] = [
    ("messages", "$.messages", {"messages": entries("messages", USER)}),
    (
        "parts",
        "$.messages[0].content",
        {"messages": [USER | {"content": entries("parts", {"type": "text", "text": "a"})}]},
    ),
    (
        "tool_calls",
        "$.messages[0].tool_calls",
        {"messages": [{"role": "assistant", "tool_calls": called()["tool_calls"] * over("tool_calls")}]},
    ),
    (
        "arguments",
        "$.messages[0].tool_calls[0].function.arguments",
        {"messages": [called(function={"name": "f", "arguments": text("arguments")})]},
    ),
    ("identifier", "$.messages[0].tool_calls[0].id", {"messages": [called(id=text("identifier"))]}),
    ("identifier", "$.messages[0].name", {"messages": [USER | {"name": text("identifier")}]}),
    ("tools", "$.tools", {"tools": entries("tools", tool())}),
    ("description", "$.tools[0].function.description", {"tools": [tool(description=text("description"))]}),
    ("stop", "$.stop", {"stop": entries("stop", "a")}),
    ("stop_string", "$.stop", {"stop": text("stop_string")}),
    ("stop_string", "$.stop[1]", {"stop": ["a", text("stop_string")]}),
    ("stop_token_ids", "$.stop_token_ids", {"stop_token_ids": entries("stop_token_ids")}),
    ("logit_bias", "$.logit_bias", {"logit_bias": members("logit_bias")}),
    ("model", "$.model", {"model": text("model")}),
    ("user", "$.user", {"user": text("user")}),
    ("user", "$.cache_salt", {"cache_salt": text("user")}),
    ("metadata", "$.metadata", {"metadata": {str(at): "" for at in range(over("metadata"))}}),
    ("metadata_key", "$.metadata", {"metadata": {"a": "", text("metadata_key"): ""}}),
    ("metadata_value", "$.metadata[...]", {"metadata": {"a": "", "b": text("metadata_value")}}),
    ("modalities", "$.modalities", {"modalities": entries("modalities", "text")}),
    ("variables", "$.chat_template_kwargs", {"chat_template_kwargs": members("variables")}),
    ("regex", "$.structured_outputs.regex", {"structured_outputs": {"regex": text("regex")}}),
    ("choices", "$.structured_outputs.choice", {"structured_outputs": {"choice": entries("choices", "a")}}),
    ("schema", "$.structured_outputs.json", {"structured_outputs": {"json": text("schema")}}),
]


def refusal(body: object, decoder: Any = CHATS) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(decoder, body if isinstance(body, bytes) else json.dumps(body).encode())
    return caught.value


@pytest.mark.parametrize(("name", "path", "body"), BEYOND)
def test_one_beyond_a_limit_is_refused_by_path_length_and_limit(
    name: str, path: str, body: dict[str, Any]
) -> None:
    limit = LIMITS[name]
    error = refusal(HELLO | body)
    assert error.param == path
    assert error.message == limit.error(path, limit.most + 1).message
    assert f"{path} has {limit.most + 1} {limit.unit}; at most {limit.most} are allowed" in error.message


def test_token_ids_of_a_prompt_are_limited() -> None:
    ids = entries("token_ids")
    assert refusal({"prompt": ids}, TEXTS).param == "$.prompt"
    assert refusal({"prompt": [[1], ids]}, TEXTS).param == "$.prompt[1]"


def test_every_row_of_the_table_is_tested() -> None:
    elsewhere = {"tool_name", "prompts", "token_ids", "depth", "members", "containers", "field_bytes"}
    elsewhere |= {"request_id", "corrected_answer"}  # of feedback
    assert {name for name, _, _ in BEYOND} | elsewhere == LIMITS.keys()


def test_the_documentation_holds_the_table() -> None:
    assert reference() in (Path(__file__).parents[2] / "docs" / "limits.md").read_text()


@pytest.mark.parametrize("twice", ["$.user", "$.messages[0].name"])
def test_a_name_that_comes_twice_does_not_hide_a_long_value(twice: str) -> None:
    long = b"x" * 2000
    first = (
        b'"user":"%s"' % long
        if twice == "$.user"
        else b'"messages":[{"role":"user","content":"","name":"%s"}]'
    )
    body = b'{%s,"user":"a","messages":3}' % (first if twice == "$.user" else first % long)
    assert refusal(body).param == twice


class NeverDecodes:
    def decode(self, body: bytes) -> None:
        raise AssertionError("decoding a large body stops every stream meanwhile")


@pytest.mark.parametrize(
    ("body", "path", "length"),
    [
        ({"stop_token_ids": [123] * 1_000_000}, "$.stop_token_ids", "1000000 entries"),
        ({"logit_bias": {str(at): 1 for at in range(300_000)}}, "$.logit_bias", "300000 entries"),
        ({"chat_template_kwargs": {"a": ["x"] * 600_000}}, "$.chat_template_kwargs", "3000007 bytes of JSON"),
        ({"user": "x" * 4_000_000}, "$.user", "4000002 bytes of JSON"),
    ],
)
def test_a_large_field_is_refused_before_it_is_decoded(body: dict[str, Any], path: str, length: str) -> None:
    error = refusal(HELLO | body, NeverDecodes())
    assert error.param == path
    assert f"{path} has {length}" in error.message


def nested(depth: int) -> str:
    """The JSON of lists and objects in turn; the outermost is an object."""
    pairs, odd = divmod(depth, 2)
    return '{"a":[' * pairs + '{"a":1}' * odd + "]}" * pairs


DEEP = "the deep value"


def deep_fields(value: str) -> list[tuple[str, dict[str, Any]]]:
    call = called(function={"name": "f", "arguments": value})
    return [
        ("$.chat_template_kwargs", {"chat_template_kwargs": DEEP}),
        ("$.tools[0].function.parameters", {"tools": [tool(parameters=DEEP)]}),
        ("$.messages[0].tool_calls[0].function.arguments", {"messages": [call, USER]}),
        (
            "$.response_format.json_schema.schema",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": DEEP}}},
        ),
        ("$.structured_outputs.json", {"structured_outputs": {"json": DEEP}}),
    ]


@pytest.mark.parametrize("depth", [LIMITS["depth"].most + 1, 100, 301, 500, 700, 900, 980])
async def test_deep_json_is_refused_with_its_path(client: httpx.AsyncClient, depth: int) -> None:
    value = nested(depth)
    for path, body in deep_fields(value):
        response = await client.post(CHAT, content=json.dumps(HELLO | body).replace(json.dumps(DEEP), value))
        error = response.json()["error"]
        assert response.status_code == 400
        assert path.startswith(error["param"])
        assert f"levels of nesting; at most {LIMITS['depth'].most}" in error["message"]
        # The decoder itself gives up near 1,000 levels.
        assert depth == 980 or f"{path} has {depth} levels" in error["message"]


def test_the_members_of_untyped_json_are_counted_at_all_levels() -> None:
    check_json(json.loads(nested(LIMITS["depth"].most)), "$.a")
    check_json({str(at): [1] for at in range(LIMITS["members"].most // 2)}, "$.a")
    with pytest.raises(InvalidRequest, match="members"):
        check_json({str(at): [1, 2] for at in range(LIMITS["members"].most // 2)}, "$.a")


@pytest.mark.parametrize("size", [10_000, 4_000_000])
async def test_a_long_wrong_value_is_cut_in_the_message(client: httpx.AsyncClient, size: int) -> None:
    long = "x" * size
    for body in (
        {"service_tier": long},
        {"reasoning_effort": long},
        {"tool_choice": long},
        {"model": long},
        {long: 1},
        {"metadata": {long: "a"}},
        {"messages": [{"role": long, "content": ""}]},
        {"messages": [USER | {"content": [{"type": long}]}]},
        {"chat_template_kwargs": {long: 1}},
        {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": long}}},
        {"response_format": {"type": long}},
    ):
        response = await client.post(CHAT, content=json.dumps(HELLO | body))
        assert response.status_code == 400
        assert len(response.content) < 3000


HALVES = [
    (rb"a\ud83d", "a\ufffd"),
    (rb"\ude00b", "\ufffdb"),
    (rb"\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
    (rb"\ude00\ud83d", "\ufffd\ufffd"),
    (rb"\\ud83d", r"\ud83d"),
    (rb"\\\ud83d", "\\\ufffd"),
    (rb"\"\uD83D\n", '"\ufffd\n'),
]


@pytest.mark.parametrize(("written", "read"), HALVES)
def test_half_a_surrogate_pair_is_read_as_the_replacement_character(written: bytes, read: str) -> None:
    half = rb"\ud800"  # of another pair, so that each body has one
    message = rb'{"role":"user","content":"%s"}' % written
    request = parse(CHATS, rb'{"user":"%s","messages":[%s]}' % (half, message))
    assert request.user == "\ufffd"
    assert request.messages[0].content == read


def test_a_relayed_request_may_be_as_large_as_a_prompt() -> None:
    request = {
        "operation": "chat",
        "tenant": "a",
        "request": {"messages": [USER | {"content": "x" * 2_000_000}]},
    }
    assert parse(wire.Decoder(RelayedRequest), json.dumps(request).encode()).operation == "chat"
