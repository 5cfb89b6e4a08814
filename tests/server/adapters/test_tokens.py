"""vLLM's endpoints, keys in `x-api-key`, and paths that end in a slash."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import structs

from stretto.config import ServeConfig
from stretto.text.tokenizer import TextModel
from stretto.types import Reason, TokenEvent
from tests.server.checkpoint import sentencepiece, write
from tests.server.conftest import CHAT, HELLO
from tests.server.fake_engine import FakeEngine, build, info

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TEXT = "Grüße 世界 <|stop|> 😀"


async def test_a_text_becomes_tokens_and_the_tokens_become_the_text(
    client: httpx.AsyncClient, text: TextModel
) -> None:
    found = (await client.post("/tokenize", json={"model": "tiny", "prompt": TEXT})).json()
    assert found["tokens"] == text.encode(TEXT)
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 512)
    assert found["token_strs"] is None
    back = await client.post("/detokenize", json={"model": "tiny", "tokens": found["tokens"]})
    assert back.json() == {"prompt": TEXT, "content": TEXT}
    spelt = await client.post("/tokenize", json={"prompt": "Hi", "return_token_strs": True})
    assert spelt.json()["token_strs"] == [text.tokenizer.id_to_token(id) for id in spelt.json()["tokens"]]
    assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": "", "content": ""}


async def test_llama_cpp_calls_the_text_content(client: httpx.AsyncClient, text: TextModel) -> None:
    found = (await client.post("/tokenize", json={"content": TEXT})).json()
    assert found["tokens"] == text.encode(TEXT, special=False)
    pieces = (await client.post("/tokenize", json={"content": TEXT, "with_pieces": True})).json()["tokens"]
    assert [each["id"] for each in pieces] == found["tokens"]
    parts = [each["piece"] for each in pieces]
    assert (
        b"".join(part.encode() if isinstance(part, str) else bytes(part) for part in parts) == TEXT.encode()
    )


async def test_special_tokens_are_added_to_a_text_by_the_default_of_each_server(tmp_path: Path) -> None:
    path = write(tmp_path, sentencepiece(), None, eos="</s>", bos="<s>")
    text = TextModel(path)
    whole, bare = text.encode("Hello"), text.encode("Hello", special=False)
    assert whole != bare
    vector: list[TokenEvent | Reason] = [TokenEvent(0, embedding=(1.0,)), Reason.STOP]
    models = {"llama": info("llama", vocab=text.largest_id + 1)}
    engine = FakeEngine(lambda request: vector if request.task == "embed" else [5], models)
    transport = httpx.ASGITransport(build(ServeConfig(port=0), engine, {"llama": path}))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for body, tokens in (
            ({"prompt": "Hello"}, whole),
            ({"prompt": "Hello", "add_special_tokens": False}, bare),
            ({"prompt": "Hello", "add_special_tokens": False, "mm_processor_kwargs": None}, bare),
            ({"content": "Hello"}, bare),
            ({"content": "Hello", "add_special": True, "parse_special": True}, whole),
        ):
            assert (await client.post("/tokenize", json=body)).json()["tokens"] == tokens, body
        for more, tokens in (({}, whole), ({"add_special_tokens": False, "unknown": None}, bare)):
            for path, body in (
                ("/v1/completions", {"prompt": "Hello"}),
                ("/v1/embeddings", {"input": "Hello"}),
            ):
                assert (await client.post(path, json=body | more)).status_code == 200
                assert engine.requests[-1].prompt == tuple(tokens)


async def test_a_chat_becomes_the_tokens_that_the_engine_gets(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for chat in (HELLO, HELLO | {"tools": [TOOL]}, HELLO | {"add_special_tokens": False}):
        await client.post(CHAT, json=chat)
        found = (await client.post("/tokenize", json=chat)).json()
        assert tuple(found["tokens"]) == engine.requests[-1].prompt
    open_ended = (await client.post("/tokenize", json=HELLO | {"add_generation_prompt": False})).json()
    assert 0 < open_ended["count"] < found["count"]


async def test_a_prompt_longer_than_the_context_is_counted(client: httpx.AsyncClient) -> None:
    found = (await client.post("/tokenize", json={"prompt": "a b " * 5000})).json()
    assert found["count"] > found["max_model_len"] == 512


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "$.prompt"),
        ("/tokenize", HELLO | {"prompt": "Hi"}, "$.prompt"),
        ("/tokenize", {"prompt": "Hi", "model": "gpt-7"}, "$.model"),
        ("/tokenize", {"prompt": ["Hi"]}, "$.prompt"),
        ("/tokenize", {"prompt": "Hi", "content": "Hi"}, "$.prompt"),
        ("/tokenize", {"prompt": "Hi", "tools": [TOOL]}, "$.tools"),
        ("/tokenize", {"prompt": "Hi", "add_special": False}, "$.add_special"),
        ("/tokenize", {"content": "Hi", "parse_special": False}, "$.parse_special"),
        ("/tokenize", HELLO | {"add_special_tokens": True}, "$.add_special_tokens"),
        ("/tokenize", {"prompt": "Hi", "colour": 1}, "$.colour"),
        ("/tokenize", HELLO | {"chat_template_kwargs": {"nothing": 1}}, "$.chat_template_kwargs.nothing"),
        ("/detokenize", {"tokens": [10**6]}, "$.tokens"),
        ("/detokenize", {"tokens": [-1]}, "$.tokens[0]"),
        ("/detokenize", {}, "$.tokens"),
    ],
)
async def test_a_wrong_field_is_named(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str
) -> None:
    response = await client.post(path, json=body)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"].startswith(param)


async def test_the_version_is_that_of_the_package(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json() == {"version": version("stretto")}


async def test_every_path_may_have_more_slashes(client: httpx.AsyncClient) -> None:
    for path in ("/v1/models/", "/v1//models/tiny/", "/health///", "//version/"):
        assert (await client.get(f"http://localhost{path}")).status_code == 200, path
    assert (await client.post(f"{CHAT}/", json=HELLO)).status_code == 200
    assert (await client.get("/")).status_code == 200
    assert (await client.get("/nothing/")).status_code == 404


@pytest.fixture
def config() -> ServeConfig:
    return ServeConfig(port=0, api_keys={"key-of-ann": "ann"})


@pytest.fixture(autouse=True)
def key(client: httpx.AsyncClient) -> None:
    client.headers["x-api-key"] = "key-of-ann"


async def test_a_key_may_come_in_either_header(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    del client.headers["x-api-key"]
    right = {"x-api-key": "key-of-ann"}, {"authorization": "Bearer key-of-ann"}
    wrong: list[dict[str, str]] = [
        {},
        {"x-api-key": "key"},
        {"x-api-key": "Bearer key-of-ann"},
        {"authorization": "key-of-ann"},
    ]
    for headers in right:
        assert (await client.post(CHAT, json=HELLO, headers=headers)).status_code == 200
        assert structs.asdict(engine.requests[-1])["tenant"] == "ann"
    for headers in wrong:
        assert (await client.post(CHAT, json=HELLO, headers=headers)).status_code == 401
    mixed = {"x-api-key": "key-of-ann", "authorization": "Bearer none"}
    assert (await client.post(CHAT, json=HELLO, headers=mixed)).status_code == 200
