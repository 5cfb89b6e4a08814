"""Answers, streamed and whole: text, usage, logprobs, stop strings, tool calls, reasoning, embeddings."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from stretto.config import ServeConfig
from stretto.server.app import App
from stretto.server.responses import ResponseWriter
from stretto.text.tokenizer import TextModel
from stretto.types import Began, Grammar, Reason, Request, Sampling, TokenEvent
from tests.server.checkpoint import byte_level, write
from tests.server.conftest import CHAT, HELLO, ids_of
from tests.server.fake_engine import FakeEngine, FakeStream, build, info
from tests.server.sse import events, text_of

SetAnswer = Callable[[str], list[int]]
TEXT = "/v1/completions"
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"$ref": "#/$defs/c"}},
                "$defs": {"c": {"type": "string"}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


async def whole(client: httpx.AsyncClient, path: str = CHAT, **body: Any) -> Any:
    response = await client.post(path, json=(HELLO if path == CHAT else {"prompt": "Hi"}) | body)
    assert response.status_code == 200, response.text
    return response.json()


async def streamed(client: httpx.AsyncClient, path: str = CHAT, **body: Any) -> list[Any]:
    body = (HELLO if path == CHAT else {"prompt": "Hi"}) | body | {"stream": True}
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events(response.text)


async def test_a_request_leaves_before_the_work_that_can_wait(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client of the engine sends what it has in the event loop's next turn."""
    order: list[str] = []
    submit, opened = engine.submit, ResponseWriter.__init__

    def submitting(request: Request) -> FakeStream:
        asyncio.get_running_loop().call_soon(order.append, "left")
        return submit(request)

    def opening(self: ResponseWriter, *values: Any) -> None:
        order.append("writer made")
        opened(self, *values)

    monkeypatch.setattr(engine, "submit", submitting)
    monkeypatch.setattr(ResponseWriter, "__init__", opening)
    await streamed(client)
    assert order == ["left", "writer made"]


async def test_a_chat_answer_has_text_usage_and_finish_reason(
    client: httpx.AsyncClient, engine: FakeEngine, text: TextModel
) -> None:
    answer = await whole(client)
    prompt = text.encode_chat(HELLO["messages"])
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello, world!", "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"], answer["model"]) == ("stop", None, "tiny")
    output_tokens = len(ids_of(text, "Hello, world!"))
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": output_tokens,
        "total_tokens": len(prompt) + output_tokens,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    (request,) = engine.requests
    assert request.prompt == tuple(prompt)
    assert (request.tenant, request.salt, request.sampling) == ("local", "", Sampling())
    assert not engine.open, "every stream is closed"


async def test_the_stretto_report_has_queue_time_ttft_and_cached_tokens(client: httpx.AsyncClient) -> None:
    answer = await whole(client)
    report = answer["stretto"]
    assert set(report) == {
        "variant", "on_time", "queue_ms", "ttft_ms", "itl_p99_ms",
        "cached_tokens", "energy_j", "energy_source",
    }  # fmt: skip
    assert (report["variant"], report["queue_ms"], report["cached_tokens"]) == ("tiny", 1.5, 3)
    assert report["energy_j"] is report["energy_source"] is None
    assert report["on_time"] is True, "the default tier has an objective"
    assert report["ttft_ms"] > 0
    assert report["itl_p99_ms"] >= 0
    chunks = await streamed(client)
    assert [chunk.get("stretto", {}).get("variant") for chunk in chunks] == [None] * (len(chunks) - 1) + [
        "tiny"
    ]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_an_answer_ended_by_a_stop_string_still_has_a_full_report(
    client: httpx.AsyncClient, engine: FakeEngine, set_answer: SetAnswer, path: str
) -> None:
    first, *rest = set_answer("Hello, world!")
    engine.script = lambda request: [TokenEvent(0, first, began=Began(7.5, 2)), *rest]
    answer = await whole(client, path, stop=",")
    assert (answer["stretto"]["queue_ms"], answer["stretto"]["cached_tokens"]) == (7.5, 2)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_metadata_is_returned_with_the_answer(client: httpx.AsyncClient, path: str) -> None:
    sent = {"order": "17", "run": "nightly"}
    assert (await whole(client, path, metadata=sent))["metadata"] == sent
    chunks = await streamed(client, path, metadata=sent, n=2)
    assert [chunk["metadata"] for chunk in chunks if "metadata" in chunk] == [sent, sent], "once a choice"
    assert "metadata" not in await whole(client, path)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_stream_sends_one_event_per_token(
    client: httpx.AsyncClient, set_answer: SetAnswer, path: str
) -> None:
    ids = set_answer("Grüße 世界 😀🎉 x")
    chunks = await streamed(client, path, max_tokens=100)
    assert len(chunks) == len(ids) + 1, "and one for the end"
    assert text_of(chunks) == "Grüße 世界 😀🎉 x"
    assert "\ufffd" not in json.dumps(chunks, ensure_ascii=False)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * len(ids) + ["stop"]
    if path == CHAT:
        assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks] == ["assistant"] + [None] * len(
            ids
        )
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_tokens_queued_together_are_sent_at_once_as_separate_events(
    app: App, engine: FakeEngine, text: TextModel
) -> None:
    ids = ids_of(text, "Hello, world!")
    engine.script = lambda request: [ids[0], ids[1:4], ids[4:], Reason.STOP]
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        if message.get("body"):
            sent.append(message["body"])

    bodies = [{"type": "http.request", "body": json.dumps(HELLO | {"stream": True}).encode()}]

    async def receive() -> Any:
        return bodies.pop() if bodies else await engine.pause(10.0)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": CHAT, "headers": headers}
    await app(scope, receive, send)
    assert [body.count(b"data: ") for body in sent] == [1, 3, len(ids) - 4, 2]


