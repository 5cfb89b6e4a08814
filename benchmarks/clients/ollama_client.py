"""ollama (Python): chat, generate, embed, list and show."""

from typing import Annotated, Literal

import ollama
from pydantic import BaseModel, Field
from report import ANSWER, BASE, MODEL, MOST, QUESTION, WEATHER, feature

client = ollama.Client(BASE)
ASKED = [{"role": "user", "content": QUESTION}]
EXACT = {"temperature": 0, "num_predict": 200}
TUNED = EXACT | {
    "num_ctx": 2048, "num_keep": 5, "seed": 42, "top_k": 20, "top_p": 0.9, "min_p": 0.0, "typical_p": 1.0,
    "repeat_last_n": -1, "repeat_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5,
    "penalize_newline": True, "stop": ["###"], "numa": False, "num_batch": 2, "num_gpu": 1, "main_gpu": 0,
    "use_mmap": True, "num_thread": 8,
}  # fmt: skip


class City(BaseModel):
    name: Literal["Rome", "Paris", "Oslo"]
    population: Annotated[int, Field(**MOST)]


@feature("answer")
def answer():
    assert ANSWER in client.chat(MODEL, ASKED, options=EXACT).message.content
    assert client.list().models and client.show(MODEL).details
    assert client.ps().models
    said = client.generate(MODEL, QUESTION, system="Be brief.", options=TUNED, keep_alive="5m", think=False)
    assert said.done and said.eval_count > 0


@feature("stream")
def stream():
    parts = client.chat(MODEL, ASKED, options=EXACT, stream=True)
    assert ANSWER in "".join(part.message.content for part in parts)


@feature("structured")
def structured():
    said = client.chat(MODEL, ASKED, format=City.model_json_schema(), options=EXACT)
    City.model_validate_json(said.message.content)


@feature("tools")
def tools():
    tool = {"type": "function", "function": WEATHER}
    asked = [{"role": "user", "content": "What is the weather in Rome?"}]
    assert client.chat(MODEL, asked, tools=[tool], options=EXACT).message is not None


@feature("turns")
def turns():
    message = client.chat(MODEL, ASKED, options=EXACT).message
    assert client.chat(MODEL, [*ASKED, message, {"role": "user", "content": "Thank you!"}], options=EXACT)


@feature("errors")
def errors():
    try:
        client.chat("no-such-model", ASKED)
    except ollama.ResponseError as error:
        assert error.status_code == 404
    else:
        raise AssertionError("an unknown model was accepted")


@feature("embeddings")
def embeddings():
    assert len(client.embed(MODEL, ["a", "b"]).embeddings) == 2
