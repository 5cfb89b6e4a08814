"""Ollama's API. `ollama_bodies.json` holds what the `ollama` Python client 0.6.3 sent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import json, structs

from stretto.text.tokenizer import TextModel
from stretto.types import Reason, Request, TokenEvent
from tests.server.fake_engine import FakeEngine, Item

HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CALL = 'One moment. <tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>'
RECORDED = json.decode((Path(__file__).parent / "ollama_bodies.json").read_bytes())
SetAnswer = Callable[[str], list[int]]
DURATIONS = ("total_duration", "prompt_eval_duration", "eval_duration", "created_at", "stretto")


async def whole(client: httpx.AsyncClient, path: str, **fields: Any) -> dict[str, Any]:
    response = await client.post(path, json={"model": "tiny", "stream": False} | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def lines(client: httpx.AsyncClient, path: str, **fields: Any) -> list[dict[str, Any]]:
    response = await client.post(path, json={"model": "tiny"} | fields)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/x-ndjson")
    return [json.decode(line) for line in response.text.splitlines()]


def folded(stream: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer that a client makes of a stream."""
    assert [line["done"] for line in stream] == [False] * (len(stream) - 1) + [True]
    found = dict(stream[-1])
    said = [line["message"] if "message" in line else line for line in stream]
    field = "content" if "message" in found else "response"
    parts: dict[str, Any] = {field: "".join(line[field] for line in said)}
    if thoughts := [line["thinking"] for line in said if "thinking" in line]:
        parts["thinking"] = "".join(thoughts)
    if calls := [call for line in said for call in line.get("tool_calls", ())]:
        parts["tool_calls"] = calls
    if logprobs := [each for line in stream for each in line.get("logprobs", ())]:
        found["logprobs"] = logprobs
    return found | ({"message": {"role": "assistant"} | parts} if "message" in found else parts)


def untimed(answer: dict[str, Any]) -> dict[str, Any]:
    for call in answer.get("message", {}).get("tool_calls", ()):
        del call["id"]
    return {name: value for name, value in answer.items() if name not in DURATIONS}


def rendered(engine: FakeEngine, text: TextModel) -> str:
    return text.tokenizer.decode(list(engine.requests[-1].prompt), skip_special_tokens=False)


@pytest.fixture
def embeds(engine: FakeEngine) -> None:
    def script(request: Request) -> list[Item]:
        return [TokenEvent(0, embedding=(0.6, 0.8)), Reason.STOP]

    engine.script = script