async def test_the_last_token_carries_the_finish_reason_length(client: httpx.AsyncClient) -> None:
    chunks = await streamed(client, max_completion_tokens=2, stream_options={"include_usage": True})
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, "length"]
    usage = chunks[-1]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 2
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_continuous_usage_stats_add_usage_to_every_chunk(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await streamed(client, TEXT, max_tokens=3, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_stop_strings_end_the_answer_and_cancel_the_sequence(
    client: httpx.AsyncClient, engine: FakeEngine, set_answer: SetAnswer, path: str
) -> None:
    ids = set_answer("The quick brown fox jumps over the lazy dog.")
    for body in ({"stop": "wn f"}, {"stop": ["zebra", "wn f"]}):
        answer = await whole(client, path, **body, max_tokens=100)
        choice = answer["choices"][0]
        assert choice.get("text", choice.get("message", {}).get("content")) == "The quick bro"
        assert choice["finish_reason"] == "stop"
        chunks = await streamed(client, path, **body, max_tokens=100)
        assert text_of(chunks) == "The quick bro"
    for stream in engine.streams:
        assert stream.closed_after is not None
        assert stream.closed_after < len(ids)


async def test_n_and_lists_of_prompts_give_one_choice_each(
    client: httpx.AsyncClient, engine: FakeEngine, text: TextModel
) -> None:
    engine.script = lambda request: ids_of(text, "Hello" if request.id % 2 else "The fox")
    answer = await whole(client, n=2, seed=7)
    assert [c["message"]["content"] for c in answer["choices"]] == ["Hello", "The fox"]
    assert [request.sampling.seed for request in engine.requests] == [7, 8]
    assert {request.sampling.n for request in engine.requests} == {1}
    assert answer["usage"]["prompt_tokens"] == len(engine.requests[0].prompt), "a prompt counts once"
    chunks = await streamed(client, n=2)
    assert [text_of(chunks, 0), text_of(chunks, 1)] == ["Hello", "The fox"]
    answer = await whole(client, TEXT, prompt=["a", "b"], n=2)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert [request.prompt for request in engine.requests[-4:]] == [tuple(text.encode(p)) for p in "aabb"]
    await whole(client, TEXT, prompt=[[5, 6], [7]])
    await whole(client, TEXT, prompt=[8, 9])
    assert [request.prompt for request in engine.requests[-3:]] == [(5, 6), (7,), (8, 9)]


async def test_a_choice_that_stops_early_does_not_end_the_other_choices(
    client: httpx.AsyncClient, engine: FakeEngine, text: TextModel
) -> None:
    long = ids_of(text, "The quick brown fox jumps over the lazy dog.")
    engine.script = lambda request: long if request.id % 2 else ids_of(text, "Hello, world!")
    chunks = await streamed(client, n=2, stop="quick")
    assert [text_of(chunks, 0), text_of(chunks, 1)] == ["The ", "Hello, world!"]
    assert not engine.open


async def test_echo_puts_the_prompt_before_the_completion(client: httpx.AsyncClient, text: TextModel) -> None:
    for prompt in ("Say: ", text.encode("Say: ")):
        answer = await whole(client, TEXT, prompt=prompt, echo=True)
        assert answer["choices"][0]["text"] == "Say: Hello, world!"
        assert text_of(await streamed(client, TEXT, prompt=prompt, echo=True)) == "Say: Hello, world!"


async def test_chat_logprobs_have_bytes_and_top_tokens(
    client: httpx.AsyncClient, engine: FakeEngine, set_answer: SetAnswer, text: TextModel
) -> None:
    ids = set_answer("Hi 😀")
    answer = await whole(client, logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in content).decode() == "Hi 😀"
    assert [len(token["top_logprobs"]) for token in content] == [2] * len(ids)
    assert content[0]["top_logprobs"][0] == {key: content[0][key] for key in ("token", "logprob", "bytes")}
    chunks = await streamed(client, logprobs=True, top_logprobs=2)
    empty: dict[str, list[Any]] = {"content": []}
    streamed_content = [t for c in chunks for t in (c["choices"][0]["logprobs"] or empty)["content"]]
    assert streamed_content == content
    assert engine.requests[-1].sampling.logprobs == 2
    answer = await whole(client, logprobs=True)
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_completion_logprobs_have_tokens_and_text_offsets(
    client: httpx.AsyncClient, set_answer: SetAnswer
) -> None:
    ids = set_answer("Hello, world")
    answer = await whole(client, TEXT, logprobs=1)
    logprobs = answer["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == "Hello, world"
    assert logprobs["token_logprobs"] == [-0.5] * len(ids)
    assert [list(top) for top in logprobs["top_logprobs"]] == [[token] for token in logprobs["tokens"]]
    offsets = [len("".join(logprobs["tokens"][:i])) for i in range(len(ids))]
    assert logprobs["text_offset"] == offsets
    chunks = await streamed(client, TEXT, logprobs=1)
    got = [c["choices"][0]["logprobs"]["text_offset"] for c in chunks if c["choices"][0]["logprobs"]]
    assert [offset for part in got for offset in part] == offsets


async def test_every_sampling_field_reaches_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await whole(
        client, max_tokens=9, min_tokens=2, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=-3,
        presence_penalty=0.5, frequency_penalty=-0.5, repetition_penalty=1.1, logit_bias={"5": -100},
        stop=["zz"], stop_token_ids=[4], ignore_eos=True, logprobs=True, top_logprobs=3,
        response_format={"type": "json_object"},
    )  # fmt: skip
    assert engine.requests[0].sampling == Sampling(
        max_tokens=9, min_tokens=2, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=-3,
        presence_penalty=0.5, frequency_penalty=-0.5, repetition_penalty=1.1, logit_bias={5: -100.0},
        stop=("zz",), stop_token_ids=(4,), ignore_eos=True, logprobs=3, grammar=Grammar("json_object"),
    )  # fmt: skip
    nothing: dict[str, Any] = dict.fromkeys(
        ["max_tokens", "temperature", "top_k", "stop", "tools", "logit_bias", "audio", "functions", "user"]
    )
    await whole(client, **nothing, top_p=None, response_format={"type": "text"})
    assert engine.requests[1].sampling == Sampling()
    await whole(client, TEXT, top_k=-1)
    assert engine.requests[2].sampling == Sampling(max_tokens=16), "OpenAI's default for plain completions"


NULL = '{"type": "null"}'
NAMED = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "null"}}}


