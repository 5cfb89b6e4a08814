"""Makes the chat request of a response from the options of its session and its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from msgspec import UNSET, structs

from stretto.protocol.openai import ChatRequest, SystemMessage
from stretto.protocol.realtime.options import ConversationItem, ResponseFields, SessionFields, TurnOptions
from stretto.protocol.responses import ResponseRequest
from stretto.server.adapters.response_items import ItemConversation
from stretto.server.adapters.responses import NAMES, chat_of

OLDER = {"modalities": "output_modalities", "max_response_output_tokens": "max_output_tokens"}
PASSED = (
    *("instructions", "tools", "tool_choice", "parallel_tool_calls", "temperature", "top_p", "seed", "text"),
    *("reasoning", "chat_template_kwargs", "objective", "service_tier"),
)


class AskedTurn(NamedTuple):
    """A response to generate. `names`: where the client sent what the fields of the request come from."""

    chat: ChatRequest
    names: list[tuple[str, str]]


def updated(session: SessionFields, new: SessionFields) -> SessionFields:
    """The session with the fields that are set anew, each under its present name."""
    return structs.replace(session, **_set(new))


def asked(
    session: SessionFields, response: ResponseFields, items: Sequence[ConversationItem], salt: str
) -> AskedTurn:
    """The request of a response to these items. `salt` separates its prompt in the prefix cache from those of
    other sessions. Raises InvalidRequest."""
    fields = _set(session) | _set(response)
    limit = fields.get("max_output_tokens", "inf")
    request = ResponseRequest(
        input="",
        model=session.model,
        max_output_tokens=None if limit == "inf" else limit,
        stream=True,
        cache_salt=salt,
        **{name: fields[name] for name in PASSED if name in fields},
    )
    conversation = ItemConversation()
    if request.instructions:
        conversation.messages.append(SystemMessage(content=request.instructions))
    for item in items:
        conversation.add(item, f"the item {item.id}")
    conversation.end_answer()
    chat = chat_of(request, conversation.messages)
    return AskedTurn(chat, [*conversation.names(), ("$.messages", "the conversation"), *NAMES])


def shown_options(session: SessionFields, response: ResponseFields | None = None) -> dict[str, Any]:
    """The options as clients see them, under both names where there are two."""
    fields = _set(session) | ({} if response is None else _set(response))
    modalities = fields.get("output_modalities", ["text"])
    limit = fields.get("max_output_tokens", "inf")
    return {
        "output_modalities": modalities,
        "modalities": modalities,
        "instructions": fields.get("instructions", ""),
        "tools": fields.get("tools", []),
        "tool_choice": fields.get("tool_choice", "auto"),
        "parallel_tool_calls": fields.get("parallel_tool_calls", True),
        "max_output_tokens": limit,
        "max_response_output_tokens": limit,
        "temperature": fields.get("temperature", 1.0),
        "top_p": fields.get("top_p", 1.0),
        "reasoning": fields.get("reasoning"),
        "objective": fields.get("objective"),
        "service_tier": fields.get("service_tier", "auto"),
        "truncation": "disabled",
        "tracing": None,
    }


def _set(options: TurnOptions) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in options.__struct_fields__:
        value = getattr(options, name)
        if value is not None and value is not UNSET:
            found[OLDER.get(name, name)] = value
    return found
