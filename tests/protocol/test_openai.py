"""The wire types: they refuse unknown fields, cover every OpenAI field, and read null as absent."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

import msgspec
import pytest
from msgspec import ValidationError, json
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params

from stretto.protocol import openai
from stretto.protocol.openai import ChatRequest, CompletionRequest, Delta, EmbeddingRequest, Generation, Wire

MESSAGES = [{"role": "user", "content": "Hi"}]
REQUESTS: dict[type[Wire], dict[str, Any]] = {
    ChatRequest: {"messages": MESSAGES},
    CompletionRequest: {"prompt": "Hi"},
    EmbeddingRequest: {"input": "Hi"},
}
# Fields that OpenAI's client can send and Stretto refuses as unknown.
UNKNOWN = {
    ChatRequest: {"moderation", "prompt_cache_options", "prompt_cache_retention"},
    CompletionRequest: set[str](),
    EmbeddingRequest: set[str](),
}
THEIRS = {
    ChatRequest: chat_create_params.CompletionCreateParamsStreaming,
    CompletionRequest: completion_create_params.CompletionCreateParamsStreaming,
    EmbeddingRequest: embedding_create_params.EmbeddingCreateParams,
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_every_openai_field_is_known_or_refused(kind: type[Wire]) -> None:
    theirs = set(get_type_hints(THEIRS[kind]))
    assert theirs - set(kind.__struct_fields__) == UNKNOWN[kind]


@pytest.mark.parametrize("kind", REQUESTS)
def test_null_is_the_same_as_absent(kind: type[Wire]) -> None:
    required = REQUESTS[kind]
    optional = {name: None for name in kind.__struct_fields__ if name not in required}
    assert json.decode(json.encode(required | optional), type=kind) == msgspec.convert(required, kind)


def test_every_request_type_refuses_unknown_fields() -> None:
    sent = [part for _, part in inspect.getmembers(openai, inspect.isclass) if issubclass(part, Wire)]
    assert len(sent) > 20
    assert Generation in sent
    for part in sent:
        assert part.__struct_config__.forbid_unknown_fields
        assert part.__struct_config__.frozen


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (
            {"messages": [*MESSAGES, {"role": "user", "content": [{"type": "text"}]}]},
            r"\$\.messages\[1\]\.content\[0\]",
        ),
        ({"messages": MESSAGES, "stop": [1]}, r"\$\.stop\[0\]"),
        ({"messages": MESSAGES, "logit_bias": {"1": "much"}}, r"\$\.logit_bias"),
        (
            {"messages": MESSAGES, "tools": [{"type": "function", "function": {}}]},
            r"\$\.tools\[0\]\.function",
        ),
        ({"messages": MESSAGES, "audio": {}}, r"\$\.audio"),
    ],
)
def test_errors_name_the_path(body: dict[str, Any], path: str) -> None:
    with pytest.raises(ValidationError, match=path):
        json.decode(json.encode(body), type=ChatRequest)


def test_a_delta_omits_unset_fields() -> None:
    assert json.encode(Delta()) == b"{}"
    assert json.encode(Delta(content="")) == b'{"content":""}'
    assert (
        json.encode(Delta(role="assistant", content='"\n😀'))
        == '{"role":"assistant","content":"\\"\\n😀"}'.encode()
    )
