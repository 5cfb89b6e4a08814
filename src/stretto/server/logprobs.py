"""Writes log-probabilities of tokens as the APIs list them."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Sequence

from stretto.protocol.logprobs import (
    ChatLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TextLogprobs,
    TokenLogprob,
    TopLogprob,
)
from stretto.text.detokenizer import Pieces
from stretto.text.output import Output
from stretto.types import TokenEvent


def chat_logprobs(pieces: Pieces, events: list[TokenEvent], offset: int) -> ChatLogprobs:
    """Log probabilities as chat completions have them. `offset` is for the other style."""
    content: list[TokenLogprob] = []
    for event in events:
        if event.token is not None and event.logprobs is not None:
            own = _top_logprob(pieces, event.token, event.logprobs.chosen)
            top = [_top_logprob(pieces, token, logprob) for token, logprob in event.logprobs.top]
            content.append(TokenLogprob(own.token, own.logprob, own.bytes, top))
    return ChatLogprobs(content)


def text_logprobs(pieces: Pieces, events: list[TokenEvent], offset: int) -> TextLogprobs:
    """Log probabilities as plain completions have them, for text that begins `offset` characters in."""
    found = TextLogprobs([], [], [], [])
    characters = getincrementaldecoder("utf-8")("replace")
    for event in events:
        if event.token is None:
            continue
        scores = event.logprobs
        found.tokens.append(pieces.name(event.token))
        found.token_logprobs.append(None if scores is None else scores.chosen)
        found.top_logprobs.append(None if scores is None else _by_name(pieces, scores.top))
        found.text_offset.append(offset)
        offset += len(characters.decode(pieces[event.token]))
    return found


def _by_name(pieces: Pieces, top: Sequence[tuple[int, float]]) -> dict[str, float]:
    named: dict[str, float] = {}
    for id, logprob in top:
        name = pieces.name(id)
        named[f"token_id:{id}" if name in named else name] = logprob
    return named


def scored_prompt(output: Output) -> list[TokenEvent]:
    """The tokens of the prompt with their log-probabilities, which the first one lacks. Empty before the
    engine has computed them."""
    scores = None if output.began is None else output.began.prompt_logprobs
    if scores is None:
        return []
    tokens = output.request.prompt
    return [TokenEvent(0, token, score) for token, score in zip(tokens, (None, *scores), strict=False)]


def prompt_logprobs(pieces: Pieces, events: list[TokenEvent]) -> PromptLogprobs:
    """Log-probabilities of a prompt as vLLM lists them: each token by its id, then the likeliest ones."""
    found: PromptLogprobs = []
    for event in events:
        scores = event.logprobs
        if scores is None or event.token is None:
            found.append(None)
            continue
        listed = [(event.token, scores.chosen, scores.rank or 0)]
        listed += [(id, logprob, rank) for rank, (id, logprob) in enumerate(scores.top, 1)]
        entries = {
            id: PromptLogprob(logprob, rank, pieces.name(id)) for id, logprob, rank in reversed(listed)
        }
        found.append({str(id): entries[id] for id, _, _ in listed})
    return found


def _top_logprob(pieces: Pieces, token: int, logprob: float) -> TopLogprob:
    return TopLogprob(pieces.name(token), logprob, list(pieces[token]))
