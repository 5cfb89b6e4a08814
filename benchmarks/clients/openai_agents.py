"""openai-agents: an agent with a tool, over chat completions."""

import asyncio
from typing import Annotated, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel, Field
from report import ANSWER, KEY, MODEL, MOST, QUESTION, V1, feature

set_tracing_disabled(True)


def model():
    return OpenAIChatCompletionsModel(MODEL, AsyncOpenAI(base_url=V1, api_key=KEY))


class City(BaseModel):
    name: Literal["Rome", "Paris", "Oslo"]
    population: Annotated[int, Field(**MOST)]


@feature("answer")
def answer():
    agent = Agent("desk", model=model(), model_settings=ModelSettings(temperature=0))
    assert ANSWER in Runner.run_sync(agent, QUESTION).final_output


@feature("stream")
def stream():
    async def run():
        agent = Agent("desk", model=model(), model_settings=ModelSettings(temperature=0))
        result = Runner.run_streamed(agent, QUESTION)
        kinds = [event.type async for event in result.stream_events()]
        assert "raw_response_event" in kinds and ANSWER in result.final_output

    asyncio.run(run())


@feature("structured")
def structured():
    settings = ModelSettings(max_tokens=200)
    agent = Agent("desk", model=model(), output_type=City, model_settings=settings)
    assert isinstance(Runner.run_sync(agent, QUESTION).final_output, City)


@feature("tools")
def tools():
    called = []

    @function_tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        called.append(city)
        return "sunny"

    settings = ModelSettings(tool_choice="required", max_tokens=200)
    agent = Agent("desk", model=model(), tools=[get_weather], model_settings=settings)
    Runner.run_sync(agent, "What is the weather in Rome?", max_turns=4)
    assert called


@feature("turns")
def turns():
    agent = Agent("desk", model=model(), model_settings=ModelSettings(max_tokens=60))
    first = Runner.run_sync(agent, QUESTION)
    history = [*first.to_input_list(), {"role": "user", "content": "Thank you!"}]
    assert Runner.run_sync(agent, history).final_output is not None
