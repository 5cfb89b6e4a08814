"""openai (Python): chat completions and embeddings."""

from typing import Annotated, Literal

import openai
from pydantic import BaseModel, Field
from report import ANSWER, KEY, MODEL, MOST, QUESTION, V1, WEATHER, feature

client = openai.OpenAI(base_url=V1, api_key=KEY, max_retries=0)
ASKED = [{"role": "user", "content": QUESTION}]


class City(BaseModel):
    name: Literal["Rome", "Paris", "Oslo"]
    population: Annotated[int, Field(**MOST)]


@feature("answer")
def answer():
    said = client.chat.completions.create(model=MODEL, messages=ASKED, temperature=0)
    assert ANSWER in said.choices[0].message.content, said
    assert said.usage.total_tokens > 0


@feature("stream")
def stream():
    text, usage = "", None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(
        model=MODEL, messages=ASKED, temperature=0, stream=True, stream_options=options
    ):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    assert ANSWER in text and usage.completion_tokens > 0, text


@feature("structured")
def structured():
    said = client.chat.completions.parse(
        model=MODEL, messages=ASKED, response_format=City, max_completion_tokens=200
    )
    assert isinstance(said.choices[0].message.parsed, City), said


@feature("tools")
def tools():
    tool = {"type": "function", "function": WEATHER | {"strict": True}}
    asked = [{"role": "user", "content": "What is the weather in Rome?"}]
    said = client.chat.completions.create(
        model=MODEL, messages=asked, tools=[tool], tool_choice="required", max_tokens=200
    )
    call = said.choices[0].message.tool_calls[0]
    assert call.function.name == "get_weather", said
    asked += [said.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    said = client.chat.completions.create(model=MODEL, messages=asked, tools=[tool], max_tokens=100)
    assert said.choices[0].finish_reason in ("stop", "length", "tool_calls")


@feature("turns")
def turns():
    said = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=60)
    history = [*ASKED, said.choices[0].message, {"role": "user", "content": "Thank you!"}]
    assert client.chat.completions.create(model=MODEL, messages=history, max_tokens=60).choices[0].message


@feature("errors")
def errors():
    try:
        client.chat.completions.create(model="no-such-model", messages=ASKED)
    except openai.NotFoundError as error:
        assert error.param == "$.model", error
    else:
        raise AssertionError("an unknown model was accepted")


@feature("embeddings")
def embeddings():
    made = client.embeddings.create(model=MODEL, input=["a", "b"])
    assert len(made.data) == 2 and len(made.data[0].embedding) > 0
