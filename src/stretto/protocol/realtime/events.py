"""The events that clients send to `/v1/realtime`, in the shape of OpenAI's protocol, for text. No behaviour.

The events `input_text.*` are Stretto's own.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from stretto.protocol.openai import Identifier, Wire
from stretto.protocol.realtime.options import ConversationItem, ResponseFields, SessionFields
from stretto.types import INT32_MAX

Place = Annotated[int, Meta(ge=0, le=INT32_MAX)]


class SessionUpdate(Wire, frozen=True, kw_only=True, tag_field="type", tag="session.update"):
    session: SessionFields
    event_id: Identifier | None = None


class ItemCreate(Wire, frozen=True, kw_only=True, tag_field="type", tag="conversation.item.create"):
    """Adds an item after `previous_item_id`: at the end without one, at the beginning for `root`."""

    item: ConversationItem
    previous_item_id: Identifier | None = None
    event_id: Identifier | None = None


class ItemDelete(Wire, frozen=True, kw_only=True, tag_field="type", tag="conversation.item.delete"):
    item_id: Identifier
    event_id: Identifier | None = None


class ItemRetrieve(Wire, frozen=True, kw_only=True, tag_field="type", tag="conversation.item.retrieve"):
    item_id: Identifier
    event_id: Identifier | None = None


class ItemTruncate(Wire, frozen=True, kw_only=True, tag_field="type", tag="conversation.item.truncate"):
    """Keeps the first `text_end` characters of an answer. `audio_end_ms`, where OpenAI's clients say how much
    was heard, may only be 0: nothing is kept."""

    item_id: Identifier
    content_index: Literal[0] = 0
    audio_end_ms: Literal[0] | None = None
    text_end: Place = 0
    event_id: Identifier | None = None


class ResponseCreate(Wire, frozen=True, kw_only=True, tag_field="type", tag="response.create"):
    response: ResponseFields | None = None
    event_id: Identifier | None = None


class ResponseCancel(Wire, frozen=True, kw_only=True, tag_field="type", tag="response.cancel"):
    response_id: Identifier | None = None
    event_id: Identifier | None = None


class TextAppend(Wire, frozen=True, kw_only=True, tag_field="type", tag="input_text.append"):
    """Adds to the end of the message that is being typed."""

    text: str
    event_id: Identifier | None = None


class TextReplace(Wire, frozen=True, kw_only=True, tag_field="type", tag="input_text.replace"):
    """Replaces the characters from `start` to `end` of the message that is being typed: all of it without
    both. They count Unicode characters, as Python does."""

    text: str
    start: Place = 0
    end: Place | None = None
    event_id: Identifier | None = None


class TextClear(Wire, frozen=True, kw_only=True, tag_field="type", tag="input_text.clear"):
    """Drops the message that is being typed."""

    event_id: Identifier | None = None


class TextCommit(Wire, frozen=True, kw_only=True, tag_field="type", tag="input_text.commit"):
    """Sends the message that was typed, and asks for a response. A response that runs ends first."""

    response: ResponseFields | None = None
    create_response: bool = True
    event_id: Identifier | None = None


ClientEvent = (
    SessionUpdate
    | ItemCreate
    | ItemDelete
    | ItemRetrieve
    | ItemTruncate
    | ResponseCreate
    | ResponseCancel
    | TextAppend
    | TextReplace
    | TextClear
    | TextCommit
)


class EventHead(Struct, frozen=True, kw_only=True):
    """What an error says of an event that does not parse."""

    type: str | None = None
    event_id: str | None = None