@pytest.mark.parametrize(
    ("body", "grammar"),
    [
        ({"response_format": NAMED}, Grammar("json_schema", NULL)),
        ({"structured_outputs": {"json": NULL}}, Grammar("json_schema", NULL)),
        ({"structured_outputs": {"json": {"type": "null"}}}, Grammar("json_schema", NULL)),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_object")),
        ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, Grammar("choice", '["yes", "no"]')),
    ],
)
async def test_every_form_of_grammar_is_checked_and_reaches_the_engine(
    checkpoint: Path, engine: FakeEngine, body: dict[str, Any], grammar: Grammar
) -> None:
    checked: list[tuple[str, Grammar]] = []

    async def check(model: str, grammar: Grammar, tenant: str) -> None:
        checked.append((model, grammar))

    app = build(ServeConfig(), engine, {"tiny": checkpoint}, check)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        await whole(client, **body)
    assert engine.requests[0].sampling.grammar == grammar
    assert checked == [("tiny", grammar)]


async def test_user_and_cache_salt_separate_prefix_caches(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    bodies = [
        {},
        {"user": "ann"},
        {"cache_salt": "ann"},
        {"user": "ann", "cache_salt": "x"},
        {"prompt_cache_key": "ann"},
    ]
    for body in bodies:
        await whole(client, **body)
    assert len({request.salt for request in engine.requests}) == len(bodies)


async def test_a_tool_call_is_parsed_streamed_and_accepted_back(
    client: httpx.AsyncClient, engine: FakeEngine, set_answer: SetAnswer, text: TextModel
) -> None:
    set_answer('Wait.<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>')
    answer = await whole(client, tools=TOOLS)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Wait."
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Köln"}'}
    assert (
        text.tokenizer.decode(engine.requests[0].prompt, skip_special_tokens=False).count('"name": "now"')
        == 1
    )
    chunks = await streamed(client, tools=TOOLS, tool_choice="auto")
    deltas = [
        c["choices"][0]["delta"]["tool_calls"][0] for c in chunks if "tool_calls" in c["choices"][0]["delta"]
    ]
    assert deltas[0]["function"]["name"] == "weather"
    assert "".join(delta["function"]["arguments"] for delta in deltas) == '{"city": "Köln"}'
    assert len(deltas) > 3
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert text_of(chunks) == "Wait."
    follow = [
        *HELLO["messages"],
        choice["message"],
        {"role": "tool", "tool_call_id": call["id"], "content": "rain"},
    ]
    await whole(client, messages=follow, tools=TOOLS)
    prompt = text.tokenizer.decode(engine.requests[-1].prompt, skip_special_tokens=False)
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>' in prompt
    assert "<|start|>tool\nrain<|stop|>" in prompt


async def test_a_malformed_tool_call_is_returned_as_content(
    client: httpx.AsyncClient, set_answer: SetAnswer
) -> None:
    broken = '<tool_call>{"name": "weather", "arguments": {"city": oops}}</tool_call>'
    set_answer(broken)
    answer = await whole(client, tools=TOOLS)
    assert answer["choices"][0]["message"]["content"] == broken
    assert "tool_calls" not in answer["choices"][0]["message"]
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_parallel_tool_calls_false_stops_after_one_call(
    client: httpx.AsyncClient, engine: FakeEngine, set_answer: SetAnswer
) -> None:
    call = '<tool_call>{"name": "now"}</tool_call>'
    ids = set_answer(call + call)
    answer = await whole(client, tools=TOOLS, parallel_tool_calls=False)
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1
    assert (engine.streams[0].closed_after or 0) < len(ids)
    assert len((await whole(client, tools=TOOLS))["choices"][0]["message"]["tool_calls"]) == 2


async def test_tool_choice_named_required_and_none_shape_the_answer(
    client: httpx.AsyncClient, engine: FakeEngine, set_answer: SetAnswer, text: TextModel
) -> None:
    set_answer('{"city": "Rome"}')
    named = {"type": "function", "function": {"name": "weather"}}
    answer = await whole(client, tools=TOOLS, tool_choice=named)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    grammar = engine.requests[-1].sampling.grammar
    assert grammar is not None
    assert json.loads(grammar.source) == TOOLS[0]["function"]["parameters"]
    set_answer('[{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "now", "arguments": {}}]')
    answer = await whole(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert [c["function"]["name"] for c in answer["choices"][0]["message"]["tool_calls"]] == [
        "weather",
        "now",
    ]
    grammar = engine.requests[-1].sampling.grammar
    assert grammar is not None
    schema = json.loads(grammar.source)
    assert schema["$defs"]["tool0"]["properties"]["city"] == {"$ref": "#/$defs/tool0/$defs/c"}
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    set_answer('<tool_call>{"name": "now"}</tool_call>')
    answer = await whole(client, tools=TOOLS, tool_choice="none")
    assert answer["choices"][0]["message"]["content"] == '<tool_call>{"name": "now"}</tool_call>'
    prompt = text.tokenizer.decode(engine.requests[-1].prompt, skip_special_tokens=False)
    assert "now" not in prompt


async def test_tool_markers_that_are_special_tokens_are_parsed(tmp_path: Path) -> None:
    template = "{% if tools %}{# [TOOL_CALLS] #}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    path = write(tmp_path, byte_level(extra=("[TOOL_CALLS]",)), template, eos="<|stop|>")
    text = TextModel(path)
    said_ids = ids_of(text, '[TOOL_CALLS][{"name": "now", "arguments": {}}]')
    engine = FakeEngine(lambda request: said_ids, {"tiny": info(vocab=text.tokenizer.get_vocab_size())})
    app = build(ServeConfig(), engine, {"tiny": path})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        answer = await whole(client, tools=TOOLS)
        assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "now"
        plain = await whole(client)
        assert plain["choices"][0]["message"]["content"] == '[{"name": "now", "arguments": {}}]'


async def test_reasoning_is_returned_in_its_own_field(
    client: httpx.AsyncClient, set_answer: SetAnswer
) -> None:
    set_answer("<think>\nLet me see.\n</think>\n\nHello.")
    answer = await whole(client)
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Let me see.", "Hello.")
    chunks = await streamed(client)
    thought = "".join(c["choices"][0]["delta"].get("reasoning_content", "") for c in chunks)
    assert (thought, text_of(chunks)) == ("Let me see.", "Hello.")


async def test_a_grammar_disables_thinking_in_the_chat_template(
    client: httpx.AsyncClient, engine: FakeEngine, text: TextModel
) -> None:
    await whole(client, response_format={"type": "json_object"})
    await whole(client, chat_template_kwargs={"enable_thinking": False})
    assert engine.requests[0].prompt == engine.requests[1].prompt
    assert text.decode(list(engine.requests[0].prompt)).endswith("</think>\n\n")


async def test_reasoning_effort_none_disables_thinking_in_the_chat_template(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await whole(client, reasoning_effort="none")
    await whole(client, chat_template_kwargs={"enable_thinking": False})
    await whole(client, reasoning_effort="high")
    await whole(client)
    prompts = [request.prompt for request in engine.requests]
    assert (prompts[0], prompts[2]) == (prompts[1], prompts[3])
    assert prompts[0] != prompts[2]


BENCHMARKS: list[tuple[str, dict[str, Any]]] = [
    # As `vllm bench serve` and `sglang.benchmark.serving` send them.
    (
        TEXT,
        {
            "prompt": "Hi",
            "repetition_penalty": 1.0,
            "logprobs": None,
            "stream_options": {"include_usage": True},
        },
    ),
    (TEXT, {"prompt": [5, 6, 7], "temperature": 0.0, "best_of": 1}),
    (
        CHAT,
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "max_completion_tokens": 4,
            "stream_options": {"include_usage": True},
        },
    ),
    (CHAT, {"messages": HELLO["messages"], "temperature": 0.0, "max_completion_tokens": 4}),
]


@pytest.mark.parametrize(("path", "body"), BENCHMARKS)
async def test_requests_of_vllm_and_sglang_benchmarks_get_one_event_per_token(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    limit = {} if path == CHAT else {"max_tokens": 4}
    body = body | limit | {"model": "tiny", "stream": True, "ignore_eos": True}
    response = await client.post(path, json=body)
    chunks = events(response.text)
    tokens = [chunk for chunk in chunks if chunk["choices"]]
    assert len(tokens) == 4, "the last token's event has the reason: no event that is none"
    for chunk in tokens:
        choice = chunk["choices"][0]
        assert isinstance(choice["text"] if path == TEXT else choice["delta"]["content"], str)
    if "stream_options" in body:
        assert chunks[-1]["usage"]["completion_tokens"] == 4
    else:
        assert chunks == tokens, "sglang's client reads choices[0] of every line"


async def test_messages_are_normalised_for_the_chat_template(
    client: httpx.AsyncClient, engine: FakeEngine, text: TextModel
) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c", "name": "ann"},
        {"role": "assistant", "content": "<think>hm</think>\nd", "refusal": None, "tool_calls": None},
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "user", "content": "e"},
    ]
    await whole(client, messages=messages)
    expected = [
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "reasoning_content": "hm"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "e"},
    ]
    assert engine.requests[0].prompt == tuple(text.encode_chat(expected))


