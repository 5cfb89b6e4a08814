"""pydantic-ai: an agent over chat completions."""

import asyncio
from typing import Annotated, Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from report import ANSWER, KEY, MODEL, MOST, QUESTION, V1, feature

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=V1, api_key=KEY))


class City(BaseModel):
    name: Literal["Rome", "Paris", "Oslo"]
    population: Annotated[int, Field(**MOST)]


@feature("answer")
def answer():
    assert ANSWER in Agent(model, model_settings={"temperature": 0}).run_sync(QUESTION).output


@feature("stream")
def stream():
    async def run():
        async with Agent(model, model_settings={"temperature": 0}).run_stream(QUESTION) as result:
            assert ANSWER in [text async for text in result.stream_text()][-1]

    asyncio.run(run())


@feature("structured")
def structured():
    agent = Agent(model, output_type=NativeOutput(City), model_settings={"max_tokens": 200})
    assert isinstance(agent.run_sync(QUESTION).output, City)


@feature("tools")
def tools():
    agent = Agent(model, output_type=City, retries=3, model_settings={"max_tokens": 200})
    assert isinstance(agent.run_sync(QUESTION).output, City)  # by a call of a forced tool


@feature("turns")
def turns():
    agent = Agent(model, model_settings={"max_tokens": 60})
    first = agent.run_sync(QUESTION)
    assert agent.run_sync("Thank you!", message_history=first.all_messages()).output is not None
