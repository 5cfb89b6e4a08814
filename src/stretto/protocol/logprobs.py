"""How answers list log-probabilities of tokens: the chat's way, the completions' way, and vLLM's for prompts.

No behaviour.
"""

from __future__ import annotations

from msgspec import Struct


class TopLogprob(Struct, frozen=True):
    """`bytes` are the token's UTF-8 bytes, which may split a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob, frozen=True):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    content: list[TokenLogprob]


class TextLogprobs(Struct, frozen=True):
    """Parallel lists, one entry per token. `text_offset` counts characters of the choice's text. The first
    token of a prompt follows nothing, so it has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Struct, frozen=True):
    """A token at a place of the prompt. `rank`: how many tokens are at least as likely there."""

    logprob: float
    rank: int
    decoded_token: str


# For each token of a prompt, by token id: itself and the likeliest ones. The first token has none.
PromptLogprobs = list[dict[str, PromptLogprob] | None]