async def test_special_tokens_are_text_in_a_chat_and_special_in_a_raw_prompt(
    client: httpx.AsyncClient, engine: FakeEngine, text: TextModel
) -> None:
    stop = text.tokenizer.token_to_id("<|stop|>")
    await whole(client, messages=[{"role": "user", "content": "<|stop|>"}])
    await whole(client, TEXT, prompt="<|stop|>")
    assert [request.prompt.count(stop) for request in engine.requests] == [1, 1]
    assert engine.requests[1].prompt == (stop,)


async def test_engine_end_reasons_become_finish_reason_deadline_or_a_500(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = lambda request: [5, Reason.DEADLINE]
    assert (await whole(client))["choices"][0]["finish_reason"] == "deadline"
    engine.script = lambda request: [5, Reason.ERROR]
    response = await client.post(CHAT, json=HELLO)
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "the tensor caught fire", "type": "server_error", "param": None, "code": "engine_error",
    }  # fmt: skip


async def test_embeddings_are_returned_as_floats_base64_or_fewer_dimensions(
    client: httpx.AsyncClient, engine: FakeEngine, text: TextModel
) -> None:
    def script(request: Request) -> list[TokenEvent | Reason]:
        assert request.task == "embed"
        return [TokenEvent(0, embedding=(3.0, 4.0, float(len(request.prompt)))), Reason.STOP]

    engine.script = script
    response = await client.post("/v1/embeddings", json={"input": ["Hello", "The fox"]})
    assert response.status_code == 200
    body = response.json()
    lengths = [len(text.encode(item)) for item in ("Hello", "The fox")]
    assert [item["embedding"] for item in body["data"]] == [[3.0, 4.0, float(n)] for n in lengths]
    assert [item["index"] for item in body["data"]] == [0, 1]
    assert body["usage"] == {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}
    response = await client.post("/v1/embeddings", json={"input": [5, 6], "encoding_format": "base64"})
    packed = base64.b64decode(response.json()["data"][0]["embedding"])
    assert struct.unpack("<3f", packed) == (3.0, 4.0, 2.0)
    response = await client.post("/v1/embeddings", json={"input": "Hello", "dimensions": 2})
    assert response.json()["data"][0]["embedding"] == [0.6, 0.8]
    response = await client.post("/v1/embeddings", json={"input": "Hello", "dimensions": 4})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "$.dimensions")
    many = await client.post("/v1/embeddings", json={"input": ["a"] * 100})
    assert len(many.json()["data"]) == 100, "more than may wait at once"
    assert not engine.open


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 40.0},
        {"top_logprobs": 0},
        {"stream_options": {"include_usage": True}},
        {"tools": [{"type": "function", "function": {"name": "shop.find"}}]},
    ],
)
async def test_fields_that_change_nothing_need_no_company(
    client: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    """Top log-probabilities of none, options of a stream in a whole answer, a dot in a name, 40.0."""
    (choice,) = (await whole(client, **fields))["choices"]
    assert (choice["message"]["content"], choice["logprobs"]) == ("Hello, world!", None)


NEARNESS = {"a": (1.0, 0.0), "b": (0.0, 1.0), "near a": (0.8, 0.6)}


@pytest.fixture
def embedder(engine: FakeEngine, text: TextModel) -> FakeEngine:
    """An engine that knows the embeddings of three texts."""
    known = {tuple(text.encode(each)): vector for each, vector in NEARNESS.items()}
    engine.script = lambda request: [TokenEvent(0, embedding=known[request.prompt]), Reason.STOP]
    return engine


async def test_documents_are_sorted_by_their_nearness_to_the_query(
    client: httpx.AsyncClient, embedder: FakeEngine
) -> None:
    body = {"query": "a", "documents": ["b", "near a", "a"], "model": "tiny"}
    for path in ("/v1/rerank", "/rerank", "/v2/rerank"):
        found = (await client.post(path, json=body)).json()["results"]
        assert [(each["index"], each["document"]["text"]) for each in found] == [
            (2, "a"),
            (1, "near a"),
            (0, "b"),
        ]
        assert [each["relevance_score"] for each in found] == pytest.approx([1.0, 0.8, 0.0])
    short = (await client.post("/v1/rerank", json=body | {"top_n": 1, "return_documents": False})).json()
    assert short["results"] == [{"index": 2, "relevance_score": 1.0}]
    assert short["usage"]["total_tokens"] > 0


async def test_a_document_may_be_an_object_with_a_text(
    client: httpx.AsyncClient, embedder: FakeEngine
) -> None:
    documents = ["b", {"text": "near a", "id": 7, "title": None}, {"text": "a"}]
    for more in ({}, {"rank_fields": ["text"]}, {"top_n": 3.0}):
        answer = await client.post("/v1/rerank", json={"query": "a", "documents": documents} | more)
        assert answer.status_code == 200, answer.text
        assert [(each["index"], each["document"]) for each in answer.json()["results"]] == [
            (2, {"text": "a"}),
            (1, {"text": "near a"}),
            (0, {"text": "b"}),
        ]


async def test_pairs_of_texts_have_scores(client: httpx.AsyncClient, embedder: FakeEngine) -> None:
    async def scores(first: object, second: object) -> list[float]:
        answer = await client.post("/v1/score", json={"text_1": first, "text_2": second})
        assert answer.status_code == 200, answer.text
        return [each["score"] for each in answer.json()["data"]]

    assert await scores("a", "a") == [1.0]
    assert await scores("a", ["a", "b", "near a"]) == pytest.approx([1.0, 0.0, 0.8])
    assert await scores(["b", "near a"], "b") == pytest.approx([1.0, 0.6])
    assert await scores(["a", "b"], ["b", "b"]) == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "a"]}, "$.text_2"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "$.text_2"),
        ("/v1/score", {"text_1": "a", "text_2": ""}, "$.text_2"),
        ("/v1/rerank", {"query": "", "documents": ["a"]}, "$.query"),
        ("/v1/rerank", {"query": "a", "documents": ["a", ""]}, "$.documents[1]"),
        ("/v1/rerank", {"query": "a", "documents": ["a", {"text": ""}]}, "$.documents[1]"),
        ("/v1/rerank", {"query": "a", "documents": [{"image": "a.png"}]}, "$.documents[0].text"),
        ("/v1/rerank", {"query": "a", "documents": [7]}, "$.documents[0]"),
        ("/v1/rerank", {"query": "a", "documents": [{"text": "a"}], "rank_fields": ["b"]}, "$.rank_fields"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "max_tokens_per_doc": 9}, "$.max_tokens_per_doc"),
        ("/v1/rerank", {"query": "a", "documents": ["a"] * 2049}, "$.documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": 0}, "$.top_n"),
    ],
)
async def test_texts_that_cannot_be_compared_are_named(
    client: httpx.AsyncClient, embedder: FakeEngine, path: str, body: dict[str, Any], param: str
) -> None:
    answer = await client.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert not embedder.open