@pytest.mark.parametrize("recorded", RECORDED, ids=range(len(RECORDED)))
async def test_what_the_client_sends_is_answered(
    client: httpx.AsyncClient, engine: FakeEngine, recorded: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    if "embed" in recorded["path"]:
        request.getfixturevalue("embeds")
    response = await client.post(recorded["path"], json=recorded["body"])
    assert response.status_code == 200, response.text
    assert not engine.open


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize(
    ("answer", "fields"),
    [
        ("Grüße 世界 😀", {}),
        ("", {}),
        ("<think>Hmm, 42?</think>Yes.", {"think": True}),
        ("one two three four", {"options": {"stop": ["three"]}}),
        ("one two three four", {"options": {"num_predict": 2}}),
        ("one two", {"logprobs": True, "top_logprobs": 2}),
    ],
)
async def test_a_stream_adds_up_to_the_whole_answer(
    client: httpx.AsyncClient, set_answer: SetAnswer, path: str, answer: str, fields: dict[str, Any]
) -> None:
    set_answer(answer)
    fields = fields | ({"messages": HI} if path == "/api/chat" else {"prompt": "Hi"})
    found = await whole(client, path, **fields)
    assert found["total_duration"] > 0
    assert untimed(folded(await lines(client, path, **fields))) == untimed(found)
    assert found["done_reason"] == ("length" if "num_predict" in fields.get("options", {}) else "stop")


async def test_tool_calls_come_whole_and_their_results_find_them(
    client: httpx.AsyncClient, set_answer: SetAnswer, engine: FakeEngine, text: TextModel
) -> None:
    set_answer(CALL + CALL[12:])
    found = await whole(client, "/api/chat", messages=HI, tools=[WEATHER])
    stream = await lines(client, "/api/chat", messages=HI, tools=[WEATHER])
    assert untimed(folded(stream)) == untimed(found)
    called = [call["function"] for call in found["message"]["tool_calls"]]
    city = {"name": "weather", "arguments": {"city": "Köln"}}
    assert called == [{"index": 0} | city, {"index": 1} | city]
    results = [{"role": "tool", "tool_name": "weather", "content": each} for each in ("rain", "sun")]
    await whole(client, "/api/chat", messages=[*HI, found["message"], *results], tools=[WEATHER])
    prompt = rendered(engine, text)
    assert prompt.count('<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>') == 2
    assert "tool\nrain<|stop|>\n<|start|>tool\nsun<|stop|>" in prompt


async def test_text_that_only_begins_like_a_call_is_not_lost(
    client: httpx.AsyncClient, set_answer: SetAnswer
) -> None:
    answer = 'See <tool_call>{"name": "weather", "arguments": [1]}</tool_call> here.'
    set_answer(answer)
    for fields in ({"stream": False}, {"stream": True}):
        response = await client.post(
            "/api/chat", json={"model": "tiny", "messages": HI, "tools": [WEATHER]} | fields
        )
        found = folded([json.decode(line) for line in response.text.splitlines()])
        assert found["message"]["content"] == answer


async def test_options_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    options = {"num_predict": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": 11}
    penalties = {"repeat_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.2, "num_ctx": 9}
    await whole(client, "/api/generate", prompt="Hi", options=options | penalties | {"stop": "x"})
    sampling = engine.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k) == (7, 0.5, 3)
    assert (sampling.top_p, sampling.min_p, sampling.seed, sampling.stop) == (0.9, 0.1, 11, ("x",))
    assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.2, 0.1)
    await whole(client, "/api/generate", prompt="Hi", options={"num_predict": -1})
    assert engine.requests[1].sampling.max_tokens is None


async def test_a_raw_prompt_has_no_template_and_no_limit(
    client: httpx.AsyncClient, engine: FakeEngine, text: TextModel
) -> None:
    await whole(client, "/api/generate", prompt="Hi there", raw=True)
    assert list(engine.requests[0].prompt) == text.encode("Hi there")
    assert engine.requests[0].sampling.max_tokens is None
    await whole(client, "/api/generate", prompt="Hi there", system="Be brief.")
    assert "system\nBe brief.<|stop|>\n<|start|>user\nHi there" in rendered(engine, text)


@pytest.mark.parametrize(
    ("form", "kind"), [("json", "json_object"), (SCHEMA, "json_schema"), ("", None), (None, None)]
)
async def test_the_format_forms_the_answer(
    client: httpx.AsyncClient, engine: FakeEngine, form: Any, kind: str | None
) -> None:
    await whole(client, "/api/chat", messages=HI, format=form)
    grammar = engine.requests[0].sampling.grammar
    assert (None if grammar is None else grammar.kind) == kind


async def test_a_request_without_a_prompt_loads_the_model(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    assert (await whole(client, "/api/generate"))["done_reason"] == "load"
    (line,) = await lines(client, "/api/chat", messages=[], keep_alive=0)
    assert (line["done"], line["done_reason"], line["message"]["content"]) == (True, "unload", "")
    assert not engine.requests
    unknown = await client.post("/api/generate", json={"model": "gpt-7"})
    assert unknown.status_code == 404


@pytest.mark.usefixtures("embeds")
async def test_texts_are_embedded_and_long_ones_cut(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    found = (await client.post("/api/embed", json={"model": "tiny:latest", "input": ["a", "b"]})).json()
    assert (found["embeddings"], found["prompt_eval_count"]) == ([[0.6, 0.8]] * 2, 2)
    assert (await client.post("/api/embeddings", json={"model": "tiny", "prompt": "a"})).json() == {
        "embedding": [0.6, 0.8]
    }
    one = await client.post("/api/embed", json={"model": "tiny", "input": "a", "dimensions": 1})
    assert one.json()["embeddings"] == [[1.0]]
    long = {"model": "tiny", "input": "word " * 5000}
    assert (await client.post("/api/embed", json=long)).status_code == 200
    assert len(engine.requests[-1].prompt) == 512
    kept = await client.post("/api/embed", json=long | {"truncate": False})
    assert (kept.status_code, kept.json()["error"].split()[0]) == (400, "$.input")
    assert (await client.post("/api/embed", json={"model": "tiny", "input": []})).status_code == 400


async def test_models_are_listed_and_described(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.models["tiny"] = structs.replace(engine.models["tiny"], parameters=596_000_000, weight_bytes=7)
    (model,) = (await client.get("/api/tags")).json()["models"]
    assert (model["name"], model["size"], model["details"]["parameter_size"]) == ("tiny", 7, "596.0M")
    (running,) = (await client.get("/api/ps")).json()["models"]
    assert (running["model"], running["context_length"]) == ("tiny", 512)
    for body in ({"model": "tiny"}, {"name": "tiny:latest", "verbose": True}):
        shown = (await client.post("/api/show", json=body)).json()
        assert shown["capabilities"] == ["completion", "embedding", "tools", "thinking"]
        assert shown["model_info"]["fake.context_length"] == 512
        assert "message.role" in shown["template"]
    assert (await client.post("/api/show", json={"model": "x"})).status_code == 404
    assert (await client.get("/api/version")).json()["version"].count(".") == 2


REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("chat", {"model": "gpt-7", "messages": HI}, 404, "no model"),
    ("chat", {"model": 3, "messages": HI}, 400, "$.model"),
    (
        "chat",
        {"messages": [{"role": "user", "content": "x", "images": ["AAAA"]}]},
        400,
        "$.messages[0].images",
    ),
    ("chat", {"messages": [{"role": "alien", "content": "x"}]}, 400, "$.messages[0].role"),
    ("chat", {"messages": HI, "options": {"num_predict": 9000}}, 400, "lower num_predict"),
    ("chat", {"messages": HI, "options": {"stop": ["x"] * 100}}, 400, "$.options.stop"),
    ("generate", {"prompt": "x", "suffix": "y"}, 400, "$.suffix"),
    ("generate", {"prompt": "x", "template": "{{ .Prompt }}"}, 400, "$.template"),
    ("generate", {"prompt": "x", "context": [1]}, 400, "$.context is not supported"),
    ("generate", {"prompt": "x", "raw": True, "system": "y"}, 400, "$.system"),
    ("generate", {"prompt": "x", "options": {"mirostat": 2}}, 400, "$.options.mirostat"),
    ("generate", {"prompt": "x", "options": {"tfs_z": 0.5}}, 400, "$.options.tfs_z"),
    ("generate", {"prompt": "x", "options": {"frobnicate": 1}}, 400, "$.options.frobnicate"),
    (
        "generate",
        {"prompt": "x", "options": {"repeat_penalty": 1.1, "repeat_last_n": 64}},
        400,
        "$.options.repeat_last_n",
    ),
    ("generate", {"prompt": "word " * 5000}, 400, "$.prompt has"),
]


async def test_the_history_may_say_more_than_ollama_reads(
    client: httpx.AsyncClient, engine: FakeEngine, text: TextModel
) -> None:
    function = {"name": "weather", "arguments": {"city": "Köln"}, "parsed_arguments": None}
    call = {"index": 0, "id": "c1", "function": function}
    asked = HI[0] | {"timestamp": 1, "id": "u1"}
    said = {"role": "assistant", "content": "", "model": "x", "tool_calls": [call]}
    result = {"role": "tool", "content": "rain", "tool_call_id": "c1"}
    await whole(client, "/api/chat", messages=[asked, said, result])
    plain = {"id": "c1", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    await whole(
        client,
        "/api/chat",
        messages=[*HI, {"role": "assistant", "content": "", "tool_calls": [plain]}, result],
    )
    assert engine.requests[0].prompt == engine.requests[1].prompt
    for none in ({"name": "now"}, {"name": "now", "arguments": None}, {"name": "now", "arguments": {}}):
        said = {"role": "assistant", "content": None, "tool_calls": [{"function": none}]}
        await whole(client, "/api/chat", messages=[*HI, said, {"role": "tool", "content": None}])
    assert engine.requests[2].prompt == engine.requests[3].prompt == engine.requests[4].prompt
    unknown = await client.post("/api/chat", json={"model": "tiny", "messages": [asked], "frobnicate": 1})
    assert (unknown.status_code, unknown.json()["error"].split()[0]) == (400, "$.frobnicate")


@pytest.mark.parametrize(("route", "fields", "status", "words"), REFUSED)
async def test_errors_have_their_shape_and_name_the_field(
    client: httpx.AsyncClient, route: str, fields: dict[str, Any], status: int, words: str
) -> None:
    response = await client.post(f"/api/{route}", json={"model": "tiny", "stream": False} | fields)
    assert response.status_code == status
    if status != 200:
        assert set(response.json()) == {"error"}
        assert words in response.json()["error"]


async def test_an_error_ends_a_stream_that_has_begun(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [300, Reason.ERROR]
    *_, last = await lines(client, "/api/chat", messages=HI)
    assert "caught fire" in last["error"]
