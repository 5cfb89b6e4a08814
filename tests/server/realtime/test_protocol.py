"""The protocol of OpenAI's realtime API for text: events, items, responses and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from openai import AsyncOpenAI

from stretto.errors import EngineDied
from stretto.text.tokenizer import TextModel
from stretto.types import Reason
from tests.server.conftest import Served
from tests.server.fake_engine import FakeEngine
from tests.server.realtime.conftest import Opener, Talk, answers, settled

SetAnswer = Callable[[str], list[int]]
WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ORDER = [
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
    *["response.output_text.delta"] * 3,
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "conversation.item.done",
    "response.done",
]


def prompt_of(text: TextModel, request: Any) -> str:
    return text.decode(list(request.prompt), special=True)


async def test_the_clients_of_openai_work_unmodified(served: Served, engine: FakeEngine) -> None:
    client = AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none")
    async with client.realtime.connect(model="tiny") as connection:
        await connection.session.update(
            session={"type": "realtime", "output_modalities": ["text"], "instructions": "Be brief."}
        )
        await connection.conversation.item.create(
            item={"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}
        )
        await connection.response.create()
        deltas: list[str] = []
        async for event in connection:
            if event.type == "session.updated":
                assert event.session.instructions == "Be brief."  # type: ignore[union-attr]
            elif event.type == "response.output_text.delta":
                deltas.append(event.delta)
            elif event.type == "response.output_text.done":
                assert event.text == "".join(deltas) == "Hello, world!"
            elif event.type == "response.done":
                response = event.response
                break
        assert (response.status, response.usage and response.usage.output_tokens) == ("completed", 5)
        assert response.output is not None and response.output[0].type == "message"
        await connection.response.cancel()
        error = await connection.recv()
        assert error.type == "error" and error.error.code == "response_cancel_not_active"
    assert [request.tier for request in engine.requests] == ["default"]


async def test_the_events_of_an_answer(talk: Talk, engine: FakeEngine, text: TextModel) -> None:
    engine.script = lambda request: text.encode("abc")
    await talk.say("Hi")
    await talk.until("conversation.item.done")
    start = len(talk.seen)
    await talk.send("response.create")
    response = await talk.answer()
    assert talk.types[start:] == ORDER
    assert len({event["event_id"] for event in talk.seen}) == len(talk.seen)
    mine = [event for event in talk.seen[start:] if "response_id" in event]
    assert {event["response_id"] for event in mine} == {response["id"]}
    assert response["output"][0]["content"] == [{"type": "output_text", "text": "abc"}]
    assert response["usage"]["input_tokens"] == len(engine.requests[0].prompt)
    assert response["usage"]["total_tokens"] == len(engine.requests[0].prompt) + 3
    assert response["usage"]["input_token_details"]["cached_tokens"] == 3
    assert response["stretto"]["variant"] == "tiny"


async def test_a_conversation_goes_on(talk: Talk, engine: FakeEngine, text: TextModel) -> None:
    await talk.send("session.update", session={"type": "realtime", "instructions": "Be kind."})
    await talk.say("First")
    await talk.send("response.create")
    await talk.answer()
    await talk.say("Second")
    await talk.send("response.create")
    await talk.answer()
    prompt = prompt_of(text, engine.requests[-1])
    places = [prompt.index(part) for part in ("Be kind.", "First", "Hello, world!", "Second")]
    assert places == sorted(places)
    assert engine.requests[0].salt == engine.requests[1].salt != ""


async def test_older_clients_get_the_older_names(open_session: Opener) -> None:
    async with open_session(additional_headers={"OpenAI-Beta": "realtime=v1"}) as talk:
        await talk.send("session.update", session={"modalities": ["text"], "max_response_output_tokens": 5})
        session = (await talk.until("session.updated"))["session"]
        assert session["modalities"] == ["text"] and session["max_response_output_tokens"] == 5
        await talk.say("Hi")
        await talk.send("response.create", response={"modalities": ["text"], "max_response_output_tokens": 2})
        response = await talk.answer()
        assert {"response.text.delta", "response.text.done", "conversation.item.created"} <= set(talk.types)
        assert not {each for each in talk.types if "output_text" in each or each == "conversation.item.added"}
        assert response["status_details"] == {"type": "incomplete", "reason": "max_output_tokens"}
        assert response["output"][0]["content"][0]["type"] == "text"


async def test_items_are_added_read_cut_and_deleted(talk: Talk, engine: FakeEngine, text: TextModel) -> None:
    await talk.say("two", id="b")
    await talk.say("one", id="a", role="assistant")
    await talk.send("conversation.item.delete", item_id="a")
    assert (await talk.until("conversation.item.deleted"))["item_id"] == "a"
    item = {
        "id": "a",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": "one more"}],
    }
    await talk.send("conversation.item.create", item=item, previous_item_id="root")
    assert (await talk.until("conversation.item.added"))["previous_item_id"] is None
    await talk.send("conversation.item.truncate", item_id="a", content_index=0, text_end=3)
    await talk.until("conversation.item.truncated")
    await talk.send("conversation.item.retrieve", item_id="a")
    item = (await talk.until("conversation.item.retrieved"))["item"]
    assert item["content"] == [{"type": "output_text", "text": "one"}]
    await talk.send("response.create")
    await talk.answer()
    prompt = prompt_of(text, engine.requests[0])
    assert prompt.index("one") < prompt.index("two") and "more" not in prompt


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"type": "conversation.item.delete", "item_id": "x"}, "no item"),
        ({"type": "conversation.item.retrieve", "item_id": "x"}, "no item"),
        ({"type": "conversation.item.truncate", "item_id": "u", "content_index": 0}, "only an answer"),
        ({"type": "conversation.item.truncate", "item_id": "u", "audio_end_ms": 5}, "audio_end_ms"),
        ({"type": "conversation.item.create", "item": {"type": "message", "role": "user"}}, "content"),
        ({"type": "conversation.item.create", "item": {"type": "item_reference", "id": "u"}}, "$.item.type"),
        (
            {"type": "conversation.item.create", "item": {"id": "u", "role": "user", "content": "a"}},
            "already",
        ),
        (
            {
                "type": "conversation.item.create",
                "previous_item_id": "no",
                "item": {"role": "user", "content": "a"},
            },
            "previous_item_id",
        ),
        (
            {
                "type": "conversation.item.create",
                "item": {"role": "user", "content": [{"type": "input_audio", "audio": "aa"}]},
            },
            "input_audio",
        ),
        ({"type": "input_audio_buffer.append", "audio": "aa"}, "no audio"),
        ({"type": "output_audio_buffer.clear"}, "no audio"),
        (
            {"type": "session.update", "session": {"type": "realtime", "audio": {"output": {}}}},
            "$.session.audio",
        ),
        ({"type": "session.update", "session": {"voice": "marin"}}, "$.session.voice"),
        ({"type": "session.update", "session": {"output_modalities": ["audio"]}}, "audio"),
        ({"type": "session.update", "session": {"turn_detection": {"type": "server_vad"}}}, "turn_detection"),
        ({"type": "session.update", "session": {"model": "other"}}, "open another session"),
        ({"type": "session.update", "session": {"truncation": "auto"}}, "truncation"),
        ({"type": "session.update", "session": {"temperature": 1000}}, "temperature"),
        ({"type": "session.update", "session": {"tool_choice": "required"}}, "tools"),
        ({"type": "session.update", "session": {"chat_template_kwargs": {"nothing": 1}}}, "nothing"),
        ({"type": "session.update"}, "$.session is missing"),
        ({"type": "response.create", "response": {"audio": {}}}, "$.response.audio"),
        (
            {"type": "response.create", "response": {"input": [{"type": "item_reference", "id": "q"}]}},
            "no item",
        ),
        ({"type": "response.cancel"}, "no such response"),
        ({"type": "response.cancel", "response_id": "resp_1"}, "no such response"),
        ({"type": "input_text.commit"}, "no text"),
        ({"type": "input_text.append"}, "$.text is missing"),
        ({"type": "input_text.replace", "start": -1, "text": "a"}, "$.start"),
        ({"type": "what.is.this"}, "$.type"),
        ({}, "type"),
        ([], "$"),
        ("text", "$"),
        (None, "$"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_errors_name_the_event_and_the_field(talk: Talk, event: Any, message: str) -> None:
    await talk.say("u", id="u")
    await talk.until("conversation.item.done")
    if isinstance(event, dict):
        event = {**event, "event_id": "mine"}
    await talk.socket.send(json.dumps(event))
    error = await talk.error()
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["event_id"] == ("mine" if isinstance(event, dict) else None)
    await talk.send("conversation.item.retrieve", item_id="u")
    await talk.until("conversation.item.retrieved")


async def test_a_function_is_called(talk: Talk, engine: FakeEngine, set_answer: SetAnswer) -> None:
    set_answer('<tool_call>\n{"name": "weather", "arguments": {"city": "Graz"}}\n</tool_call>')
    await talk.send("session.update", session={"type": "realtime", "tools": [WEATHER], "tool_choice": "auto"})
    await talk.say("How is it in Graz?")
    await talk.send("response.create")
    response = await talk.answer()
    (call,) = response["output"]
    assert (call["type"], call["name"], call["status"]) == ("function_call", "weather", "completed")
    assert json.loads(call["arguments"]) == {"city": "Graz"}
    deltas = [each["delta"] for each in talk.seen if each["type"] == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call["arguments"]
    done = next(each for each in talk.seen if each["type"] == "response.function_call_arguments.done")
    assert (done["name"], done["call_id"]) == ("weather", call["call_id"])
    set_answer("Sunny.")
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": '{"sky": "blue"}'}
    await talk.send("conversation.item.create", item=output)
    await talk.send("response.create")
    assert (await talk.answer())["output"][0]["content"][0]["text"] == "Sunny."


async def test_objectives_and_tiers_of_session_and_response(talk: Talk, engine: FakeEngine) -> None:
    session = {"type": "realtime", "objective": {"ttft_ms": 900}, "service_tier": "priority"}
    await talk.send("session.update", session=session)
    await talk.say("Hi")
    await talk.send("response.create")
    await talk.answer()
    response = {
        "objective": {"total_ms": 60_000, "on_miss": "late"},
        "service_tier": "flex",
        "max_output_tokens": 4,
    }
    await talk.send("response.create", response=response)
    assert (await talk.answer())["status"] == "incomplete"
    first, second = engine.requests
    assert (first.tier, first.objective.ttft_ms, first.objective.itl_ms) == ("priority", 900, 150)
    assert (second.tier, second.objective.ttft_ms, second.objective.total_ms) == ("flex", None, 60_000)
    assert second.sampling.max_tokens == 4


async def test_a_response_of_its_own_input_stays_outside(
    talk: Talk, engine: FakeEngine, text: TextModel
) -> None:
    await talk.say("the secret word is lemon", id="secret")
    await talk.say("and the number is nine", id="number")
    own = [{"type": "item_reference", "id": "number"}, {"role": "user", "content": "Which number?"}]
    await talk.send(
        "response.create", response={"conversation": "none", "input": own, "metadata": {"k": "v"}}
    )
    response = await talk.answer()
    assert (response["conversation_id"], response["metadata"]) == (None, {"k": "v"})
    prompt = prompt_of(text, engine.requests[0])
    assert "nine" in prompt and "lemon" not in prompt
    await talk.send("response.create")
    await talk.answer()
    assert "Hello" not in prompt_of(text, engine.requests[1])


async def test_one_response_at_a_time_and_cancelling_it(talk: Talk, engine: FakeEngine) -> None:
    engine.script = lambda request: [65, 66, 3600.0]
    await talk.say("Hi")
    await talk.send("response.create")
    delta = await talk.until("response.output_text.delta")
    await talk.send("response.create", event_id="second")
    error = await talk.error()
    assert (error["code"], error["event_id"]) == ("conversation_already_has_active_response", "second")
    await talk.send("response.cancel", response_id=delta["response_id"])
    response = await talk.answer()
    assert response["status_details"] == {"type": "cancelled", "reason": "client_cancelled"}
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["content"][0]["text"] != ""
    await settled(lambda: not engine.open)
    await talk.send("conversation.item.retrieve", item_id=response["output"][0]["id"])
    await talk.until("conversation.item.retrieved")
    engine.script = lambda request: [65]
    await talk.send("response.create")
    assert (await talk.answer())["status"] == "completed"


@pytest.mark.parametrize("script", [[EngineDied("the engine ended")], [65, EngineDied("the engine ended")]])
async def test_an_engine_that_dies_ends_the_response_and_not_the_session(
    talk: Talk, engine: FakeEngine, script: list[Any]
) -> None:
    engine.script = lambda request: list(script)
    await talk.say("Hi")
    await talk.send("response.create", event_id="mine")
    error = await talk.error()
    assert (error["code"], error["event_id"]) == ("engine_died", "mine")
    response = await talk.answer()
    assert response["status"] == "failed"
    assert response["status_details"]["error"]["code"] == "engine_died"
    engine.ready = False
    await talk.send("response.create")
    assert (await talk.answer())["status"] == "failed"
    engine.ready, engine.script = True, lambda request: [65]
    await talk.send("response.create")
    assert (await talk.answer())["status"] == "completed"


async def test_a_failed_sequence_and_a_long_prompt(talk: Talk, engine: FakeEngine) -> None:
    engine.script = lambda request: [65, Reason.ERROR]
    await talk.say("Hi")
    await talk.send("response.create")
    assert (await talk.error())["code"] == "engine_error"
    assert (await talk.answer())["status"] == "failed"
    await talk.say("x" * 600)
    await talk.send("response.create")
    error = await talk.error()
    assert error["code"] == "context_length_exceeded" and "the conversation has" in error["message"]
    assert (await talk.answer())["status"] == "failed"
    assert len(answers(engine)) == 1


async def test_a_schema_holds(talk: Talk, engine: FakeEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"format": {"type": "json_schema", "name": "answer", "schema": schema}}
    await talk.say("Hi")
    await talk.send("response.create", response={"text": form})
    await talk.answer()
    assert json.loads(engine.requests[0].sampling.grammar.source)["properties"] == schema["properties"]
