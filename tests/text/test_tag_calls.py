"""Tool calls that are written with tags, fed at every split."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stretto.text.tools.parser import ToolEvent
from stretto.text.tools.xml_parser import GLM, QWEN_CODER, TagFormat, TagParser, value_of

TOOLS: dict[str, dict[str, Any] | None] = {
    "weather": {
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "at": {"type": "array"}}
    },
    "ping": None,
}
PARIS = (
    "<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>"
)
CASES: list[tuple[TagFormat, str, str, list[tuple[str, dict[str, Any]]]]] = [
    (QWEN_CODER, f"<tool_call>\n{PARIS}\n</tool_call>", "", [("weather", {"city": "Paris", "days": 3})]),
    (
        QWEN_CODER,
        f"Sure.\n<tool_call>{PARIS}</tool_call>\n<tool_call><function=ping></function></tool_call>\n",
        "Sure.\n",
        [("weather", {"city": "Paris", "days": 3}), ("ping", {})],
    ),
    (QWEN_CODER, "<tool_call>what is this</tool_call>", "<tool_call>what is this</tool_call>", []),
    (QWEN_CODER, "a < b, <tool", "a < b, <tool", []),
    (
        QWEN_CODER,
        "<tool_call><function=weather><parameter=city>7</parameter>"
        "<parameter=at>[1, 2]</parameter></function></tool_call>",
        "",
        [("weather", {"city": "7", "at": [1, 2]})],
    ),
    (
        GLM,
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>",
        "",
        [("weather", {"city": "Paris", "days": 3})],
    ),
    (GLM, "<tool_call>ping\n</tool_call>", "", [("ping", {})]),
    # cut by length: the arguments that are whole
    (QWEN_CODER, f"<tool_call>{PARIS[:60]}", "", [("weather", {"city": "Paris"})]),
]


def joined(events: list[ToolEvent]) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    content, calls = "", list[tuple[str, dict[str, Any]]]()
    for event in events:
        if isinstance(event, str):
            content += event
        else:
            assert event.index == len(calls)
            calls.append((str(event.function.name), json.loads(str(event.function.arguments))))
    return content, calls


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_calls_are_found_however_the_text_is_split(
    form: TagFormat, text: str, content: str, calls: list[tuple[str, dict[str, Any]]]
):
    for size in (1, 2, 3, 7, len(text)):
        parser = TagParser(form, TOOLS)
        events = [event for at in range(0, len(text), size) for event in parser.push(text[at : at + size])]
        assert joined(events + parser.flush()) == (content, calls), size
        assert parser.calls == len(calls)


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("3", {"type": "integer"}, 3),
        ("3", {"type": "string"}, "3"),
        ("3", {"type": ["string", "null"]}, "3"),
        ("null", {"type": ["string", "null"]}, None),
        ("True", {"type": "boolean"}, True),
        ('{"a": 1}', {"type": "object"}, {"a": 1}),
        ("Paris", None, "Paris"),
        ("3", None, 3),
    ],
)
def test_the_schema_says_what_a_value_stands_for(text: str, schema: Any, value: Any):
    assert value_of(text, schema) == value
