"""The types of vLLM's endpoints for tokens, scores and ranks, and for its version. No behaviour.

The endpoints for tokens take llama.cpp's fields too, as both servers have them at the same paths.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Struct

from stretto.protocol.limits import up_to
from stretto.protocol.openai import (
    EmbeddingUsage,
    Message,
    ModelName,
    Positive,
    TokenIds,
    Tool,
    TotalObjective,
    UserKey,
    Wire,
)

Texts = Annotated[list[str], up_to("prompts", min_length=1)]


class TokenizeRequest(Wire, frozen=True, kw_only=True):
    """A text in `prompt`, a chat in `messages`, or a text in `content` as llama.cpp has it: one of them.

    `add_special_tokens`: whether a text gets the tokenizer's own BOS or EOS; a chat's template writes them.
    `add_special` is the same for `content`, and false by default. `return_token_strs`: whether the answer has
    each token as the vocabulary spells it. `with_pieces`: whether each token comes with its text.
    """

    model: ModelName | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: Annotated[list[Message], up_to("messages", min_length=1)] | None = None
    tools: Annotated[list[Tool], up_to("tools")] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], up_to("variables")] | None = None
    return_token_strs: bool | None = None
    content: str | None = None
    add_special: bool | None = None
    parse_special: Literal[True] | None = None
    with_pieces: bool | None = None


class TokenPiece(Struct, frozen=True, kw_only=True):
    """A token and its text; its bytes, if they are no whole text."""

    id: int
    piece: str | list[int]


class Tokenized(Struct, frozen=True, kw_only=True):
    """`max_model_len`: the model's context in tokens. A prompt may be longer: it is only counted."""

    count: int
    max_model_len: int
    tokens: list[int | TokenPiece]
    token_strs: list[str] | None = None


class DetokenizeRequest(Wire, frozen=True, kw_only=True):
    tokens: TokenIds
    model: ModelName | None = None


class Detokenized(Struct, frozen=True):
    """The text of the tokens, special tokens included: `content` is llama.cpp's name for it."""

    prompt: str
    content: str


class ScoreRequest(Wire, frozen=True, kw_only=True):
    """Pairs of texts: one text with each of a list, or two lists of the same length."""

    text_1: str | Texts
    text_2: str | Texts
    model: ModelName | None = None
    user: UserKey | None = None
    cache_salt: UserKey | None = None
    objective: TotalObjective | None = None


class Score(Struct, frozen=True, kw_only=True):
    index: int
    score: float
    object: str = "score"


class Scores(Struct, frozen=True, kw_only=True):
    id: str
    created: int
    model: str
    data: list[Score]
    usage: EmbeddingUsage
    object: str = "list"


class RerankDocument(Wire, frozen=True, kw_only=True):
    """A document as Cohere and Jina write it. Its other members, such as an id, are left out."""

    text: str


class RerankRequest(Wire, frozen=True, kw_only=True):
    """`documents`: texts, or objects with a `text`. `top_n`: how many documents the answer lists; by default
    all. `return_documents`: whether the texts of the documents are in it."""

    query: str
    documents: Annotated[list[str | RerankDocument], up_to("prompts", min_length=1)]
    model: ModelName | None = None
    top_n: Positive | None = None
    return_documents: bool | None = None
    user: UserKey | None = None
    cache_salt: UserKey | None = None
    objective: TotalObjective | None = None


class RankedText(Struct, frozen=True):
    text: str


class RankedDocument(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`index`: the document's place in the request."""

    index: int
    relevance_score: float
    document: RankedText | None = None


class Ranking(Struct, frozen=True, kw_only=True):
    """`results`: the best document first."""

    id: str
    model: str
    results: list[RankedDocument]
    usage: EmbeddingUsage


class Version(Struct, frozen=True):
    version: str