async def test_a_stop_string_counts_in_the_content_and_not_in_the_reasoning(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}<think>\n{# </think> #}"
    path = write(tmp_path, byte_level(), template, eos="<|stop|>")
    text = TextModel(path)
    ids = ids_of(text, "First END of it.\n</think>\n\nDone. END more")
    engine = FakeEngine(lambda request: list(ids), {"tiny": info(vocab=text.tokenizer.get_vocab_size())})
    app = build(ServeConfig(), engine, {"tiny": path})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        (choice,) = (await whole(client, stop=["END"]))["choices"]
        chunks = await streamed(client, stop=["END"])
    assert choice["message"]["reasoning_content"] == "First END of it."
    assert choice["message"]["content"] == "Done. "
    assert choice["finish_reason"] == "stop"
    assert text_of(chunks) == "Done. "


async def test_a_stop_string_that_is_a_special_token_stops_by_its_id(
    client: httpx.AsyncClient, engine: FakeEngine, text: TextModel
) -> None:
    await whole(client, stop=["<|stop|>", "x"])
    assert engine.requests[-1].sampling.stop_token_ids == (text.tokenizer.token_to_id("<|stop|>"),)


CALLED = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
NO_ARGUMENTS = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": ""}}


async def test_the_servers_own_answers_are_accepted_back(
    client: httpx.AsyncClient, engine: FakeEngine, text: TextModel
) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "weather"}}
    for answer in (
        {"content": None},
        {"content": None, "reasoning_content": "hm"},
        {"content": None, "tool_calls": [NO_ARGUMENTS]},
        {
            "content": None,
            "tool_calls": [call | {"function": {"name": "weather", "arguments": '{"city": "Par'}}],
        },
    ):
        messages = [*HELLO["messages"], {"role": "assistant", **answer}, *HELLO["messages"]]
        response = await client.post(CHAT, json={"messages": messages})
        assert response.status_code == 200, (answer, response.text)
        shown = text.tokenizer.decode(list(engine.requests[-1].prompt), skip_special_tokens=False)
        assert shown.count(CALLED) == ("tool_calls" in answer), shown


