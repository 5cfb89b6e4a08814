"""What clients of other servers send: accepted where it changes no answer, refused by name where it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec import json

from stretto.errors import InvalidRequest, UnsupportedField
from stretto.protocol.anthropic import HISTORY, MessagesRequest
from stretto.protocol.compatibility import ANY, NOTHING, reference
from stretto.protocol.compatibility import CHAT as OF_CHATS
from stretto.protocol.openai import AssistantMessage, ChatRequest, CompletionRequest
from stretto.protocol.parsing import as_it_is, parse
from stretto.protocol.vllm import TokenizeRequest

CHAT = json.Decoder(ChatRequest)
USER: dict[str, Any] = {"role": "user", "content": "Hi"}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f.g", "parameters": {"type": "object"}}}


def chat(**fields: Any) -> ChatRequest:
    return parse(CHAT, json.encode({"messages": [USER]} | fields))


@pytest.mark.parametrize("name", OF_CHATS)
def test_what_means_nothing_in_a_chat_is_left_to_other_requests(name: str):
    for value in OF_CHATS[name].values:
        assert chat(**{name: value, "unknown": None}) == chat()
    for other in (CompletionRequest, TokenizeRequest):
        body = json.encode({"prompt": "a", "add_special_tokens": False, "unknown": None})
        assert parse(json.Decoder(other), body).add_special_tokens is False


@pytest.mark.parametrize("name", sorted(NOTHING.keys() - set(ChatRequest.__struct_fields__)))
def test_a_field_that_means_nothing_is_accepted_and_any_other_value_refused_by_name(name: str):
    assert chat(**{name: None}) == chat()
    for value in NOTHING[name].values:
        assert chat(**{name: True if value is ANY else value}) == chat()
    if ANY not in NOTHING[name].values:
        with pytest.raises(InvalidRequest) as caught:
            chat(**{name: "something else"})
        assert (caught.value.param or "").startswith(f"$.{name}")


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ({"max_tokens": 40.0, "seed": 7.0, "n": 1.0}, {"max_tokens": 40, "seed": 7, "n": 1}),
        ({"n_predict": 9}, {"max_tokens": 9}),
        ({"n_predict": -1}, {}),
        ({"max_tokens": -1, "max_completion_tokens": -1.0}, {}),
        ({"repeat_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"guided_json": {"type": "object"}}, {"structured_outputs": {"json": {"type": "object"}}}),
        ({"guided_regex": "a+"}, {"structured_outputs": {"regex": "a+"}}),
        ({"guided_choice": ["a", "b"]}, {"structured_outputs": {"choice": ["a", "b"]}}),
        ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}),
        (
            {"response_format": {"type": "json_object", "schema": {"type": "object"}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "schema", "schema": {"type": "object"}},
                }
            },
        ),
        (
            {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": True}},
            {"stream": True, "stream_options": {"include_usage": True}},
        ),
        ({"tools": [TOOL | {"cache_control": {"type": "ephemeral"}}]}, {"tools": [TOOL]}),
    ],
)
def test_other_spellings_mean_the_same(sent: dict[str, Any], meant: dict[str, Any]):
    assert chat(**sent) == chat(**meant)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 40.5},
        {"length_penalty": 2},
        {"priority": 1},
        {"use_beam_search": True},
        {"mirostat": 2},
        {"skip_special_tokens": False},
        {"guided_grammar": "root ::= x"},
        {"max_tokens": 1, "n_predict": 2},
        {"best_answer": True},
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(fields: dict[str, Any]):
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.param in {f"$.{name}" for name in fields}


def test_stream_options_without_a_stream_mean_nothing_but_are_still_checked():
    options = chat(stream_options={"include_usage": True, "include_obfuscation": False}).stream_options
    assert options is not None and options.include_usage
    with pytest.raises(InvalidRequest) as caught:
        chat(stream_options={"include_usage": "P"}, cache_control={})
    assert caught.value.param == "$.stream_options.include_usage"


def test_unknown_members_of_the_history_are_data_for_the_template():
    answer = {
        "role": "assistant",
        "content": None,
        "id": "msg_1",
        "timestamp": 12,
        "parsed": None,
        "reasoning": "hm",
        "reasoning_details": [{"type": "text"}],
        "thinking_blocks": [],
        "provider_specific_fields": {"a": 1},
        "annotations": [{"type": "url"}],
        "tool_calls": [
            {
                "id": "c",
                "type": "function",
                "index": 0,
                "function": {"name": "f", "arguments": "{}", "parsed_arguments": None},
                "provider_specific_fields": None,
            }
        ],
    }
    parts = [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]
    request = chat(messages=[{"role": "user", "content": parts, "id": "u"}, answer, USER])
    first, second, _ = request.messages
    assert first.extra == {"id": "u"} and first.content != "Hi"
    assert isinstance(second, AssistantMessage)
    assert second.reasoning_content == "hm"
    assert second.extra is not None and second.extra["provider_specific_fields"] == {"a": 1}
    assert "parsed" not in second.extra and "annotations" in second.extra
    assert second.tool_calls is not None and second.tool_calls[0].function.name == "f"


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "$.messages[0].content"),
        ({"role": "wizard", "content": "x"}, "$.messages[0]"),
        ({"role": "user", "content": 3, "id": "x"}, "$.messages[0].content"),
    ],
)
def test_messages_that_the_model_cannot_read_are_still_refused(message: dict[str, Any], path: str):
    with pytest.raises(InvalidRequest) as caught:
        chat(messages=[message])
    assert (caught.value.param or "").startswith(path)


def test_completions_take_the_same_fields():
    sent = (
        b'{"prompt": "a", "add_generation_prompt": true, "max_tokens": 4.0, "continue_final_message": false}'
    )
    assert parse(json.Decoder(CompletionRequest), sent).max_tokens == 4
    with pytest.raises(UnsupportedField):
        parse(json.Decoder(CompletionRequest), b'{"prompt": "a", "suffix": "b"}')


def test_the_documented_table_is_the_one_in_the_code():
    page = Path(__file__).parents[2] / "docs" / "compatibility.md"
    assert reference() in page.read_text(), f"replace the table in {page}"


def test_a_wrong_field_before_a_byte_that_is_no_text_is_named():
    with pytest.raises(InvalidRequest) as caught:
        parse(CHAT, b'{"messages": 3, "us\xff": 1}')
    assert caught.value.param == "$.messages"


@pytest.mark.parametrize("extra", [-4078, {"a": 1}, "x"])
def test_a_member_called_extra_is_data_like_any_other(extra: object):
    request = chat(
        messages=[{"role": "system", "content": "s", "extra": extra, "tool_calls": [], "id": 1}, USER]
    )
    assert request.messages[0].extra == {"extra": extra, "tool_calls": [], "id": 1}


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ({"unheard_of": None}, {}),
        (
            {"max_tokens": None, "min_tokens": 2.0, "prompt_logprobs": 3.0},
            {"min_tokens": 2, "prompt_logprobs": 3},
        ),
        ({"tools": [TOOL | {"x": None}]}, {"tools": [TOOL]}),
        (
            {"response_format": {"type": "json_object", "schema": None}},
            {"response_format": {"type": "json_object"}},
        ),
        ({"objective": {"ttft_ms": 5, "x": None}}, {"objective": {"ttft_ms": 5}}),
        ({"stop_token_ids": [1.0, 2]}, {"stop_token_ids": [1, 2]}),
    ],
)
def test_a_null_and_a_whole_number_are_read_at_each_level(sent: dict[str, Any], meant: dict[str, Any]):
    assert chat(**sent) == chat(**meant)


def test_null_in_a_schema_or_in_free_data_is_a_value():
    schema = {"type": "object", "properties": {"a": {"const": None, "default": 1.0}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    request = chat(tools=[tool], chat_template_kwargs={"a": None}, unheard_of=None)
    assert request.tools and request.tools[0].function.parameters == schema
    assert request.chat_template_kwargs == {"a": None}


NO_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"arguments": None}, ""),
    ({}, ""),
    ({"arguments": {"a": None}}, '{"a":null}'),
]


@pytest.mark.parametrize(("arguments", "read"), NO_ARGUMENTS)
def test_arguments_of_an_earlier_call_may_be_null_missing_or_an_object(arguments: dict[str, Any], read: str):
    call = {"id": "c", "type": None, "function": {"name": "f", **arguments}}
    result = {"role": "tool", "tool_call_id": "c", "content": None}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    _, found, said, _ = chat(messages=[USER, answer, result, USER]).messages
    assert isinstance(found, AssistantMessage) and found.tool_calls
    assert found.tool_calls[0].function.arguments == read
    assert said.content == ""


HISTORIES: list[tuple[str, dict[str, Any]]] = [
    ("tool_use", {"id": "t", "name": "f", "input": None, "x": 1}),
    ("tool_use", {"id": "t", "name": "f"}),
    ("thinking", {"thinking": "hm", "signature": None, "x": {"a": 1}}),
    ("text", {"text": "a", "citations": None, "x": []}),
]


@pytest.mark.parametrize(("kind", "members"), HISTORIES)
def test_blocks_of_anthropics_history_may_say_more(kind: str, members: dict[str, Any]):
    answer = {"role": "assistant", "content": [{"type": kind, **members}], "id": "msg_1", "usage": {"a": 1}}
    silent = {"role": "assistant", "content": None}
    body = {"messages": [USER, answer, USER, silent, USER], "max_tokens": 4.0, "top_k": 5.0, "betas": None}
    request = parse(json.Decoder(MessagesRequest), json.encode(body), as_it_is, HISTORY)
    assert (request.max_tokens, request.top_k, len(request.messages)) == (4, 5, 5)


UNKNOWN: list[dict[str, Any]] = [{"betas": 1}, {"tools": [{"name": "f", "input_schema": {}, "x": 1}]}]


@pytest.mark.parametrize("more", UNKNOWN)
def test_an_unknown_field_beside_anthropics_history_is_still_named(more: dict[str, Any]):
    body = {"messages": [USER], "max_tokens": 4, **more}
    with pytest.raises(UnsupportedField, match=r"\$\.(betas|tools\[0\]\.x)"):
        parse(json.Decoder(MessagesRequest), json.encode(body), as_it_is, HISTORY)
