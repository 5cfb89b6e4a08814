"""Log-probabilities of a prompt, as OpenAI's `echo` and vLLM's `prompt_logprobs` give them, and token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from stretto.text.tokenizer import TextModel
from stretto.types import Began, Finish, Logprobs, Reason, Request, TokenEvent
from tests.server.fake_engine import FakeEngine
from tests.server.test_answers import CHAT, HELLO, TEXT, streamed, whole

PROMPT = "Say: Grüße"


@pytest.fixture
def scored(engine: FakeEngine, text: TextModel) -> FakeEngine:
    """An engine that says of token k of the prompt that its log-probability is -k, and that token 7 is
    likelier. Its answer is ` ok`."""

    def script(request: Request) -> list[TokenEvent | Reason]:
        scores = tuple(Logprobs(-float(k), ((7, -0.25),), rank=k + 1) for k in range(1, len(request.prompt)))
        began = Began(
            1.0, 0, prompt_logprobs=scores if request.sampling.prompt_logprobs is not None else None
        )
        answer = text.encode(" ok")[: request.sampling.max_tokens]
        events: list[TokenEvent | Reason] = [
            TokenEvent(0, token, Logprobs(-0.5, ((token, -0.5),)), began=None if at else began)
            for at, token in enumerate(answer)
        ]
        if not events:
            finish = Finish(Reason.LENGTH, len(request.prompt), 0, 0, 1.0)
            return [TokenEvent(0, finish=finish, began=began)]
        return [*events, Reason.LENGTH]

    engine.script = script
    return engine


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("most", [0, 1, 5])
async def test_echo_with_logprobs_scores_the_prompt_and_the_answer(
    client: httpx.AsyncClient, scored: FakeEngine, text: TextModel, most: int, as_ids: bool
):
    """What lm-eval sends for a multiple choice, streamed and whole."""
    ids = text.encode(PROMPT)
    body: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": most, "temperature": 0}
    body["prompt"] = ids if as_ids else PROMPT
    (choice,) = (await whole(client, TEXT, **body))["choices"]
    assert scored.requests[-1].sampling.prompt_logprobs == 1
    answer = text.decode(text.encode(" ok")[:most])
    assert (choice["text"], choice["finish_reason"]) == (PROMPT + answer, "length")
    found = choice["logprobs"]
    size = len(ids) + len(text.encode(" ok")[:most])
    assert {len(values) for values in found.values()} == {size}
    assert found["token_logprobs"][: len(ids)] == [None, *(-float(k) for k in range(1, len(ids)))]
    assert found["token_logprobs"][len(ids) :] == [-0.5] * (size - len(ids))
    assert found["top_logprobs"][0] is None
    assert list(found["top_logprobs"][1].values()) == [-0.25]
    assert found["text_offset"] == sorted(found["text_offset"]) and found["text_offset"][0] == 0
    first_of_answer = found["text_offset"][len(ids) :]
    assert not first_of_answer or first_of_answer[0] == len(PROMPT)
    chunks = await streamed(client, TEXT, **body)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert {name: [value for part in parts for value in part[name]] for name in found} == found
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]


async def test_an_answer_of_no_tokens_is_empty(client: httpx.AsyncClient, scored: FakeEngine):
    (choice,) = (await whole(client, TEXT, prompt="Hi", max_tokens=0))["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("", "length", None)
    refused = await client.post(CHAT, json=HELLO | {"max_tokens": 0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "$.max_tokens")


async def test_prompt_logprobs_are_listed_by_token_id(
    client: httpx.AsyncClient, scored: FakeEngine, text: TextModel
):
    ids = text.encode(PROMPT)
    (choice,) = (await whole(client, TEXT, prompt=PROMPT, prompt_logprobs=1, max_tokens=1))["choices"]
    listed = choice["prompt_logprobs"]
    assert len(listed) == len(ids) and listed[0] is None
    for at, each in enumerate(listed[1:], 1):
        own = each[str(ids[at])]
        assert own["decoded_token"] == text.pieces.name(ids[at])
        assert (own["logprob"], own["rank"]) == (-float(at), at + 1)
        assert (each["7"]["logprob"], each["7"]["rank"]) == (-0.25, 1)
    answer = await whole(client, CHAT, prompt_logprobs=0, max_tokens=1)
    prompt = text.encode_chat(HELLO["messages"])
    assert len(answer["prompt_logprobs"]) == len(prompt)
    assert "prompt_logprobs" not in answer["choices"][0]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (TEXT, {"prompt": "a", "prompt_logprobs": 1, "stream": True}, "$.prompt_logprobs"),
        (TEXT, {"prompt": "a", "prompt_logprobs": 21}, "$.prompt_logprobs"),
        (TEXT, {"prompt": "a", "prompt_logprobs": -1}, "$.prompt_logprobs"),
        (TEXT, {"prompt": "a", "max_tokens": -1}, "$.max_tokens"),
        (CHAT, HELLO | {"prompt_logprobs": 1, "stream": True}, "$.prompt_logprobs"),
    ],
)
async def test_scores_that_cannot_be_given_are_refused_by_name(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any], param: str
):
    refused = await client.post(path, json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert not engine.requests


async def test_a_prompt_with_too_many_scores_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("stretto.server.validation.MOST_SCORES", 40)
    body = {"prompt": [5] * 9, "prompt_logprobs": 4}
    refused = await client.post(TEXT, json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "$.prompt_logprobs")
    assert (await client.post(TEXT, json=body | {"prompt_logprobs": 3})).status_code == 200


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_token_ids_are_those_of_prompt_and_answer(
    client: httpx.AsyncClient, engine: FakeEngine, set_answer: Callable[..., Any], text: TextModel, path: str
):
    set_answer("Hello, world!")
    answer = await whole(client, path, return_token_ids=True)
    (choice,) = answer["choices"]
    prompt = (answer if path == CHAT else choice)["prompt_token_ids"]
    assert prompt == list(engine.requests[-1].prompt)
    assert text.decode(choice["token_ids"]) == "Hello, world!"
    chunks = await streamed(client, path, return_token_ids=True)
    parts = [chunk["choices"][0] for chunk in chunks]
    assert [id for part in parts for id in part.get("token_ids", [])] == choice["token_ids"]
    first = chunks[0] if path == CHAT else parts[0]
    assert first["prompt_token_ids"] == prompt
    assert (
        sum("prompt_token_ids" in chunk or "prompt_token_ids" in chunk["choices"][0] for chunk in chunks) == 1
    )
    plain = await whole(client, path)
    assert "token_ids" not in plain["choices"][0] and "prompt_token_ids" not in str(plain)
