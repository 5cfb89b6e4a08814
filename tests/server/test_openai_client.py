"""The `openai` client, unchanged, against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from stretto.types import Reason, Request, TokenEvent
from tests.server.conftest import Served
from tests.server.fake_engine import FakeEngine, Item

HI = [{"role": "user", "content": "Hi"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = 'One moment. <tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>'
SetAnswer = Callable[[str], list[int]]


class Point(BaseModel):
    x: int
    y: int


@pytest.fixture
async def ai(served: Served):
    async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_the_client_reads_chat_answers_completions_and_models(
    ai: AsyncOpenAI, set_answer: SetAnswer
) -> None:
    ids = set_answer("Grüße 世界 😀")
    answer = await ai.chat.completions.create(model="tiny", messages=HI, temperature=0, n=1, user="ann")
    assert answer.choices[0].message.content == "Grüße 世界 😀"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(ids)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.model_extra is not None
    assert answer.model_extra["stretto"]["variant"] == "tiny"
    plain = await ai.completions.create(model="tiny", prompt="Hi", max_tokens=100, logprobs=2)
    assert plain.choices[0].text == "Grüße 世界 😀"
    assert plain.choices[0].logprobs is not None
    assert len(plain.choices[0].logprobs.tokens or []) == len(ids)
    models = [model.id async for model in ai.models.list()]
    assert models == ["tiny"]
    assert (await ai.models.retrieve("tiny")).id == "tiny"


async def test_the_client_reads_streamed_chats_and_completions(
    ai: AsyncOpenAI, set_answer: SetAnswer
) -> None:
    ids = set_answer("Grüße 世界 😀")
    stream = await ai.chat.completions.create(
        model="tiny",
        messages=HI,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=1,
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Grüße 世界 😀"
    assert sum(
        len(c.choices[0].logprobs.content or []) for c in chunks if c.choices and c.choices[0].logprobs
    ) == len(ids)
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.completion_tokens, chunks[-1].choices) == (len(ids), [])
    plain = await ai.completions.create(model="tiny", prompt="Hi", max_tokens=100, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in plain]) == "Grüße 世界 😀"
    async with ai.chat.completions.stream(model="tiny", messages=HI) as events:
        assert [event.delta async for event in events if event.type == "content.delta"]
        assert (await events.get_final_completion()).choices[0].message.content == "Grüße 世界 😀"


async def test_the_synchronous_client_reads_whole_and_streamed_answers(
    served: Served, set_answer: SetAnswer
) -> None:
    set_answer("Hello, world!")

    def talk() -> tuple[str | None, str]:
        with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(model="tiny", messages=HI)
            parts = client.chat.completions.create(model="tiny", messages=HI, stream=True)
            return whole.choices[0].message.content, "".join(p.choices[0].delta.content or "" for p in parts)

    assert await asyncio.to_thread(talk) == ("Hello, world!", "Hello, world!")


async def test_the_client_reads_tool_calls_and_sends_tool_results(
    ai: AsyncOpenAI, set_answer: SetAnswer
) -> None:
    set_answer(CALL)
    answer = await ai.chat.completions.create(model="tiny", messages=HI, tools=[WEATHER])
    message = answer.choices[0].message
    assert message.tool_calls
    assert message.tool_calls[0].function.arguments == '{"city": "Köln"}'
    history = [*HI, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}]
    set_answer("Rain.")
    answer = await ai.chat.completions.create(model="tiny", messages=history, tools=[WEATHER])
    assert answer.choices[0].message.content == "Rain."
    history += [answer.choices[0].message.model_dump(), HI[0]]
    assert await ai.chat.completions.create(model="tiny", messages=history, tools=[WEATHER])
    set_answer(CALL)
    async with ai.chat.completions.stream(model="tiny", messages=HI, tools=[WEATHER]) as events:
        async for _ in events:
            pass
        final = (await events.get_final_completion()).choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls
    assert final.message.tool_calls[0].function.arguments == '{"city": "Köln"}'
    assert (final.message.content or "").strip() == "One moment."


async def test_the_client_parses_answers_and_tool_calls_into_a_type(
    ai: AsyncOpenAI, set_answer: SetAnswer, engine: FakeEngine
) -> None:
    set_answer('{"x": 1, "y": -2}')
    answer = await ai.chat.completions.parse(model="tiny", messages=HI, response_format=Point)
    assert answer.choices[0].message.parsed == Point(x=1, y=-2)
    grammar = engine.requests[0].sampling.grammar
    assert grammar is not None
    assert grammar.kind == "json_schema"
    set_answer('[{"name": "Point", "arguments": {"x": 3, "y": 4}}]')
    tool = openai.pydantic_function_tool(Point)
    answer = await ai.chat.completions.parse(model="tiny", messages=HI, tools=[tool], tool_choice="required")
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == Point(x=3, y=4)


async def test_the_client_reads_embeddings(ai: AsyncOpenAI, engine: FakeEngine) -> None:
    def script(request: Request) -> list[Item]:
        return [TokenEvent(0, embedding=(0.5, -0.25)), Reason.STOP]

    engine.script = script
    vectors = await ai.embeddings.create(model="tiny", input=["a", "b"])
    assert [item.embedding for item in vectors.data] == [[0.5, -0.25]] * 2
    vectors = await ai.embeddings.create(model="tiny", input="a", encoding_format="float")
    assert vectors.data[0].embedding == [0.5, -0.25]


async def test_the_client_raises_the_matching_error_types(ai: AsyncOpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.NotFoundError, match="no model"):
        await ai.chat.completions.create(model="gpt-7", messages=HI)
    with pytest.raises(openai.BadRequestError) as bad:
        await ai.chat.completions.create(model="tiny", messages=HI, max_tokens=0)
    assert (bad.value.param, bad.value.code) == ("$.max_tokens", "invalid_value")
    engine.script = lambda request: [300, Reason.ERROR]
    with pytest.raises(openai.InternalServerError, match="caught fire"):
        await ai.chat.completions.create(model="tiny", messages=HI)
    stream = await ai.chat.completions.create(model="tiny", messages=HI, stream=True)
    with pytest.raises(openai.APIError, match="caught fire"):
        _ = [chunk async for chunk in stream]
    engine.ready = False
    with pytest.raises(openai.InternalServerError) as gone:
        await ai.chat.completions.create(model="tiny", messages=HI)
    assert gone.value.status_code == 503


async def test_closing_a_stream_cancels_the_request(ai: AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: [item for _ in range(10_000) for item in (0.001, 300)]
    stream = await ai.chat.completions.create(model="tiny", messages=HI, stream=True)
    async for _ in stream:
        break
    await stream.close()
    async with asyncio.timeout(5):
        while engine.open:
            await asyncio.sleep(0.01)
