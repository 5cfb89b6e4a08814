"""Remembers which model or variant answers a call, so that a reward can find it. No text unless asked to."""

from __future__ import annotations

import time
from hashlib import blake2b
from typing import cast

from stretto.ladder.learning.feedback import KeptPrompt, KeptTurn, MadeChoice
from stretto.protocol.openai import ChatRequest, CompletionRequest, Generation, Message, TextPart
from stretto.server.state import Call

EVERYONE = "*"
TEXT_ROLES = ("system", "developer", "user", "assistant")


def remember(call: Call, request: Generation, choice: MadeChoice) -> None:
    """Keep the choice that was made for a call, until its reward comes."""
    config = call.server.config
    if not config.feedback_wait_s:
        return
    request_id, *names = call.feedback_ids or (call.exchange.id,)
    if call.tenant in config.feedback_prompts or EVERYONE in config.feedback_prompts:
        choice = choice._replace(prompt=kept_prompt(request))
    if call.user:
        choice = choice._replace(user=call.user)
    call.server.learner.remember(call.tenant, request_id, choice, time.monotonic(), tuple(names))


def follow(call: Call, request: Generation) -> None:
    """Keep the variant that has answered a call, where the engine moved it to another one than was chosen."""
    made = call.placement.made
    if made is not None and call.outputs and (spoke := call.outputs[0].variant) != made.variant:
        remember(call, request, made._replace(variant=spoke, propensities=()))


def user_of(request: Generation) -> str:
    """What stands for the user of a request; empty when it names none."""
    user = request.user or request.safety_identifier
    return user_key(user) if user else ""


def user_key(user: str) -> str:
    """What stands for a user: a digest, because the name itself is not needed."""
    return blake2b(user.encode(), digest_size=12).hexdigest()


def kept_prompt(request: Generation) -> KeptPrompt | None:
    """The prompt of a request that is all text; None for one with tools, several prompts or token ids."""
    if isinstance(request, CompletionRequest):
        return KeptPrompt(text=request.prompt) if isinstance(request.prompt, str) else None
    if not isinstance(request, ChatRequest) or request.tools:
        return None
    turns = [_turn(message) for message in request.messages]
    whole = [turn for turn in turns if turn is not None]
    return KeptPrompt(tuple(whole)) if len(whole) == len(turns) else None


def _turn(message: Message) -> KeptTurn | None:
    role = str(message.__struct_config__.tag)
    text = _text(message.content)
    calls = getattr(message, "tool_calls", None)
    return None if role not in TEXT_ROLES or text is None or calls else KeptTurn(role, text)


def _text(content: object) -> str | None:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    parts = cast("list[object]", content)
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    return "".join(texts) if len(texts) == len(parts) else None