async def test_a_message_without_content_is_empty_text_to_a_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    path = write(tmp_path, byte_level(), template, eos="<|stop|>")
    text = TextModel(path)
    engine = FakeEngine(lambda request: [65], {"tiny": info(vocab=text.tokenizer.get_vocab_size())})
    app = build(ServeConfig(), engine, {"tiny": path})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        for members in ({}, {"reasoning_content": "hm"}, {"tool_calls": [NO_ARGUMENTS]}):
            answer = {"role": "assistant", "content": None, **members}
            await whole(client, messages=[*HELLO["messages"], answer, *HELLO["messages"]])
            assert text.decode(list(engine.requests[-1].prompt)) == "[Hi][][Hi]"


async def test_top_logprobs_of_completions_have_distinct_names_and_right_offsets(
    client: httpx.AsyncClient, set_answer: SetAnswer
) -> None:
    set_answer("a🎉b")
    (choice,) = (await whole(client, TEXT, logprobs=20, max_tokens=20))["choices"]
    found = choice["logprobs"]
    assert choice["text"] == "a🎉b"
    assert all(len(top) == 20 and "" not in top for top in found["top_logprobs"])
    offsets = found["text_offset"]
    assert (offsets[0], offsets[1], offsets[-1]) == (0, 1, 2) and set(offsets[1:-1]) == {1}


