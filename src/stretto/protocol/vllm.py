"""The types of vLLM's endpoints for tokens and for its version. No behaviour."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Struct

from stretto.protocol.limits import up_to
from stretto.protocol.openai import Message, ModelName, TokenIds, Tool, Wire


class TokenizeRequest(Wire, frozen=True, kw_only=True):
    """A text in `prompt`, or a chat in `messages`: exactly one of them.

    `add_special_tokens`: whether a text gets the tokenizer's own BOS or EOS; a chat's template writes them.
    `return_token_strs`: whether the answer has each token as the vocabulary spells it.
    """

    model: ModelName | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: Annotated[list[Message], up_to("messages", min_length=1)] | None = None
    tools: Annotated[list[Tool], up_to("tools")] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], up_to("variables")] | None = None
    return_token_strs: bool | None = None


class Tokenized(Struct, frozen=True, kw_only=True):
    """`max_model_len`: the model's context in tokens. A prompt may be longer: it is only counted."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Wire, frozen=True, kw_only=True):
    tokens: TokenIds
    model: ModelName | None = None


class Detokenized(Struct, frozen=True):
    """`prompt` is the text of the tokens, special tokens included."""

    prompt: str


class Version(Struct, frozen=True):
    version: str
