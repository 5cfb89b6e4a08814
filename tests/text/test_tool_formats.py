"""The chat template decides how a model's tool calls are read."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from stretto.errors import UnsupportedField
from stretto.protocol.openai import ChatRequest
from stretto.text.messages import calls
from stretto.text.tokenizer import TextModel
from stretto.text.tools import markers
from stretto.text.tools.harmony_parser import HarmonyParser
from stretto.text.tools.parser import ToolParser
from stretto.text.tools.tag_parser import TagParser
from tests.server.checkpoint import CHATML, byte_level, write

TOOL = {"type": "function", "function": {"name": "ping", "parameters": {"type": "object"}}}
WRITTEN = {
    "<tool_call>": '<tool_call>{"name": "ping", "arguments": {}}</tool_call>',
    "<function=": "<tool_call><function=ping></function></tool_call>",
    "<arg_key>": "<tool_call>ping</tool_call>",
    "<｜tool▁call▁begin｜>": "<｜tool▁call▁begin｜>ping<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
    "<start_function_call>": "<start_function_call>call:ping{}<end_function_call>",
    "<|tool_call>": "<|tool_call>call:ping{}<tool_call|>",
    "<|channel|><|message|>": "<|channel|>commentary to=functions.ping<|message|>{}<|call|>",
}


def model(folder: Path, mentioned: str) -> TextModel:
    template = CHATML + "{% if tools %}{% set example = '" + mentioned + "' %}{% endif %}"
    return TextModel(write(folder, byte_level(), template, eos="<|stop|>"))


def request(**fields: object) -> ChatRequest:
    body = {"messages": [{"role": "user", "content": "a"}], "tools": [TOOL]} | fields
    return msgspec.convert(body, ChatRequest)


@pytest.mark.parametrize("mentioned", WRITTEN)
def test_each_family_gets_its_parser(mentioned: str, tmp_path: Path):
    found = calls(request(), model(tmp_path, mentioned))
    assert found.parser is not None
    parser = found.parser()
    assert isinstance(parser, ToolParser | TagParser | HarmonyParser)
    parser.push(WRITTEN[mentioned])
    parser.flush()
    assert parser.calls == 1
    openers = [each for each in markers.VISIBLE if each in WRITTEN[mentioned]]
    assert openers  # so the detokenizer shows them, even if they are special tokens


def test_harmony_is_read_without_tools_too(tmp_path: Path):
    found = calls(request(tools=[]), model(tmp_path, "<|channel|><|message|>"))
    assert found.parser is not None and isinstance(found.parser(), HarmonyParser)


def test_strict_is_refused_where_the_tokenizer_lacks_the_tokens_of_the_format(tmp_path: Path):
    strict = {"type": "function", "function": TOOL["function"] | {"strict": True}}
    with pytest.raises(UnsupportedField, match=r"\$\.tools.*strict.*required"):
        calls(request(tools=[strict]), model(tmp_path, "<|channel|><|message|>"))


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"properties": {"a b ": {}}}, "the name 'a b '"),
        ({"properties": {"a": {"enum": ["</tool_call>"]}}}, "a value that nothing satisfies"),
        ({"patternProperties": {"^a": {}}}, "patternProperties"),
        ({"minProperties": 2, "properties": {"a": {}, "b": {}}}, "minProperties"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "which is not there"),
        ({"properties": {"a": {"type": "string", "pattern": "("}}}, "no regular expression"),
    ],
)
def test_a_schema_that_tags_cannot_be_held_to_is_refused_by_name(
    parameters: dict[str, object], named: str, tmp_path: Path
):
    function = {"name": "f", "strict": True, "parameters": {"type": "object"} | parameters}
    with pytest.raises(UnsupportedField) as refused:
        calls(request(tools=[TOOL, {"type": "function", "function": function}]), model(tmp_path, "<arg_key>"))
    assert refused.value.param == "$.tools[1].function.parameters"
    assert named in str(refused.value) and "`required`" in str(refused.value)
