"""The text that a chat's quality is estimated from: that of a recipe's samples, and what bad schemas give."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import msgspec
import pytest

from recipes.desk.example import Example
from recipes.desk.samples import cells, line
from stretto.ladder.estimate import features
from stretto.optimise.data import DataSample
from stretto.protocol.openai import ChatRequest
from stretto.server.variants.question import question

TOOL: dict[str, Any] = {
    "name": "stock",
    "description": "How many are left.",
    "parameters": {"properties": {}},
}


def asked(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
    body: dict[str, Any] = {"model": "m", "messages": messages}
    if tools:
        body["tools"] = [{"type": "function", "function": tool} for tool in tools]
    return question(msgspec.convert(body, ChatRequest))


def as_request(example: Example) -> str:
    """The question of an example as a client of the server sends it."""
    messages: list[dict[str, Any]] = [{**deepcopy(message)} for message in example.messages]
    for message in messages:
        for called in message.get("tool_calls", ()):
            called["function"]["arguments"] = json.dumps(called["function"]["arguments"])
    return asked(messages, [tool["function"] for tool in example.tools])


def test_a_request_has_the_features_that_the_same_sample_was_fitted_with() -> None:
    examples = [each for each in cells(3, 7) if each.task == "tools"]
    assert any(each.tools for each in examples)
    assert any("tool_calls" in message for each in examples for message in each.messages)
    for example in examples:
        fitted = msgspec.convert(line(example), DataSample).question
        found, wanted = features(as_request(example)), features(fitted)
        # The template of desk may add a line that names the language.
        assert len({*found.buckets} ^ {*wanted.buckets}) <= 3, fitted
        assert found.numbers[1:] == pytest.approx(wanted.numbers[1:], abs=0.02)


def test_the_last_message_comes_first_then_the_systems_the_tools_and_the_others() -> None:
    text = asked(
        [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Which "}, {"type": "text", "text": "lamp?"}],
            },
            {"role": "assistant", "content": "The red one."},
            {"role": "user", "content": "How many are left?"},
        ],
        [TOOL],
    )
    assert text.split("\n") == [
        "How many are left?",
        "Be brief.",
        "Tools:",
        "stock() How many are left.",
        "Which lamp?",
        "The red one.",
    ]


def test_calls_and_results_are_written_as_templates_write_them() -> None:
    called = {"id": "1", "type": "function", "function": {"name": "stock", "arguments": '{"of": "lamp"}'}}
    text = asked(
        [
            {"role": "user", "content": "Lamps?"},
            {"role": "assistant", "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "1", "content": "7"},
        ]
    )
    first = "<tool_response>\n7\n</tool_response>\nLamps?\n"
    assert text == first + '\n<tool_call>\n{"name": "stock", "arguments": {"of": "lamp"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("properties", "shown"),
    [
        ({"of": {"type": "string"}, "size": {"enum": ["s", "m"]}}, "stock(of: string, size: s|m)"),
        ({"on": {"type": "string", "description": "as YYYY"}}, "stock(on: string (as YYYY))"),
        (
            {"of": {}, "by": True, "at": {"type": ["string", "null"], "enum": 3}},
            "stock(of: any, by: any, at: any)",
        ),
        ([], "stock()"),
        (None, "stock()"),
    ],
)
def test_a_tool_is_one_line_whatever_its_schema(properties: object, shown: str) -> None:
    tool = TOOL | {"parameters": {"properties": properties}}
    assert asked([{"role": "user", "content": "?"}], [tool]).split("\n")[2] == f"{shown} How many are left."
