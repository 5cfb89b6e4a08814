"""`/v1/responses`, used through the unchanged `openai` client on a real server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from msgspec import structs
from pydantic import BaseModel

from stretto.config import ServeConfig
from stretto.errors import UnknownResponse
from stretto.protocol.responses import ResponseEvent
from stretto.server.adapters.response_events import ItemKind, OpenItem, around_delta, framed
from stretto.server.adapters.response_store import KeptResponse, ResponseStore
from stretto.text.tokenizer import TextModel
from stretto.types import Reason
from tests.server.conftest import CHAT
from tests.server.fake_engine import FakeEngine, build

URL = "/v1/responses"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {"type": "function", "name": "weather", "parameters": SCHEMA}
CALL = 'One moment. <tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>'
SetAnswer = Callable[[str], list[int]]


class Point(BaseModel):
    x: int
    y: int


@pytest.fixture
def config() -> ServeConfig:
    return ServeConfig(port=0, response_store=2**16)


async def prompt_of(client: httpx.AsyncClient, engine: FakeEngine, chat: dict[str, Any]) -> tuple[int, ...]:
    await client.post(CHAT, json=chat)
    return engine.requests.pop().prompt


async def test_a_text_is_answered(ai: Any, set_answer: SetAnswer) -> None:
    ids = set_answer("Grüße 世界 😀")
    answer = await ai.responses.create(
        model="tiny", input="Hi", instructions="Be brief.", metadata={"a": "b"}, store=False, temperature=0.5
    )
    assert answer.output_text == "Grüße 世界 😀"
    assert (answer.status, answer.store, answer.metadata) == ("completed", False, {"a": "b"})
    assert (answer.instructions, answer.temperature) == ("Be brief.", 0.5)
    assert answer.usage is not None
    assert answer.usage.output_tokens == len(ids)
    assert answer.usage.total_tokens == answer.usage.input_tokens + len(ids)
    assert answer.usage.input_tokens_details.cached_tokens == 3


async def test_items_become_the_prompt_of_the_same_chat(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    call = {"name": "weather", "arguments": '{"city": "Köln"}'}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Rain?",
            "tool_calls": [{"id": "c1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "user", "content": "Thanks"},
    ]
    function = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    wanted = await prompt_of(client, engine, {"messages": messages, "tools": [function]})
    items: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Rain?"}],
        },
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "status": "completed", **call},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "message", "role": "user", "content": "Thanks"},
    ]
    body = {"input": items, "instructions": "Be brief.", "tools": [WEATHER]}
    assert (await client.post(URL, json=body)).status_code == 200
    assert engine.requests[-1].prompt == wanted


async def test_a_stream_has_the_typed_events_in_order(ai: Any, set_answer: SetAnswer) -> None:
    set_answer(CALL)
    stream = await ai.responses.create(model="tiny", input="Hi", tools=[WEATHER], stream=True)
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    once = [kind for at, kind in enumerate(kinds) if kinds[at - 1 : at] != [kind]]
    assert once == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
        *("output_item.done", "completed"),
    ]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    final = events[-1]
    assert final.type == "response.completed"
    message, call = final.response.output
    assert message.type == "message"
    assert call.type == "function_call"
    assert "".join(deltas) == call.arguments == '{"city": "Köln"}'
    assert final.response.output_text.strip() == "One moment."
    indexes = [event.output_index for event in events if event.type == "response.output_item.done"]
    assert indexes == [0, 1]


@pytest.mark.parametrize("kind", ["message", "reasoning", "function_call"])
def test_the_fast_way_to_write_a_delta_equals_the_plain_one(kind: ItemKind) -> None:
    def event(number: int, text: str) -> ResponseEvent:
        return ResponseEvent(
            type=f"response.{kind}.delta",
            sequence_number=number,
            item_id="i",
            output_index=2,
            delta=text,
            logprobs=[],
        )

    opened = OpenItem(kind, "i", around=around_delta(event(0, "")))
    for number, text in ((0, ""), (7, 'Grüße "世界"\n'), (10**6, '"delta":""')):
        assert opened.delta(number, text) == framed(event(number, text))


@pytest.mark.parametrize("strict", [None, True])
async def test_stream_and_whole_answer_have_the_same_items(
    ai: Any, client: httpx.AsyncClient, set_answer: SetAnswer, strict: bool | None
) -> None:
    set_answer(f"<think>Rain?</think>{CALL}")
    body: dict[str, Any] = {"model": "tiny", "input": "Hi", "tools": [WEATHER | {"strict": strict}]}
    whole = (await client.post(URL, json=body)).json()
    async with ai.responses.stream(**body) as events:
        async for _ in events:
            pass
        final = await events.get_final_response()
    streamed = json.loads(final.model_dump_json())

    def shape(answer: dict[str, Any]) -> list[Any]:
        return [
            (
                item["type"],
                item["status"],
                item.get("arguments"),
                [p["text"] for p in item.get("content", [])],
            )
            for item in answer["output"]
        ]

    assert shape(whole) == shape(streamed)
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call"]
    tokens = whole["usage"]["output_tokens_details"]["reasoning_tokens"]
    assert 0 < tokens < whole["usage"]["output_tokens"]


async def test_an_answer_comes_back_as_history(
    ai: Any, set_answer: SetAnswer, engine: FakeEngine, text: TextModel
) -> None:
    set_answer(CALL)
    first = await ai.responses.create(model="tiny", input="Hi", tools=[WEATHER])
    history: list[Any] = [{"role": "user", "content": "Hi"}]
    history += [item.model_dump() for item in first.output]
    history.append({"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "rain"})
    set_answer("Rain.")
    second = await ai.responses.create(model="tiny", input=history, tools=[WEATHER])
    assert second.output_text == "Rain."
    prompt = text.decode(list(engine.requests[-1].prompt))
    assert prompt.index("One moment.") < prompt.index('"Köln"') < prompt.index("rain")


async def test_the_client_parses_answers_and_calls_into_types(
    ai: Any, set_answer: SetAnswer, engine: FakeEngine
) -> None:
    set_answer('{"x": 1, "y": -2}')
    answer = await ai.responses.parse(model="tiny", input="Hi", text_format=Point)
    assert answer.output_parsed == Point(x=1, y=-2)
    grammar = engine.requests[-1].sampling.grammar
    assert grammar is not None
    assert grammar.kind == "json_schema"
    async with ai.responses.stream(model="tiny", input="Hi", text_format=Point) as events:
        async for _ in events:
            pass
        assert (await events.get_final_response()).output_parsed == Point(x=1, y=-2)
    await ai.responses.create(model="tiny", input="Hi", text={"format": {"type": "json_object"}})
    grammar = engine.requests[-1].sampling.grammar
    assert grammar is not None
    assert grammar.kind == "json_object"
    set_answer('{"city": "Bonn"}')
    named = {"type": "function", "name": "weather"}
    strict = WEATHER | {"strict": True}
    answer = await ai.responses.create(model="tiny", input="Hi", tools=[strict], tool_choice=named)
    (call,) = answer.output
    assert call.type == "function_call"
    assert (call.name, call.arguments, call.status) == ("weather", '{"city": "Bonn"}', "completed")


async def test_what_a_schema_asks_in_vain_is_named(client: httpx.AsyncClient, set_answer: SetAnswer) -> None:
    set_answer('{"city": "Bonn"}')
    form = {"type": "json_schema", "name": "n", "schema": SCHEMA | {"not": {"required": ["x"]}}}
    answer = (await client.post(URL, json={"input": "Hi", "text": {"format": form}})).json()
    assert answer["stretto"]["schema_relaxed"] == ["$.text.format.schema.not"]
    tool = WEATHER | {"parameters": form["schema"]}
    body = {"input": "Hi", "tools": [tool], "tool_choice": "required"}
    answer = (await client.post(URL, json=body)).json()
    assert answer["stretto"]["schema_relaxed"] == ["$.tools[0].parameters.not"]


async def test_a_cut_answer_is_incomplete(ai: Any, set_answer: SetAnswer, engine: FakeEngine) -> None:
    set_answer(CALL)
    answer = await ai.responses.create(model="tiny", input="Hi", max_output_tokens=2)
    assert (answer.status, answer.output[0].status) == ("incomplete", "incomplete")
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    stream = await ai.responses.create(model="tiny", input="Hi", max_output_tokens=2, stream=True)
    assert [event.type async for event in stream][-1] == "response.incomplete"
    engine.script = lambda request: [300, Reason.DEADLINE]
    answer = await ai.responses.create(model="tiny", input="Hi")
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "deadline"


async def test_text_that_is_no_call_in_the_end_is_content(
    client: httpx.AsyncClient, set_answer: SetAnswer
) -> None:
    wrong = '<tool_call>{"name": "weather", "arguments": {"city": nonsense</tool_call>'
    set_answer(wrong)
    body = {"input": "Hi", "tools": [WEATHER]}
    whole = (await client.post(URL, json=body)).json()
    assert [item["type"] for item in whole["output"]] == ["message"]
    assert whole["output"][0]["content"][0]["text"] == wrong


async def test_a_stream_that_fails_ends_in_a_typed_event(ai: Any, engine: FakeEngine) -> None:
    engine.script = lambda request: [300, Reason.ERROR]
    stream = await ai.responses.create(model="tiny", input="Hi", stream=True)
    last = [event async for event in stream][-1]
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert "caught fire" in last.response.error.message
    with pytest.raises(openai.InternalServerError, match="caught fire"):
        await ai.responses.create(model="tiny", input="Hi")


async def test_a_kept_answer_goes_on_for_its_tenant_alone(
    ai: Any, set_answer: SetAnswer, engine: FakeEngine, text: TextModel
) -> None:
    set_answer("Seven.")
    first = await ai.responses.create(model="tiny", input="A number?", instructions="Be brief.")
    assert first.store is True
    assert (await ai.responses.retrieve(first.id)).output_text == "Seven."
    with pytest.raises(openai.BadRequestError, match="no events any more"):
        await ai.responses.retrieve(first.id, stream=True)
    second = await ai.responses.create(model="tiny", input="And?", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    prompt = text.decode(list(engine.requests[-1].prompt))
    assert prompt.index("A number?") < prompt.index("Seven.") < prompt.index("And?")
    assert "Be brief." not in prompt
    await ai.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="dropped, or never was"):
        await ai.responses.retrieve(first.id)
    unkept = await ai.responses.create(model="tiny", input="A number?", store=False)
    with pytest.raises(openai.NotFoundError) as gone:
        await ai.responses.create(model="tiny", input="And?", previous_response_id=unkept.id)
    assert (gone.value.param, gone.value.code) == ("$.previous_response_id", "previous_response_not_found")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "$.input"),
        ({"input": []}, "$.input"),
        ({"input": "Hi", "max_output_tokens": 0}, "$.max_output_tokens"),
        ({"input": "Hi", "colour": 1}, "$.colour"),
        ({"input": "Hi", "tools": [{"type": "web_search"}]}, "$.tools[0].type"),
        ({"input": "Hi", "tools": [WEATHER | {"parameters": {"type": "array"}}], "tool_choice": "required"},
         "$.tools[0].parameters"),
        ({"input": "Hi", "tool_choice": "required"}, "$.tool_choice"),
        ({"input": "Hi", "tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}},
         "$.tool_choice.name"),
        ({"input": "Hi", "truncation": "auto"}, "$.truncation"),
        ({"input": "Hi", "background": True}, "$.background"),
        ({"input": "Hi", "reasoning": {"effort": "most"}}, "$.reasoning.effort"),
        ({"input": "Hi", "text": {"format": {"type": "json_schema", "name": "n", "strict": True,
                                             "schema": {"not": {"type": "object"}}}}},
         "$.text.format.schema"),
        ({"input": [{"type": "item_reference"}]}, "$.input[0].id"),
        ({"input": [{"type": "web_search_call", "id": "w"}]}, "$.input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "$.input[0].content[0].type"),
        ({"input": [{"role": "user"}]}, "$.input[0].content"),
        ({"input": [{"content": "x"}]}, "$.input[0].role"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "$.input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "$.input[0].output"),
        ({"input": [{"role": "user", "content": "x"},
                    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "[]"}]},
         "$.input[1].arguments"),
        ({"input": "x " * 3000}, "$.input"),
        ({"input": "Hi", "model": "gpt-7"}, "$.model"),
        ({"input": "Hi", "previous_response_id": "resp_0"}, "$.previous_response_id"),
    ],
)  # fmt: skip
async def test_an_error_names_the_field_that_the_client_sent(
    client: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    response = await client.post(URL, json=body)
    assert response.status_code == (404 if param in ("$.model", "$.previous_response_id") else 400)
    error = response.json()["error"]
    assert error["param"].startswith(param)
    for word in ("$.messages", "response_format", "function.", "max_completion", "max_tokens"):
        assert word not in error["message"]


async def test_what_means_nothing_is_accepted(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    plain = {"input": "Hi"}
    nothing: dict[str, Any] = {
        name: None for name in ("store", "previous_response_id", "conversation", "prompt")
    }
    nothing |= {"truncation": "disabled", "background": False, "service_tier": "auto", "stream": False}
    nothing |= {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "top_logprobs": 0}
    nothing |= {"text": {"format": {"type": "text"}, "verbosity": "medium"}, "max_output_tokens": 40.0}
    nothing |= {"reasoning": {"effort": "none", "summary": "auto"}, "prompt_cache_retention": "24h"}
    nothing |= {"include": ["reasoning.encrypted_content"], "stream_options": {"include_obfuscation": False}}
    assert (await client.post(URL, json=plain)).status_code == 200
    response = await client.post(URL, json=plain | nothing)
    assert response.status_code == 200, response.text
    first, second = engine.requests
    off = await client.post(
        CHAT, json={"messages": [{"role": "user", "content": "Hi"}], "reasoning_effort": "none"}
    )
    assert off.status_code == 200
    assert second.prompt == engine.requests[-1].prompt
    assert structs.replace(second.sampling, max_tokens=None) == first.sampling


async def test_null_in_the_history_is_nothing(client: httpx.AsyncClient) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": None, "status": None}
    result = {"type": "function_call_output", "call_id": "c", "output": "rain"}
    asked = {"role": "user", "content": "Hi"}
    history = [asked, call, result, {"role": "assistant", "content": None}, asked]
    response = await client.post(URL, json={"input": history, "unheard_of": None})
    assert response.status_code == 200, response.text


async def test_a_kept_answer_is_unknown_to_other_tenants(checkpoint: Path, engine: FakeEngine) -> None:
    config = ServeConfig(port=0, response_store=2**16, api_keys={"key-1": "ann", "key-2": "bob"})
    transport = httpx.ASGITransport(build(config, engine, {"tiny": checkpoint}))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        ann, bob = {"x-api-key": "key-1"}, {"x-api-key": "key-2"}
        kept = (await client.post(URL, json={"input": "Hi"}, headers=ann)).json()
        assert kept["store"] is True
        where = f"{URL}/{kept['id']}"
        assert (await client.get(where, headers=ann)).json() == kept
        assert (await client.get(where, headers=bob)).status_code == 404
        assert (await client.delete(where, headers=bob)).status_code == 404
        body = {"input": "And?", "previous_response_id": kept["id"]}
        assert (await client.post(URL, json=body, headers=bob)).status_code == 404
        assert (await client.post(URL, json=body, headers=ann)).status_code == 200
        assert (await client.delete(where, headers=ann)).json()["deleted"] is True
        assert (await client.get(where, headers=ann)).status_code == 404


async def test_without_a_store_nothing_is_kept(checkpoint: Path, engine: FakeEngine) -> None:
    transport = httpx.ASGITransport(build(ServeConfig(port=0), engine, {"tiny": checkpoint}))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = (await client.post(URL, json={"input": "Hi", "store": True})).json()
        assert answer["store"] is False
        gone = await client.post(URL, json={"input": "Hi", "previous_response_id": answer["id"]})
        assert gone.status_code == 404
        assert "response_store is off" in gone.json()["error"]["message"]


def test_the_store_drops_the_oldest_answers() -> None:
    store = ResponseStore(10)
    for id in "abc":
        store.put(id, KeptResponse("ann", b"1234", b""))
    with pytest.raises(UnknownResponse):
        store.get("a", "ann", "$")
    assert store.get("b", "ann", "$") == store.get("c", "ann", "$")
    store.put("long", KeptResponse("ann", b"x" * 11, b""))
    for id in ("b", "c", "long"):
        with pytest.raises(UnknownResponse):
            store.get(id, "ann", "$")
    store.put("d", KeptResponse("ann", b"1234", b"123456"))
    assert store.get("d", "ann", "$").answer == b"1234"


async def test_a_reference_stands_for_an_item_of_a_kept_answer(
    client: httpx.AsyncClient, engine: FakeEngine, set_answer: SetAnswer, text: TextModel
) -> None:
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
    set_answer(f"<think>hm</think>Let me see.{call}")
    first = (await client.post(URL, json={"input": "Hi", "tools": [WEATHER]})).json()
    thought, said, called = first["output"]
    set_answer("Rain")
    # As the AI SDK sends it, and as OpenAI's own types allow it: without a type.
    back = [{"type": "item_reference", "id": thought["id"]}, {"id": said["id"]}]
    back.append({"type": "item_reference", "id": called["id"]})
    output = {"type": "function_call_output", "call_id": called["call_id"], "output": "rain"}
    body = {"input": [{"role": "user", "content": "Hi"}, *back, output], "tools": [WEATHER]}
    second = await client.post(URL, json=body)
    assert second.status_code == 200, second.text
    referred = engine.requests[-1].prompt
    whole = body | {"input": [{"role": "user", "content": "Hi"}, *first["output"], output]}
    await client.post(URL, json=whole)
    assert engine.requests[-1].prompt == referred
    assert (await client.delete(f"{URL}/{first['id']}")).status_code == 200
    gone = await client.post(URL, json=body)
    assert gone.status_code == 404 and gone.json()["error"]["param"] == "$.input[1].id"
    assert "send the whole item" in gone.json()["error"]["message"]


def test_items_go_with_their_answer_and_belong_to_a_tenant() -> None:
    store = ResponseStore(100)
    store.put("a", KeptResponse("ann", b"x" * 30, b"", ("i", "j")))
    assert store.holding("i", "ann", "$.input[0].id").answer == b"x" * 30
    with pytest.raises(UnknownResponse, match="dropped, or never was"):
        store.holding("i", "bob", "$.input[0].id")
    store.put("b", KeptResponse("ann", b"x" * 80, b"", ("k",)))
    with pytest.raises(UnknownResponse):
        store.holding("i", "ann", "$.input[0].id")
    assert store.holding("k", "ann", "$.input[0].id")
    with pytest.raises(UnknownResponse, match="response_store is off"):
        ResponseStore(0).holding("k", "ann", "$.input[0].id")