async def test_arguments_of_a_forced_call_are_always_an_object(
    client: httpx.AsyncClient, engine: FakeEngine, set_answer: SetAnswer
) -> None:
    set_answer('{"city": "Rome"}')
    parameters: dict[str, Any] = {"properties": {"a": {}}}
    tool: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    chosen = {"type": "function", "function": {"name": "f"}}
    await whole(client, tools=[tool], tool_choice=chosen)
    grammar = engine.requests[-1].sampling.grammar
    assert grammar is not None and json.loads(grammar.source)["type"] == "object"
    set_answer('[{"name": "f", "arguments": {"a": 1}}]')
    tool["function"]["parameters"] |= {"$id": "https://example.org/f", "$anchor": "f"}
    await whole(client, tools=[tool], tool_choice="required")
    grammar = engine.requests[-1].sampling.grammar
    assert grammar is not None
    moved = json.loads(grammar.source)["$defs"]["tool0"]
    assert moved["type"] == "object" and not {"$id", "$anchor"} & moved.keys(), (
        "its references would not be found"
    )
    tool["function"]["parameters"] = {"type": "string"}
    refused = await client.post(CHAT, json=HELLO | {"tools": [tool], "tool_choice": "required"})
    assert refused.json()["error"]["param"] == "$.tools[0].function.parameters"


