"""What a session and a response of `/v1/realtime` are made of: items of a conversation, and options.

Older clients name some fields otherwise: `modalities`, `max_response_output_tokens`. What concerns audio is
typed `None`: it is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from stretto.protocol.limits import up_to
from stretto.protocol.openai import (
    BOUNDS,
    Empty,
    Identifier,
    MaxTokens,
    Metadata,
    ModelName,
    ObjectiveFields,
    Wire,
)
from stretto.protocol.responses import FlatChoice, FlatTool, InputItem, ReasoningOptions, TextOptions

TextOnly = Annotated[list[Literal["text"]], up_to("modalities")]


class ConversationItem(InputItem, frozen=True, kw_only=True, omit_defaults=True):
    """An item of a conversation: a message, a call of a function, or its output. An `item_reference` stands
    for the item with that id."""

    id: Identifier | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class TurnOptions(Wire, frozen=True, kw_only=True):
    """What a session sets for all its responses, and a response for itself."""

    instructions: str | None = None
    output_modalities: TextOnly | None = None
    modalities: TextOnly | None = None
    tools: Annotated[list[FlatTool], up_to("tools")] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: MaxTokens | Literal["inf"] | None = None
    max_response_output_tokens: MaxTokens | Literal["inf"] | None = None
    temperature: Annotated[float, BOUNDS["temperature"]] | None = None
    top_p: Annotated[float, BOUNDS["top_p"]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    chat_template_kwargs: Annotated[dict[str, Any], up_to("variables")] | None = None
    objective: ObjectiveFields | None = None
    service_tier: Literal["auto", "default", "priority", "flex"] | None = None
    audio: None = None
    voice: None = None
    output_audio_format: None = None
    prompt: None = None


class SessionFields(TurnOptions, frozen=True, kw_only=True):
    """A session. A field that is absent keeps its value."""

    type: Literal["realtime"] | None = None
    model: ModelName | None = None
    include: Empty | None = None
    truncation: Literal["disabled"] | None = None
    tracing: None = None
    speed: None = None
    turn_detection: None = None
    input_audio_format: None = None
    input_audio_transcription: None = None
    input_audio_noise_reduction: None = None


class ResponseFields(TurnOptions, frozen=True, kw_only=True):
    """A response. `input` takes the place of the conversation. With `conversation` `none` the response is not
    added to it."""

    conversation: Literal["auto", "none"] | None = None
    input: Annotated[list[ConversationItem], up_to("messages")] | None = None
    metadata: Metadata | None = None
