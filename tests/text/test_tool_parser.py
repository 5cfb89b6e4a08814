"""Parsers of tool calls and reasoning, fed texts that are split at every position."""

from __future__ import annotations

import json
import random

import pytest

from stretto.protocol.openai import ToolCallDelta
from stretto.text.json_stream import JsonReader, closed, whole_members
from stretto.text.reasoning_parser import ReasoningParser, split_whole
from stretto.text.tools.parser import (
    FORCED,
    HERMES,
    LLAMA,
    MISTRAL,
    AbandonedCall,
    NamedCallParser,
    ToolEvent,
    ToolFormat,
    ToolParser,
    choose,
)

NAMES = frozenset({"weather", "add"})


def joined(events: list[ToolEvent]) -> tuple[str, list[list[str]]]:
    """Join the deltas as a client does: (content, [[name, arguments], ...])."""
    content, calls = "", {}
    for part in events:
        if isinstance(part, str):
            content += part
        elif isinstance(part, AbandonedCall):
            content += part.unsent
        elif isinstance(part, ToolCallDelta):
            call = calls.setdefault(part.index, ["", ""])
            if isinstance(part.function.name, str):
                assert part.id and len(part.id) == 9 and part.type == "function"
                call[0] += part.function.name
            if isinstance(part.function.arguments, str):
                call[1] += part.function.arguments
    return content, [calls[index] for index in sorted(calls)]


def run(form: ToolFormat, *pieces: str) -> tuple[str, list[list[str]]]:
    parser = ToolParser(form, NAMES)
    events = [part for piece in pieces for part in parser.push(piece)]
    return joined(events + parser.flush())


WEATHER = '{"city": "São \\"Paulo\\" }{", "days": [1, 2, {"a": null}]}'
CASES: list[tuple[ToolFormat, str, str, list[list[str]]]] = [
    (HERMES, "Just words, 1 < 2 <tool", "Just words, 1 < 2 <tool", []),
    (
        HERMES,
        f'Let me see.\n<tool_call>\n{{"name": "weather", "arguments": {WEATHER}}}\n</tool_call>\n'
        '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>',
        "Let me see.\n",
        [["weather", WEATHER], ["add", '{"a": 1}']],
    ),
    (HERMES, '<tool_call>{"name": "now"}</tool_call> Done.', " Done.", [["now", "{}"]]),
    (HERMES, '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}', "", [["add", '{"a": 1}']]),
    (
        HERMES,
        '<tool_call>{"name": "now"}</tool_call> Done. \n<tool_call>{"name": "add"}</tool_call> \n ',
        " Done. \n",
        [["now", "{}"], ["add", "{}"]],
    ),
    (MISTRAL, "[TOOL_CALLS]add{} and \n", "and \n", [["add", "{}"]]),
    (HERMES, "<tool_call>not json</tool_call> x", "<tool_call>not json</tool_call> x", []),
    (HERMES, '<tool_call>{"nome": "x"}</tool_call>', '<tool_call>{"nome": "x"}</tool_call>', []),
    (
        HERMES,
        '<tool_call>{"name": "add", "arguments": [1]}',
        '<tool_call>{"name": "add", "arguments": [1]}',
        [],
    ),
    (HERMES, '<tool_call>{"name": "a', '<tool_call>{"name": "a', []),
    (LLAMA, f'{{"name": "weather", "parameters": {WEATHER}}}', "", [["weather", WEATHER]]),
    (
        LLAMA,
        '<|python_tag|>{"type": "function", "name": "add", "parameters": {"a": 1}}; '
        '{"name": "weather", "parameters": {}}',
        "",
        [["add", '{"a": 1}'], ["weather", "{}"]],
    ),
    (LLAMA, '\n{"name": "someone", "age": 3}', '\n{"name": "someone", "age": 3}', []),
    (LLAMA, 'As JSON: {"name": "add"}', 'As JSON: {"name": "add"}', []),
    (LLAMA, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    (
        MISTRAL,
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {WEATHER}}}, {{"name": "add", "arguments": {{}}}}]',
        "",
        [["weather", WEATHER], ["add", "{}"]],
    ),
    (MISTRAL, f"Well: [TOOL_CALLS]weather[ARGS]{WEATHER}", "Well: ", [["weather", WEATHER]]),
    (
        MISTRAL,
        '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]weather{"b": 2}',
        "",
        [["add", '{"a": 1}'], ["weather", '{"b": 2}']],
    ),
    (
        MISTRAL,
        f"[TOOL_CALLS]weather[CALL_ID]a1B2c3D4e[ARGS]{WEATHER}"
        '[TOOL_CALLS]add[CALL_ID]123456789[ARGS]{"a": 1}',
        "",
        [["weather", WEATHER], ["add", '{"a": 1}']],
    ),
    (MISTRAL, "[TOOL_CALLS]and so on\nmore", "[TOOL_CALLS]and so on\nmore", []),
    (
        FORCED,
        f'[{{"name": "weather", "arguments": {WEATHER}}}, {{"name": "add", "arguments": {{"a": 2}}}}]',
        "",
        [["weather", WEATHER], ["add", '{"a": 2}']],
    ),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_tool_calls_are_found_wherever_the_text_is_split(
    form: ToolFormat, text: str, content: str, calls: list[list[str]]
) -> None:
    assert run(form, text) == (content, calls)
    assert run(form, *text) == (content, calls)
    for cut in range(1, len(text)):
        assert run(form, text[:cut], text[cut:]) == (content, calls)


