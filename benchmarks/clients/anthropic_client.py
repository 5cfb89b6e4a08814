"""anthropic (Python): the Messages API."""

import anthropic
from report import ANSWER, BASE, KEY, MODEL, QUESTION, WEATHER, feature

client = anthropic.Anthropic(base_url=BASE, api_key=KEY, max_retries=0)
ASKED = [{"role": "user", "content": QUESTION}]
EXACT = {"model": MODEL, "messages": ASKED, "max_tokens": 200, "extra_body": {"temperature": 0}}
TOOL = {
    "name": WEATHER["name"], "description": WEATHER["description"], "input_schema": WEATHER["parameters"]
}  # fmt: skip


@feature("answer")
def answer():
    said = client.messages.create(**EXACT)
    assert ANSWER in said.content[0].text and said.usage.output_tokens > 0


@feature("stream")
def stream():
    with client.messages.stream(
        model=MODEL, messages=ASKED, max_tokens=200, extra_body={"temperature": 0}
    ) as events:
        assert ANSWER in "".join(events.text_stream)


@feature("tools")
def tools():
    said = client.messages.create(
        model=MODEL, messages=ASKED, tools=[TOOL], tool_choice={"type": "any"}, max_tokens=200
    )
    call = next(block for block in said.content if block.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    history = [*ASKED, {"role": "assistant", "content": said.content}, {"role": "user", "content": [result]}]
    assert (
        client.messages.create(model=MODEL, messages=history, tools=[TOOL], max_tokens=60).content is not None
    )


@feature("turns")
def turns():
    said = client.messages.create(model=MODEL, messages=ASKED, max_tokens=60)
    thanks = [{"type": "text", "text": "Thank you!", "cache_control": {"type": "ephemeral"}}]
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    history = [
        *ASKED,
        {"role": "assistant", "content": said.content},
        {"role": "user", "content": thanks},
    ]
    more = {"system": system, "metadata": {"user_id": "ann"}, "stop_sequences": ["###"]}
    assert client.messages.create(model=MODEL, messages=history, max_tokens=60, **more)
    assert client.messages.count_tokens(model=MODEL, messages=history, system=system).input_tokens > 0


@feature("errors")
def errors():
    try:
        client.messages.create(model="no-such-model", messages=ASKED, max_tokens=5)
    except anthropic.NotFoundError:
        return
    raise AssertionError("an unknown model was accepted")
