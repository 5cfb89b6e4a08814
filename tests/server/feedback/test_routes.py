"""`/v1/feedback`: which answers it knows, what it refuses, what it keeps, and what is erased."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from stretto.config import ServeConfig
from stretto.optimise import data
from stretto.optimise.recipe import DataFiles
from stretto.protocol.limits import LIMITS
from stretto.server.app import App
from tests.server.conftest import CHAT, HELLO, Served
from tests.server.fake_engine import FakeEngine, build

URL = "/v1/feedback"
NOTHING_LEARNT = {"correction": None, "correction_low": None}
ANN, BOB = {"x-api-key": "key-1"}, {"x-api-key": "key-2"}


@pytest.fixture
def config() -> ServeConfig:
    return ServeConfig(port=0, api_keys={"key-1": "ann", "key-2": "bob"}, feedback_prompts=("ann",))


@pytest.fixture
async def client(app: App) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"content-type": "application/json"} | ANN
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://localhost", headers=headers
    ) as made:
        yield made


async def ask(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **body: Any) -> str:
    """Asks for an answer, and returns the id of the request."""
    response = await client.post(CHAT, json=HELLO | body, headers=headers)
    assert response.status_code == 200, response.text
    return response.headers["x-request-id"]


async def give(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **body: Any) -> Any:
    return await client.post(URL, json=body, headers=headers)


@pytest.mark.parametrize(
    ("vote", "reward"), [({"reward": 0.25}, 0.25), ({"thumbs": "up"}, 1.0), ({"thumbs": "down"}, 0.0)]
)
async def test_a_reward_is_kept_for_an_answer(
    client: httpx.AsyncClient, vote: dict[str, Any], reward: float
) -> None:
    id = await ask(client)
    receipt = (await give(client, request_id=id, **vote)).json()
    assert receipt == {
        "object": "feedback",
        "request_id": id,
        "model": "tiny",
        "variant": "tiny",
        "reward": reward,
        "learnt": False,  # a model without variants has nothing to choose
    }
    summary = (await client.get(URL)).json()
    kept = {"rewards": 1, "mean_reward": reward, "mean_expected": None} | NOTHING_LEARNT
    assert summary["waiting"] == 0 and summary["models"] == {"tiny": {"tiny": kept}}


async def test_a_reward_may_come_with_the_first_token(served: Served, engine: FakeEngine) -> None:
    engine.script = lambda request: [0.001, 300, 0.5, 300]
    async with (
        httpx.AsyncClient(base_url=served.url, headers=ANN) as http,
        http.stream("POST", CHAT, json=HELLO | {"stream": True}) as answer,
    ):
        assert (await anext(answer.aiter_lines())).startswith("data: ")
        vote = await http.post(URL, json={"request_id": answer.headers["x-request-id"], "thumbs": "up"})
        assert vote.status_code == 200, vote.text
        assert engine.open, "the answer goes on"


async def test_the_id_of_an_answer_names_its_request(client: httpx.AsyncClient) -> None:
    chat = await client.post(CHAT, json=HELLO)
    text = await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 3})
    message = await client.post("/v1/messages", json=HELLO | {"model": "tiny", "max_tokens": 3})
    for answer in (chat, text, message):
        assert (await give(client, request_id=answer.json()["id"], thumbs="up")).status_code == 200
    streamed = await client.post(CHAT, json=HELLO | {"stream": True})
    first = json.loads(streamed.text.splitlines()[0].removeprefix("data: "))
    assert (await give(client, request_id=first["id"], thumbs="up")).status_code == 200


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_id_of_a_response_names_its_request(client: httpx.AsyncClient, streamed: bool) -> None:
    asked = await client.post("/v1/responses", json={"input": "Hi", "stream": streamed})
    text = asked.text.split("data: ", 1)[1].splitlines()[0] if streamed else asked.text
    shown = json.loads(text)["response"] if streamed else json.loads(text)
    foreign = await give(client, BOB, request_id=shown["id"], thumbs="up")
    assert foreign.status_code == 404
    assert (await give(client, request_id=shown["id"], reward=0.25)).json()["reward"] == 0.25
    again = await give(client, request_id=asked.headers["x-request-id"], reward=0.75)
    assert again.json()["reward"] == 0.75, "it is the same choice"
    assert (await client.get(URL)).json()["models"]["tiny"]["tiny"]["rewards"] == 1
    assert (await client.delete(f"{URL}/{shown['id']}")).json()["erased"] == 1
    assert (await give(client, request_id=shown["id"], thumbs="up")).status_code == 404


async def test_every_api_that_generates_takes_feedback(client: httpx.AsyncClient) -> None:
    for path, body in (
        ("/v1/responses", {"input": "Hi"}),
        ("/api/chat", HELLO | {"model": "tiny", "stream": False}),
        ("/api/generate", {"model": "tiny", "prompt": "Hi", "stream": False}),
    ):
        answer = await client.post(path, json=body)
        id = answer.headers["x-request-id"]
        assert (await give(client, request_id=id, thumbs="down")).status_code == 200, path


async def test_unknown_and_foreign_requests_are_the_same_404(client: httpx.AsyncClient) -> None:
    id = await ask(client)
    texts: set[str] = set()
    for name, headers in ((id, BOB), ("x" * len(id), BOB), ("x" * len(id), ANN)):
        refused = await give(client, headers, request_id=name, thumbs="up")
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "request_not_found"
        assert refused.json()["error"]["param"] == "$.request_id"
        texts.add(refused.json()["error"]["message"].replace(name, "ID"))
        gone = await client.delete(f"{URL}/{name}", headers=headers)
        assert gone.status_code == 404
    assert len(texts) == 1
    assert (await give(client, request_id=id, thumbs="up")).status_code == 200


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"reward": 1.01}, "$.reward"),
        ({"reward": -0.1}, "$.reward"),
        ({"reward": "good"}, "$.reward"),
        ({"thumbs": "sideways"}, "$.thumbs"),
        ({}, "$.reward"),
        ({"reward": 1.0, "thumbs": "up"}, "$.reward"),
        ({"thumbs": "up", "stars": 5}, "$.stars"),
        ({"thumbs": "up", "request_id": ""}, "$.request_id"),
        ({"thumbs": "up", "request_id": "x" * (LIMITS["request_id"].most + 1)}, "$.request_id"),
        ({"thumbs": "up", "corrected_answer": ""}, "$.corrected_answer"),
        (
            {"thumbs": "up", "corrected_answer": "x" * (LIMITS["corrected_answer"].most + 1)},
            "$.corrected_answer",
        ),
    ],
)
async def test_what_is_wrong_is_refused_by_its_path(
    client: httpx.AsyncClient, body: dict[str, Any], path: str
) -> None:
    id = await ask(client)
    refused = await client.post(URL, json={"request_id": id} | body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == path
    assert (await client.get(URL)).json()["models"] == {}


async def test_no_number_is_no_reward(client: httpx.AsyncClient) -> None:
    id = await ask(client)
    for text in ("NaN", "1e999", "Infinity"):
        body = f'{{"request_id": "{id}", "reward": {text}}}'
        assert (await client.post(URL, content=body)).status_code == 400


async def test_a_second_vote_takes_the_place_of_the_first(client: httpx.AsyncClient) -> None:
    id = await ask(client)
    for reward in (0.0, 1.0, 0.5):
        await give(client, request_id=id, reward=reward)
    kept = (await client.get(URL)).json()["models"]["tiny"]["tiny"]
    assert (kept["rewards"], kept["mean_reward"]) == (1, 0.5)


async def test_corrected_answers_are_exported_as_lines_that_a_recipe_reads(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 1?"}],
        },
    ]
    id = await ask(client, messages=messages)
    await give(client, request_id=id, thumbs="down", corrected_answer="2")
    text = await client.post("/v1/completions", json={"prompt": "1 + 2 =", "max_tokens": 3})
    await give(client, request_id=text.json()["id"], reward=0.5, corrected_answer="3")
    await give(client, request_id=await ask(client), thumbs="up")
    exported = await client.get(f"{URL}/export")
    assert exported.headers["content-type"] == "application/jsonl"
    assert exported.headers["cache-control"] == "no-store"
    lines = [json.loads(line) for line in exported.text.splitlines()]
    joined = [messages[0], {"role": "user", "content": "What is 1 + 1?"}]
    assert lines == [
        {"messages": joined, "answer": "2", "task": "feedback"},
        {"prompt": "1 + 2 =", "answer": "3", "task": "feedback"},
    ]
    (tmp_path / "feedback.jsonl").write_bytes(exported.content)
    (tmp_path / "other.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    read = data.read(DataFiles("feedback.jsonl", "other.jsonl", "other.jsonl"), tmp_path).train
    assert [sample.answer for sample in read] == ["2", "3"]
    assert (await client.get(f"{URL}/export", headers=BOB)).content == b""


async def test_no_text_is_kept_for_a_tenant_that_did_not_ask(client: httpx.AsyncClient, app: App) -> None:
    id = await ask(client, BOB)
    refused = await give(client, BOB, request_id=id, thumbs="down", corrected_answer="2")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "$.corrected_answer"
    assert "feedback_prompts" in refused.json()["error"]["message"]
    assert (await give(client, BOB, request_id=id, thumbs="down")).status_code == 200
    assert all(kept.text_size == 0 for kept in app.server.learner.rewarded("bob"))


async def test_a_prompt_that_is_not_all_text_is_not_kept(client: httpx.AsyncClient) -> None:
    tool = {"type": "function", "function": {"name": "now"}}
    id = await ask(client, tools=[tool])
    assert (await give(client, request_id=id, thumbs="up", corrected_answer="a")).status_code == 400
    ids = await client.post("/v1/completions", json={"prompt": [[1, 2]], "max_tokens": 2})
    refused = await give(client, request_id=ids.json()["id"], thumbs="up", corrected_answer="a")
    assert refused.status_code == 400


async def test_feedback_is_erased_by_request_by_user_and_whole(client: httpx.AsyncClient) -> None:
    ids = [await ask(client, user=user) for user in ("eve", "eve", "max", "max")]
    foreign = await ask(client, BOB, user="eve")
    for id in ids:
        await give(client, request_id=id, thumbs="up")
    await give(client, BOB, request_id=foreign, thumbs="up")
    assert (await client.delete(f"{URL}/chatcmpl-{ids[3]}")).json() == {
        "object": "feedback.erased",
        "erased": 1,
    }
    assert (await client.delete(f"{URL}/users/eve")).json()["erased"] == 2
    assert (await client.delete(f"{URL}/users/nobody")).json()["erased"] == 0
    assert (await give(client, request_id=ids[0], thumbs="up")).status_code == 404
    assert (await client.delete(URL)).json()["erased"] == 1
    assert (await client.get(URL)).json() == {"object": "feedback.summary", "waiting": 0, "models": {}}
    assert (await client.get(URL, headers=BOB)).json()["models"]["tiny"]["tiny"]["rewards"] == 1


async def test_feedback_needs_a_key_and_json(client: httpx.AsyncClient) -> None:
    wrong = {"x-api-key": "wrong"}
    assert (await give(client, wrong, request_id="a", thumbs="up")).status_code == 401
    for method, path in (("GET", URL), ("DELETE", URL), ("GET", f"{URL}/export"), ("DELETE", f"{URL}/a")):
        assert (await client.request(method, path, headers=wrong)).status_code == 401
    form = {"content-type": "text/plain"}
    assert (await client.post(URL, content=b"{}", headers=form)).status_code == 415


async def test_votes_are_counted(client: httpx.AsyncClient) -> None:
    await give(client, request_id=await ask(client), reward=0.5)
    await give(client, request_id=await ask(client), reward=0.4)
    text = (await client.get("/metrics")).text
    assert 'stretto_feedback_total{model="tiny",variant="tiny",vote="up"} 1.0' in text
    assert 'stretto_feedback_total{model="tiny",variant="tiny",vote="down"} 1.0' in text


async def test_without_feedback_nothing_is_kept(checkpoint: Path, engine: FakeEngine) -> None:
    app = build(ServeConfig(port=0, feedback_wait_s=0.0), engine, {"tiny": checkpoint})
    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://localhost", headers=headers
    ) as client:
        id = await ask(client)
        refused = await give(client, request_id=id, thumbs="up")
        assert refused.status_code == 404 and app.server.learner.waiting("local") == 0
