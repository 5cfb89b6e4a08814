"""Tool calls that are written with tags, fed at every split."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stretto.protocol.openai import ToolCallDelta
from stretto.text.tools.parser import ToolEvent
from stretto.text.tools.tag_formats import (
    DEEPSEEK,
    DEEPSEEK_DSML,
    FUNCTION_GEMMA,
    GEMMA,
    GLM,
    QWEN_CODER,
    TagFormat,
    parameter_types,
    value_of,
)
from stretto.text.tools.tag_parser import TagParser

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
    # the model left the opener out, as it often does
    (QWEN_CODER, f"Sure.\n{PARIS}\n</tool_call>", "Sure.\n", [("weather", {"city": "Paris", "days": 3})]),
    (
        QWEN_CODER,
        f"{PARIS}\n<function=ping>\n</function>\n<tool_call>{PARIS}</tool_call> ok",
        " ok",
        [("weather", {"city": "Paris", "days": 3}), ("ping", {}), ("weather", {"city": "Paris", "days": 3})],
    ),
    (
        QWEN_CODER,
        "Write <function=x></function>, not </tool_call>.",
        "Write <function=x></function>, not </tool_call>.",
        [],
    ),
    (QWEN_CODER, PARIS[:60], "", [("weather", {"city": "Paris"})]),
    (QWEN_CODER, "a <function", "a <function", []),
    (QWEN_CODER, f"{PARIS} and</tool_call>", " and</tool_call>", [("weather", {"city": "Paris", "days": 3})]),
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
    (
        DEEPSEEK,
        "Sure.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Paris", "days": 3}\n```<｜tool▁call▁end｜>\n'
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>ping\n"
        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Sure.",
        [("weather", {"city": "Paris", "days": 3}), ("ping", {})],
    ),
    (
        DEEPSEEK,
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        '{"city": "a```b"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "",
        [("weather", {"city": "a```b"})],
    ),
    (
        DEEPSEEK,
        "<｜tool▁call▁begin｜>weather<｜tool▁sep｜>no JSON<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜>weather<｜tool▁sep｜>no JSON<｜tool▁call▁end｜>",
        [],
    ),
    (
        DEEPSEEK_DSML,
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n'
        '<｜DSML｜parameter name="city" string="true">3</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="at" string="false">[1, 2]</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        "",
        [("weather", {"city": "3", "at": [1, 2]})],
    ),
    (
        FUNCTION_GEMMA,
        "<start_function_call>call:weather{city:<escape>a, {b}<escape>,days:3}<end_function_call>",
        "",
        [("weather", {"city": "a, {b}", "days": 3})],
    ),
    (
        GEMMA,
        'Well. <|tool_call>call:weather{city:<|"|>Paris<|"|>,at:[1,<|"|>x<|"|>,{deep:true}],days:-2.5}'
        "<tool_call|><|tool_call>call:ping{}<tool_call|>",
        "Well. ",
        [("weather", {"city": "Paris", "at": [1, "x", {"deep": True}], "days": -2.5}), ("ping", {})],
    ),
    (GEMMA, "<|tool_call>call:ping{a:<tool_call|>", "<|tool_call>call:ping{a:<tool_call|>", []),
    # cut by length: the arguments that are whole
    (GEMMA, '<|tool_call>call:weather{days:3,city:<|"|>Par', "", [("weather", {"days": 3})]),
    (DEEPSEEK, '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Pa', "", [("weather", {})]),
    (QWEN_CODER, f"<tool_call>{PARIS[:60]}", "", [("weather", {"city": "Paris"})]),
]


def joined(events: list[ToolEvent]) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    content, calls = "", list[tuple[str, dict[str, Any]]]()
    for event in events:
        if isinstance(event, str):
            content += event
        else:
            assert isinstance(event, ToolCallDelta)
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
        ("3", {"type": ["string", "integer"]}, 3),
        ("3.5", {"type": ["string", "integer"]}, "3.5"),
        ("3", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "3"),
        ("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ("3", {"enum": ["3", "4"]}, "3"),
        ("3", {"$ref": "#/$defs/text"}, "3"),
        ("NaN", {"type": "number"}, "NaN"),
        ("1e999", {"type": "number"}, 1.7976931348623157e308),
        ("3", {"$ref": "#/$defs/nowhere"}, 3),
    ],
)
def test_the_schema_says_what_a_value_stands_for(text: str, schema: Any, value: Any):
    tool = {"properties": {"a": schema}, "$defs": {"text": {"type": "string"}}}
    assert value_of(text, parameter_types(tool, "a")) == value


def test_a_closer_inside_a_json_value_ends_nothing():
    inside = '["</parameter>", "</function>\\n</tool_call>", "\\ud83d"]'
    text = f"<tool_call><function=weather><parameter=at>{inside}</parameter></function></tool_call> ok"
    for size in (1, 5, len(text)):
        parser = TagParser(QWEN_CODER, TOOLS)
        events = [event for at in range(0, len(text), size) for event in parser.push(text[at : at + size])]
        content, found = joined(events + parser.flush())
        assert (content, found) == (" ok", [("weather", {"at": json.loads(inside)})])


def test_a_broken_call_does_not_hide_the_next_one():
    broken = "<tool_call><function=weather><parameter=at>[1, </parameter></function></tool_call>"
    text = f"{broken}<tool_call><function=ping></function></tool_call>"
    parser = TagParser(QWEN_CODER, TOOLS)
    content, found = joined(parser.push(text) + parser.flush())
    assert (content, found) == ("", [("weather", {"at": "[1, "}), ("ping", {})])


def test_nesting_that_no_stack_could_hold_is_no_call():
    text = "<|tool_call>call:ping{a:" + "[" * 5000 + "<tool_call|>"
    parser = TagParser(GEMMA, TOOLS)
    assert joined(parser.push(text) + parser.flush()) == (text, [])
