"""instructor: pydantic types by tools, by a JSON schema, and in parts."""

from typing import Annotated, Literal

import instructor
import openai
from pydantic import BaseModel, Field
from report import KEY, MODEL, MOST, V1, feature

ASKED = [{"role": "user", "content": "Rome has 2800000 people."}]


class City(BaseModel):
    name: Literal["Rome", "Paris", "Oslo"]
    population: Annotated[int, Field(**MOST)]


def client(mode):
    return instructor.from_openai(openai.OpenAI(base_url=V1, api_key=KEY), mode=mode)


@feature("structured")
def structured():
    made = client(instructor.Mode.JSON_SCHEMA)
    assert isinstance(made.create(model=MODEL, messages=ASKED, response_model=City, max_tokens=200), City)


@feature("tools")
def tools():
    made = client(instructor.Mode.TOOLS)
    assert isinstance(made.create(model=MODEL, messages=ASKED, response_model=City, max_tokens=200), City)


@feature("stream")
def stream():
    made = client(instructor.Mode.TOOLS)
    parts = list(made.create_partial(model=MODEL, messages=ASKED, response_model=City, max_tokens=200))
    assert parts[-1].name is not None, parts
