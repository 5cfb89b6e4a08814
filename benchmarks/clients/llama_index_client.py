"""llama-index with OpenAILike."""

from typing import Annotated, Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field
from report import ANSWER, KEY, MODEL, MOST, QUESTION, V1, feature

model = OpenAILike(
    model=MODEL,
    api_base=V1,
    api_key=KEY,
    is_chat_model=True,
    is_function_calling_model=True,
    temperature=0,
    max_tokens=200,
    context_window=2048,
)


class City(BaseModel):
    """A city."""

    name: Literal["Rome", "Paris", "Oslo"]
    population: Annotated[int, Field(**MOST)]


def get_weather(city: str) -> str:
    """The weather in a city."""
    return "sunny in " + city


@feature("answer")
def answer():
    assert ANSWER in model.chat([ChatMessage(content=QUESTION)]).message.content


@feature("stream")
def stream():
    parts = list(model.stream_chat([ChatMessage(content=QUESTION)]))
    assert ANSWER in parts[-1].message.content and len(parts) > 2


@feature("structured")
def structured():
    said = model.as_structured_llm(City).chat([ChatMessage(content="Rome has 2800000 people.")])
    assert isinstance(said.raw, City), said


@feature("tools")
def tools():
    tool = FunctionTool.from_defaults(get_weather)
    said = model.chat_with_tools([tool], "What is the weather in Rome?", tool_required=True)
    assert model.get_tool_calls_from_response(said)[0].tool_name == "get_weather"


@feature("turns")
def turns():
    history = [ChatMessage(content=QUESTION), model.chat([ChatMessage(content=QUESTION)]).message]
    assert model.chat([*history, ChatMessage(content="Thank you!")]).message.content is not None