def test_arguments_are_streamed_as_they_arrive() -> None:
    parser = ToolParser(HERMES, NAMES)
    assert joined(parser.push('<tool_call>{"name": "add", "arguments": {"a": ')) == ("", [["add", '{"a": ']])
    assert joined(parser.push("12"))[1] == [["", "12"]]
    assert parser.calls == 0
    assert joined(parser.push("}}"))[1] == [["", "}"]]
    assert parser.calls == 1


def test_a_call_with_broken_arguments_returns_the_rest_as_content() -> None:
    parser = ToolParser(HERMES, NAMES)
    text = '<tool_call>{"name": "add", "arguments": {"a": oops}}</tool_call>'
    events = parser.push(text[:45]) + parser.push(text[45:]) + parser.flush()
    (abandoned,) = [part for part in events if isinstance(part, AbandonedCall)]
    after = "".join(part for part in events if isinstance(part, str))
    assert abandoned.text + after == text
    content, calls = joined(events)
    assert calls[0][0] == "add"
    assert text.endswith(calls[0][1] + content)


@pytest.mark.parametrize("twice", ['"arguments": {"a": 2}', '"parameters": {}', '"name": "weather"'])
def test_a_member_that_comes_twice_makes_no_call(twice: str) -> None:
    text = f'<tool_call>{{"name": "add", "arguments": {{"a": 1}}, {twice}}}</tool_call>'
    for size in (1, 7, len(text)):
        parser = ToolParser(HERMES, NAMES)
        events = [each for at in range(0, len(text), size) for each in parser.push(text[at : at + size])]
        events += parser.flush()
        whole = [each.text if isinstance(each, AbandonedCall) else each for each in events]
        assert "".join(each for each in whole if isinstance(each, str)) == text
        assert parser.calls == 0


def test_truncated_forced_calls_keep_their_partial_arguments() -> None:
    content, calls = run(FORCED, '[{"name": "add", "arguments": {"a": 1')
    assert (content, calls) == ("", [["add", '{"a": 1']])


def test_a_named_tool_choice_reads_all_text_as_arguments() -> None:
    call = NamedCallParser("add")
    events = call.push('{"a"') + call.push("") + call.push(": 1}") + call.flush()
    assert joined(events) == ("", [["add", '{"a": 1}']])


def test_the_tool_format_is_detected_from_the_chat_template() -> None:
    assert choose("... <tool_call> ...".__contains__) is HERMES
    assert choose("... [TOOL_CALLS] ...".__contains__) is MISTRAL
    assert choose("... <|python_tag|> ...".__contains__) is LLAMA
    assert choose("...".__contains__) is None


THOUGHTS = [
    (False, "<think>\nHm, 1 < 2\n</think>\n\nYes.", "Hm, 1 < 2", "Yes."),
    (True, "Hm\n\nwell</think>No </think>.", "Hm\n\nwell", "No </think>."),
    (False, "  Yes <think>", "", "  Yes <think>"),
    (False, "<thin", "", "<thin"),
    (False, " <think>cut </th", "cut </th", ""),
    (True, "cut\n", "cut", ""),
    (False, "<think>\n\n</think>\n\nOk", "", "Ok"),
]


