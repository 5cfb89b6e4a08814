"""openai (Python): the Responses API."""

from typing import Annotated, Literal

import openai
from pydantic import BaseModel, Field
from report import ANSWER, KEY, MODEL, MOST, QUESTION, V1, WEATHER, feature

client = openai.OpenAI(base_url=V1, api_key=KEY, max_retries=0)


class City(BaseModel):
    name: Literal["Rome", "Paris", "Oslo"]
    population: Annotated[int, Field(**MOST)]


@feature("answer")
def answer():
    assert ANSWER in client.responses.create(model=MODEL, input=QUESTION, temperature=0).output_text


@feature("stream")
def stream():
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0) as events:
        kinds = [event.type for event in events]
        assert ANSWER in events.get_final_response().output_text
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed", kinds


@feature("structured")
def structured():
    said = client.responses.parse(model=MODEL, input=QUESTION, text_format=City, max_output_tokens=200)
    assert isinstance(said.output_parsed, City)


@feature("tools")
def tools():
    tool = {"type": "function", **WEATHER, "strict": True}
    said = client.responses.create(
        model=MODEL, input="Weather in Rome?", tools=[tool], tool_choice="required", max_output_tokens=200
    )
    assert any(item.type == "function_call" for item in said.output), said


@feature("turns")
def turns():
    items = [{"role": "user", "content": QUESTION}]
    items += client.responses.create(model=MODEL, input=items, max_output_tokens=60).output
    items.append({"role": "user", "content": "Thank you!"})
    assert client.responses.create(model=MODEL, input=items, max_output_tokens=60).output


@feature("errors")
def errors():
    try:
        client.responses.create(model="no-such-model", input="a")
    except openai.NotFoundError:
        return
    raise AssertionError("an unknown model was accepted")
