"""langchain-openai (Python)."""

from typing import Annotated, Literal

from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field
from report import ANSWER, KEY, MODEL, MOST, QUESTION, V1, feature

model = ChatOpenAI(model=MODEL, base_url=V1, api_key=KEY, temperature=0, max_tokens=200)


class City(BaseModel):
    """A city."""

    name: Literal["Rome", "Paris", "Oslo"]
    population: Annotated[int, Field(**MOST)]


@feature("answer")
def answer():
    said = model.invoke(QUESTION)
    assert ANSWER in said.content and said.usage_metadata["output_tokens"] > 0


@feature("stream")
def stream():
    assert ANSWER in "".join(part.content for part in model.stream(QUESTION))


@feature("structured")
def structured():
    assert isinstance(model.with_structured_output(City).invoke(QUESTION), City)


@feature("tools")
def tools():
    said = model.bind_tools([City], tool_choice="any").invoke("Rome has 2800000 people.")
    assert said.tool_calls[0]["name"] == "City", said


@feature("turns")
def turns():
    said = model.invoke([("user", QUESTION)])
    assert model.invoke([("user", QUESTION), said, ("user", "Thank you!")]).content is not None


@feature("embeddings")
def embeddings():
    made = OpenAIEmbeddings(model=MODEL, base_url=V1, api_key=KEY, check_embedding_ctx_length=False)
    assert len(made.embed_documents(["a", "b"])) == 2
