"""The types of Anthropic's Messages API that Stretto implements: requests and responses. No behaviour.

A field that changes the answer is implemented, or its type allows only null and the value that means nothing.
An `Annotation` says something about the request, such as how to cache it, and changes no answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from stretto.protocol.limits import up_to
from stretto.protocol.openai import (
    AnswerReport,
    Description,
    Empty,
    Identifier,
    MaxTokens,
    ModelName,
    ObjectiveFields,
    StopString,
    ToolName,
    UserKey,
    Wire,
)
from stretto.types import BOUNDS, INT32_MAX

Annotation = Any


# Messages


class TextBlock(Wire, frozen=True, kw_only=True, tag_field="type", tag="text"):
    text: str
    cache_control: Annotation = None
    citations: Annotation = None


class ThinkingBlock(Wire, frozen=True, kw_only=True, tag_field="type", tag="thinking"):
    thinking: str
    signature: str | None = None
    cache_control: Annotation = None


class RedactedThinkingBlock(Wire, frozen=True, kw_only=True, tag_field="type", tag="redacted_thinking"):
    """Reasoning that only Anthropic can read. The model does not see it."""

    data: str
    cache_control: Annotation = None


class ToolUseBlock(Wire, frozen=True, kw_only=True, tag_field="type", tag="tool_use"):
    id: Identifier
    name: Identifier
    input: dict[str, Any] | None = None
    cache_control: Annotation = None
    caller: Annotation = None
    toolset_name: Annotation = None


class ToolResultBlock(Wire, frozen=True, kw_only=True, tag_field="type", tag="tool_result"):
    """`is_error` puts the word `Error` before the content, because chat templates have no place for it."""

    tool_use_id: Identifier
    content: str | Annotated[list[TextBlock], up_to("parts")] | None = None
    is_error: bool | None = None
    cache_control: Annotation = None
    toolset_name: Annotation = None


TextBlocks = Annotated[list[TextBlock], up_to("parts")]
UserBlock = TextBlock | ToolResultBlock
AssistantBlock = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock


class SystemTurn(Wire, frozen=True, kw_only=True, tag_field="role", tag="system"):
    content: str | TextBlocks


class UserTurn(Wire, frozen=True, kw_only=True, tag_field="role", tag="user"):
    content: str | Annotated[list[UserBlock], up_to("parts")]


class AssistantTurn(Wire, frozen=True, kw_only=True, tag_field="role", tag="assistant"):
    content: str | Annotated[list[AssistantBlock], up_to("parts")] | None = None


Turn = SystemTurn | UserTurn | AssistantTurn
# Unknown members of these annotate, and are left out.
HISTORY = frozenset(
    {SystemTurn, UserTurn, AssistantTurn, TextBlock, ThinkingBlock, RedactedThinkingBlock}
    | {ToolUseBlock, ToolResultBlock}
)


# Options


class CustomTool(Wire, frozen=True, kw_only=True):
    """`input_schema` is a JSON schema. Tools that run on Anthropic's servers have other types."""

    name: ToolName
    input_schema: dict[str, Any]
    description: Description | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: Annotation = None
    eager_input_streaming: Annotation = None
    input_examples: Annotation = None
    allowed_callers: Annotation = None
    defer_loading: Literal[False] | None = None


class AutoChoice(Wire, frozen=True, kw_only=True, tag_field="type", tag="auto"):
    disable_parallel_tool_use: bool | None = None


class AnyChoice(Wire, frozen=True, kw_only=True, tag_field="type", tag="any"):
    disable_parallel_tool_use: bool | None = None


class ToolChoice(Wire, frozen=True, kw_only=True, tag_field="type", tag="tool"):
    name: Identifier
    disable_parallel_tool_use: bool | None = None


class NoChoice(Wire, frozen=True, kw_only=True, tag_field="type", tag="none"):
    pass


class ThinkingEnabled(Wire, frozen=True, kw_only=True, tag_field="type", tag="enabled"):
    """`budget_tokens` is a target. This server bounds an answer and its reasoning by `max_tokens` alone."""

    budget_tokens: Annotated[int, Meta(ge=1, le=INT32_MAX)] | None = None
    display: Literal["summarized"] | None = None


class ThinkingAdaptive(Wire, frozen=True, kw_only=True, tag_field="type", tag="adaptive"):
    display: Literal["summarized"] | None = None


class ThinkingDisabled(Wire, frozen=True, kw_only=True, tag_field="type", tag="disabled"):
    pass


class SchemaOutput(Wire, frozen=True, kw_only=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Wire, frozen=True, kw_only=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: SchemaOutput | None = None


class KeepThinking(Wire, frozen=True, kw_only=True):
    """All reasoning of earlier answers stays: what this server does anyway."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(Wire, frozen=True, kw_only=True):
    """Edits of the history. The server makes none, so only edits that change nothing are accepted."""

    edits: Annotated[list[KeepThinking], up_to("parts")] | None = None


class RequestMetadata(Wire, frozen=True, kw_only=True):
    user_id: UserKey | None = None


# Requests


class MessagesPrompt(Wire, frozen=True, kw_only=True):
    """What the answer depends on: the request of `count_tokens`. Without `thinking` the model does not
    reason, if it can leave that out."""

    messages: Annotated[list[Turn], up_to("messages", min_length=1)]
    model: ModelName | None = None
    system: str | TextBlocks | None = None
    tools: Annotated[list[CustomTool], up_to("tools")] | None = None
    tool_choice: AutoChoice | AnyChoice | ToolChoice | NoChoice | None = None
    thinking: ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled | None = None
    output_config: OutputConfig | None = None
    cache_control: Annotation = None
    mcp_servers: Empty | None = None
    context_management: ContextManagement | None = None
    speed: Literal["standard"] | None = None


class MessagesRequest(MessagesPrompt, frozen=True, kw_only=True):
    """`service_tier` and `objective` may also be those of the chat completions."""

    max_tokens: MaxTokens
    metadata: RequestMetadata | None = None
    stop_sequences: Annotated[list[StopString], up_to("stop")] | None = None
    stream: bool | None = None
    temperature: Annotated[float, BOUNDS["temperature"]] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=INT32_MAX)] | None = None
    top_p: Annotated[float, BOUNDS["top_p"]] | None = None
    service_tier: Literal["auto", "standard_only", "default", "priority", "flex"] | None = None
    objective: ObjectiveFields | None = None
    inference_geo: Annotation = None
    diagnostics: Annotation = None
    container: None = None


# Responses


class MadeText(Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    text: str
    citations: None = None


class MadeThinking(Struct, frozen=True, kw_only=True, tag_field="type", tag="thinking"):
    """`signature` is the message's id. It proves nothing, and any signature may come back."""

    thinking: str
    signature: str


class MadeToolUse(Struct, frozen=True, kw_only=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


MadeBlock = MadeText | MadeThinking | MadeToolUse
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageUsage(Struct, frozen=True, kw_only=True):
    """Tokens. `input_tokens` leaves out those read from the prefix cache, as Anthropic's does."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0


class MadeMessage(Struct, frozen=True, kw_only=True):
    """An answer in one piece, and the head of a streamed one. A time that ran out is `max_tokens`."""

    id: str
    model: str
    content: list[MadeBlock]
    usage: MessageUsage
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    stretto: AnswerReport | None = None


class TokenCount(Struct, frozen=True):
    input_tokens: int


class AnthropicErrorDetail(Struct, frozen=True):
    type: str
    message: str


class AnthropicError(Struct, frozen=True, kw_only=True):
    error: AnthropicErrorDetail
    request_id: str
    type: Literal["error"] = "error"
