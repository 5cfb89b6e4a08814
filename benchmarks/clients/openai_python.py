"""openai (Python): chat completions and embeddings."""

from typing import Annotated, Literal

import openai
from pydantic import BaseModel, Field
from report import ANSWER, KEY, MODEL, MOST, QUESTION, V1, WEATHER, feature

client = openai.OpenAI(base_url=V1, api_key=KEY, max_retries=0)
ASKED = [{"role": "user", "content": QUESTION}]
THANKS = {"role": "user", "content": "Thank you!"}
# What programs set for OpenAI's own servers, and in `extra_body` for vLLM, SGLang and llama.cpp.
OPENAI = {
    "n": 1, "user": "ann", "store": False, "metadata": {"run": "1"}, "parallel_tool_calls": True,
    "service_tier": "auto", "verbosity": "medium", "prompt_cache_key": "k", "safety_identifier": "s",
    "presence_penalty": 0, "logit_bias": {}, "stop": None,
}  # fmt: skip
OTHERS = {
    "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.05, "skip_special_tokens": True,
    "spaces_between_special_tokens": True, "add_generation_prompt": True, "include_reasoning": True,
    "chat_template_kwargs": {"enable_thinking": False}, "separate_reasoning": True, "cache_prompt": True,
    "timings_per_token": False, "id_slot": -1, "mirostat": 0, "typical_p": 1.0,
}  # fmt: skip


class City(BaseModel):
    name: Literal["Rome", "Paris", "Oslo"]
    population: Annotated[int, Field(**MOST)]


@feature("answer")
def answer():
    said = client.chat.completions.create(model=MODEL, messages=ASKED, temperature=0)
    assert ANSWER in said.choices[0].message.content, said
    assert said.usage.total_tokens > 0
    assert client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=60, **OPENAI).choices
    chosen = {"guided_choice": ["Rome", "Oslo"], **OTHERS}
    said = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=60, extra_body=chosen)
    assert said.choices[0].message.content in ("Rome", "Oslo"), said


@feature("stream")
def stream():
    text, usage = "", None
    options = {"include_usage": True, "include_obfuscation": False}
    for chunk in client.chat.completions.create(
        model=MODEL, messages=ASKED, temperature=0, stream=True, stream_options=options
    ):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    assert ANSWER in text and usage.completion_tokens > 0, text
    with client.chat.completions.stream(model=MODEL, messages=ASKED, temperature=0) as events:
        assert [event for event in events if event.type == "content.delta"]
        assert ANSWER in events.get_final_completion().choices[0].message.content


@feature("structured")
def structured():
    said = client.chat.completions.parse(
        model=MODEL, messages=ASKED, response_format=City, max_completion_tokens=200
    )
    assert isinstance(said.choices[0].message.parsed, City), said
    history = [*ASKED, said.choices[0].message, THANKS]
    assert client.chat.completions.create(model=MODEL, messages=history, max_tokens=60).choices
    tool = openai.pydantic_function_tool(City)
    said = client.chat.completions.parse(
        model=MODEL,
        messages=ASKED,
        tools=[tool],
        tool_choice="required",
        max_tokens=200,
        parallel_tool_calls=False,
    )
    calls = said.choices[0].message.tool_calls
    assert isinstance(calls[0].function.parsed_arguments, City), said
    results = [{"role": "tool", "tool_call_id": call.id, "content": "thanks"} for call in calls]
    history = [*ASKED, said.choices[0].message, *results]
    assert client.chat.completions.create(model=MODEL, messages=history, tools=[tool], max_tokens=60).choices


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
    history = [*ASKED, said.choices[0].message, THANKS]
    assert client.chat.completions.create(model=MODEL, messages=history, max_tokens=60).choices[0].message
    history = [*ASKED, said.choices[0].message.model_dump(), THANKS]
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


@feature("logprobs")
def logprobs():
    said = client.chat.completions.create(
        model=MODEL, messages=ASKED, temperature=0, logprobs=True, top_logprobs=3
    )
    assert len(said.choices[0].logprobs.content[0].top_logprobs) == 3
    plain = client.completions.create(model=MODEL, prompt=QUESTION, max_tokens=8, logprobs=2)
    assert len(plain.choices[0].logprobs.tokens) == plain.usage.completion_tokens
    assert next(model.id for model in client.models.list()) == MODEL
