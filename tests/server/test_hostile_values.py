"""Values that a stranger may send: each gets an answer, or a 400 with its path; none ends in a 500."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from stretto.server.app import App
from stretto.text.tokenizer import TextModel
from stretto.types import Finish, Reason, TokenEvent
from tests.server.conftest import CHAT, HELLO
from tests.server.fake_engine import FakeEngine

TEXT = "/v1/completions"
EMBED = "/v1/embeddings"
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "f", "arguments": '{"x": "\\ud83d", "\\ude00": 1}'},
}
HALF = "\ud83d"  # the client writes it as the escape \ud83d


async def test_half_a_surrogate_pair_in_a_call_that_the_model_wrote_is_accepted_back(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    history = [HELLO["messages"][0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    history.append({"role": "tool", "tool_call_id": "1", "content": "done"})
    response = await client.post(CHAT, json={"messages": history})
    assert response.status_code == 200
    assert engine.requests[0].prompt


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": f"a{HALF}"}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}], "name": HALF}]}),
        (CHAT, HELLO | {"stop": HALF, "user": HALF, "metadata": {HALF: HALF}}),
        (CHAT, HELLO | {"tools": [{"type": "function", "function": {"name": "f", "description": HALF}}]}),
        (TEXT, {"prompt": HALF}),
        (TEXT, {"prompt": [HALF, "a"]}),
        (EMBED, {"input": HALF}),
    ],
)
async def test_half_a_surrogate_pair_is_answered(
    client: httpx.AsyncClient, engine: FakeEngine, text: TextModel, path: str, body: dict[str, Any]
) -> None:
    if path == EMBED:
        engine.script = lambda request: [TokenEvent(0, embedding=(1.0,)), Reason.STOP]
    response = await client.post(path, content=json.dumps(body))
    assert response.status_code == 200
    assert body.get("messages") == HELLO["messages"] or "\ufffd" in text.decode([*engine.requests[0].prompt])


async def test_half_a_surrogate_pair_in_a_name_is_refused_by_its_path(client: httpx.AsyncClient) -> None:
    for body, path, status in (
        ({"model": HALF}, "$.model", 404),
        ({"tools": [{"type": "function", "function": {"name": HALF}}]}, "$.tools[0].function.name", 400),
        ({"chat_template_kwargs": {HALF: 1}}, "$.chat_template_kwargs.\ufffd", 400),
        ({HALF: 1}, "$.\ufffd", 400),
    ):
        response = await client.post(CHAT, content=json.dumps(HELLO | body))
        assert (response.status_code, response.json()["error"]["param"]) == (status, path)


@pytest.mark.parametrize(
    ("field", "number"),
    [
        ("repetition_penalty", "1e-38"),
        ("repetition_penalty", "4.9e-324"),
        ("temperature", "1e999"),
        ("temperature", "NaN"),
        ("top_p", "-Infinity"),
        ("min_p", "nan"),
        ("presence_penalty", "1e400"),
        ("max_tokens", "1e3"),
        ("max_tokens", "1" * 5000),
        ("logit_bias", '{"1": 1e999}'),
        ("objective", '{"total_ms": 1e999}'),
        ("chat_template_kwargs", '{"enable_thinking": 1e999}'),
        ("chat_template_kwargs", '{"enable_thinking": %s}' % ("1" * 5000)),
    ],
)
async def test_numbers_out_of_range_are_refused(client: httpx.AsyncClient, field: str, number: str) -> None:
    body = json.dumps(HELLO)[:-1] + f', "{field}": {number}}}'
    response = await client.post(CHAT, content=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["param"] or "").startswith(f"$.{field}") or "valid JSON" in error["message"]


async def test_embeddings_that_miss_their_objective_end_as_the_objective_says(
    client: httpx.AsyncClient, engine: FakeEngine, app: App
) -> None:
    engine.script = lambda request: [Reason.DEADLINE]
    response = await client.post(EMBED, json={"input": ["a", "b"], "objective": {"total_ms": 1}})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (503, "cannot_be_on_time")
    assert error["param"] == "$.objective.total_ms"
    assert response.headers["retry-after"]
    assert not engine.open
    assert not app.server.calls


@pytest.mark.parametrize("stream", [False, True])
async def test_a_grammar_that_the_engine_cannot_follow_is_the_requests_fault(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    """Some grammars compile, and exceed the work that a step may take only in the middle of an answer."""
    finish = Finish(Reason.INVALID, 3, 1, 0, 0.0, error="the grammar cannot be followed: too much work")
    engine.script = lambda request: [5, TokenEvent(0, finish=finish)]
    regex = {"structured_outputs": {"regex": "(?:a?){1000}a{500}"}, "stream": stream}
    response = await client.post(CHAT, json=HELLO | regex)
    last = response.text.rpartition("data: ")[2] if stream else response.text
    error = json.loads(last)["error"]
    assert response.status_code == (200 if stream else 400)
    assert (error["code"], error["param"]) == ("invalid_grammar", "$.structured_outputs")