async def test_strict_tools_are_constrained_from_where_a_call_begins(
    client: httpx.AsyncClient, engine: FakeEngine, set_answer: SetAnswer
) -> None:
    set_answer("Hello")
    tools = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}, TOOLS[1]]
    await whole(client, tools=tools)
    grammar = engine.requests[-1].sampling.grammar
    assert grammar is not None and grammar.kind == "tool_calls"
    found = json.loads(grammar.source)
    assert len(found["calls"]) == 2
    assert '"city"' in found["rules"] and '"type": "object", "x-guidance"' in found["rules"]


async def test_the_white_space_of_json_may_be_chosen_and_of_nothing_else(
    client: httpx.AsyncClient, engine: FakeEngine, set_answer: SetAnswer
) -> None:
    set_answer("{}")
    for form in ({"json": {"type": "object"}}, {"json_object": True}):
        await whole(client, structured_outputs=form | {"whitespace_pattern": "[ \\n]*"})
        grammar = engine.requests[-1].sampling.grammar
        assert grammar is not None and grammar.kind == "json_schema"
        assert json.loads(grammar.source)["x-guidance"] == {"whitespace_pattern": "[ \\n]*"}
    body = HELLO | {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}
    refused = await client.post(CHAT, json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "$.structured_outputs.whitespace_pattern"


async def test_what_a_schema_cannot_enforce_is_reported(
    client: httpx.AsyncClient, set_answer: SetAnswer
) -> None:
    set_answer("[1]")
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    answer = await whole(client, response_format=form)
    assert answer["stretto"]["schema_relaxed"] == ["$.response_format.json_schema.schema.uniqueItems"]
    form["json_schema"]["schema"] = {"not": {"type": "string"}}
    refused = await client.post(CHAT, json=HELLO | {"response_format": form})
    assert refused.json()["error"]["param"] == "$.response_format.json_schema.schema.not"


async def test_the_stop_string_is_part_of_the_answer_on_request(
    client: httpx.AsyncClient, set_answer: SetAnswer
) -> None:
    set_answer("One. Two. Three.")
    for shown, answer in ((False, "One."), (True, "One. Two"), (None, "One.")):
        (choice,) = (await whole(client, stop=[" Two"], include_stop_str_in_output=shown))["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (answer, "stop")


async def test_only_the_last_tokens_of_a_prompt_are_read_on_request(
    client: httpx.AsyncClient, engine: FakeEngine, text: TextModel
) -> None:
    await whole(client, truncate_prompt_tokens=3)
    assert engine.requests[-1].prompt == tuple(text.encode_chat(HELLO["messages"]))[-3:]
    await whole(client, TEXT, prompt="a " * 5000, truncate_prompt_tokens=4)
    assert engine.requests[-1].prompt == tuple(text.encode("a " * 5000))[-4:]


async def test_an_answer_goes_on_with_the_last_message_on_request(
    client: httpx.AsyncClient, engine: FakeEngine, text: TextModel
) -> None:
    messages = [*HELLO["messages"], {"role": "assistant", "content": "The answer is"}]
    given = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
    await whole(client, **given)
    prompt = text.tokenizer.decode(list(engine.requests[-1].prompt), skip_special_tokens=False)
    assert prompt.endswith("The answer is")
    await whole(client, **(given | {"continue_final_message": False}))
    closed = text.tokenizer.decode(list(engine.requests[-1].prompt), skip_special_tokens=False)
    assert closed.startswith(prompt) and len(closed) > len(prompt)
    refused = await client.post(CHAT, json=given | {"add_generation_prompt": True})
    assert refused.json()["error"]["param"] == "$.continue_final_message"
