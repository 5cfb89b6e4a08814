"""litellm, the library."""

from typing import Annotated, Literal

import litellm
from pydantic import BaseModel, Field
from report import ANSWER, KEY, MODEL, MOST, QUESTION, V1, WEATHER, feature

TO = {"model": f"openai/{MODEL}", "api_base": V1, "api_key": KEY}
ASKED = [{"role": "user", "content": QUESTION}]


class City(BaseModel):
    name: Literal["Rome", "Paris", "Oslo"]
    population: Annotated[int, Field(**MOST)]


@feature("answer")
def answer():
    said = litellm.completion(**TO, messages=ASKED, temperature=0)
    assert ANSWER in said.choices[0].message.content and said.usage.total_tokens > 0


@feature("stream")
def stream():
    parts = litellm.completion(**TO, messages=ASKED, temperature=0, stream=True)
    assert ANSWER in "".join(part.choices[0].delta.content or "" for part in parts)


@feature("structured")
def structured():
    said = litellm.completion(**TO, messages=ASKED, response_format=City, max_tokens=200)
    City.model_validate_json(said.choices[0].message.content)


@feature("tools")
def tools():
    tool = {"type": "function", "function": WEATHER}
    said = litellm.completion(**TO, messages=ASKED, tools=[tool], tool_choice="required", max_tokens=200)
    message = said.choices[0].message
    assert message.tool_calls[0].function.name == "get_weather", said
    answered = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    assert litellm.completion(**TO, messages=[*ASKED, message, answered], tools=[tool], max_tokens=60).choices


@feature("turns")
def turns():
    message = litellm.completion(**TO, messages=ASKED, max_tokens=60).choices[0].message
    history = [*ASKED, message, {"role": "user", "content": "Thank you!"}]
    assert litellm.completion(**TO, messages=history, max_tokens=60).choices
    cached = {"type": "text", "text": QUESTION, "cache_control": {"type": "ephemeral"}}
    history = [{"role": "user", "content": [cached]}, message.model_dump(), *history[2:]]
    assert litellm.completion(**TO, messages=history, max_tokens=60).choices


@feature("errors")
def errors():
    try:
        litellm.completion(**TO | {"model": "openai/no-such-model"}, messages=ASKED)
    except litellm.NotFoundError:
        return
    raise AssertionError("an unknown model was accepted")


@feature("embeddings")
def embeddings():
    assert len(litellm.embedding(**TO, input=["a", "b"]).data) == 2