@pytest.mark.parametrize(("opened", "text", "thought", "answer"), THOUGHTS)
def test_reasoning_is_separated_wherever_the_text_is_split(
    opened: bool, text: str, thought: str, answer: str
) -> None:
    for pieces in ([text], list(text), *([text[:cut], text[cut:]] for cut in range(1, len(text)))):
        split = ReasoningParser(opened)
        parts = [split.push(piece) for piece in pieces] + [split.flush()]
        assert ("".join(p[0] for p in parts), "".join(p[1] for p in parts)) == (thought, answer)


def test_reasoning_is_separated_with_or_without_its_opening_tag() -> None:
    assert split_whole("<think>a</think>b") == ("a", "b")
    assert split_whole("a</think>\n\nb") == ("a", "b")
    assert split_whole("b") == ("", "b")


def read(text: str) -> dict[str, str] | None:
    reader, values = JsonReader(), {}
    for at, character in enumerate(text):
        try:
            reader.feed(character)
        except ValueError:
            return None
        if reader.in_value:
            values[reader.key] = values.get(reader.key, "") + character
        if reader.done:
            return values if not text[at + 1 :].strip() else None
    return None


def test_the_json_reader_agrees_with_the_json_module() -> None:
    draw = random.Random(5)

    def value(depth: int = 0) -> object:
        kind = draw.randrange(5 if depth > 3 else 7)
        if kind < 5:
            return draw.choice([True, None, -3.5, 1e30, 0, 12, "a", '"q"', "é\n", "{}[],:", "\\"])
        if kind == 5:
            return [value(depth + 1) for _ in range(draw.randrange(4))]
        return {f"{draw.choice('ab')}{i}": value(depth + 1) for i in range(draw.randrange(4))}

    for _ in range(1500):
        whole = {f'k"{i}': value() for i in range(draw.randrange(4))}
        text = json.dumps(whole, indent=draw.choice([None, 1]), ensure_ascii=draw.random() < 0.5)
        values = read(text)
        assert values is not None
        assert {json.loads(key): json.loads(part) for key, part in values.items()} == whole
        at = draw.randrange(len(text))
        broken = text[:at] + draw.choice('{}[]",:a1\\ ') + text[at + 1 :]
        try:
            is_json = isinstance(json.loads(broken), dict | list)
        except ValueError:
            is_json = False
        assert (read(broken) is not None) == is_json


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('<tool_call>{"name": "add", "arguments": {', "", [["add", "{"]]),
        ('<tool_call>{"name": "add", "arguments": {"a": 1', "", [["add", '{"a": 1']]),
        ('<tool_call>{"na', '<tool_call>{"na', []),
    ],
)
def test_a_call_that_is_cut_stays_a_call_once_its_name_is_known(
    text: str, content: str, calls: list[list[str]]
):
    for size in (1, 3, len(text)):
        assert run(HERMES, *(text[at : at + size] for at in range(0, len(text), size))) == (content, calls)


def test_several_calls_may_stand_between_two_tags():
    one, two = '{"name": "add", "arguments": {"a": 1}}', '{"name": "weather", "arguments": {}}'
    for text in (f"<tool_call>{one}\n{two}</tool_call>", f"<tool_call>{one}{two}\n</tool_call>"):
        assert run(HERMES, *text) == ("", [["add", '{"a": 1}'], ["weather", "{}"]])


@pytest.mark.parametrize(
    ("cut", "whole"),
    [
        ("{", "{}"),
        ('{"a": 12', "{}"),
        ('{"a": 12,', '{"a": 12}'),
        ('{"a": "x, y', "{}"),
        ('{"a": "x", "b": [1, {"c": 2}, 3', '{"a": "x", "b": [1, {"c": 2}]}'),
        ('{"a": {"b": tr', '{"a": {}}'),
    ],
)
def test_cut_arguments_keep_their_whole_members(cut: str, whole: str):
    assert closed(cut) == whole


@pytest.mark.parametrize("text", ["", " ", "\n", "{}"])
def test_blank_arguments_are_none(text: str):
    assert whole_members(text) == {}


@pytest.mark.parametrize("text", ["", "abc", "[1", '{"a": 1}x', "{,"])
def test_what_never_was_an_object_is_not_closed(text: str):
    with pytest.raises(ValueError):
        closed(text)
