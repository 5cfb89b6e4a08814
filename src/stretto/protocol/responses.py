"""The types of OpenAI's `/v1/responses`: requests, answers and the events of a stream. No behaviour.

An item of the history may have members that this server does not know: they annotate, and are left out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Struct, UnsetType

from stretto.protocol.limits import up_to
from stretto.protocol.openai import (
    AnswerReport,
    CachedTokens,
    Description,
    Generation,
    Identifier,
    JsonObjectFormat,
    MaxTokens,
    Metadata,
    TextFormat,
    ToolName,
    Wire,
)

Summary = Literal["auto", "concise", "detailed"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputPart(Struct, frozen=True, kw_only=True):
    """A text of a message or of reasoning. `refusal` is the text of a part of that type."""

    type: Literal["input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"]
    text: str | None = None
    refusal: str | None = None


InputParts = Annotated[list[InputPart], up_to("parts")]


class InputItem(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One item of a conversation. Which fields it needs depends on its type: a `message` role and content, a
    `function_call` call_id, name and arguments, a `function_call_output` call_id and output, and an
    `item_reference` the id of an item of a kept answer."""

    type: Literal["message", "function_call", "function_call_output", "reasoning", "item_reference"] = (
        "message"
    )
    id: Identifier | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | InputParts | None = None
    summary: InputParts | None = None
    call_id: Identifier | None = None
    name: Identifier | None = None
    arguments: Annotated[str, up_to("arguments")] | None = None
    output: str | InputParts | None = None

    @property
    def refers(self) -> bool:
        """Whether it stands for another item. The type of such an item may be left out."""
        bare = self.type == "message" and self.role is None and self.content is None and self.id is not None
        return bare or self.type == "item_reference"


InputItems = Annotated[list[InputItem], up_to("messages")]
RESPONSE = "resp_"  # how the id of an answer begins


def item_id(prefix: str, response: str, at: int) -> str:
    """The id of an answer's item at that place. It is made of the answer's id: so it is the same when another
    worker goes on, and a gateway finds the worker that keeps the item."""
    return f"{prefix}{response.removeprefix(RESPONSE)}{at:02x}"


def answer_of(item: str) -> str:
    """What begins with the id of the answer that the item belongs to; `item_id` made the item's id."""
    return RESPONSE + item.partition("_")[2]


class FlatTool(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A function that the model may call, with the fields of chat's `tools[].function` beside `type`."""

    type: Literal["function"]
    name: ToolName
    description: Description | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatChoice(Wire, frozen=True, kw_only=True):
    type: Literal["function"]
    name: Identifier


class FlatSchemaFormat(Wire, frozen=True, kw_only=True, tag_field="type", tag="json_schema"):
    name: Identifier
    schema: dict[str, Any]
    description: Description | None = None
    strict: bool | None = None


class TextOptions(Wire, frozen=True, kw_only=True):
    format: TextFormat | JsonObjectFormat | FlatSchemaFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`summary` and `generate_summary` change nothing: the answer has the whole reasoning as text."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Summary | None = None
    generate_summary: Summary | None = None


class ResponseRequest(Generation, frozen=True, kw_only=True):
    """`store` and `previous_response_id` need the setting `response_store`. Without it `store` has no effect,
    and the answer has `store: false`."""

    input: str | InputItems
    instructions: str | None = None
    previous_response_id: Identifier | None = None
    tools: Annotated[list[FlatTool], up_to("tools")] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: MaxTokens | None = None
    max_tokens: None = None
    n: Literal[1] | None = None
    response_format: None = None
    chat_template_kwargs: Annotated[dict[str, Any], up_to("variables")] | None = None
    truncation: Literal["disabled"] | None = None
    include: Annotated[list[Literal["reasoning.encrypted_content"]], up_to("modalities")] | None = None
    background: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    conversation: None = None
    prompt: None = None
    max_tool_calls: None = None


# Answers


class OutputText(Struct, frozen=True, kw_only=True, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class ReasoningText(Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning_text"):
    text: str


class OutputMessage(Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    id: str
    status: ItemStatus
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class OutputReasoning(Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    id: str
    status: ItemStatus
    content: list[ReasoningText]
    summary: list[Any] = []


class OutputCall(Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    """`status` is `incomplete` for a call that was cut, and for text that turned out to be no call."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | OutputReasoning | OutputCall


class ReasoningTokens(Struct, frozen=True):
    reasoning_tokens: int


class ResponseUsage(Struct, frozen=True, kw_only=True):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: CachedTokens
    output_tokens_details: ReasoningTokens


class IncompleteDetails(Struct, frozen=True):
    reason: Literal["max_output_tokens", "deadline"]


class ResponseError(Struct, frozen=True, kw_only=True):
    """`code` is one of OpenAI's; `type` is the code that this server gives the error elsewhere."""

    code: Literal["server_error", "invalid_prompt"]
    message: str
    type: str
    param: str | None = None


class ResponseObject(Struct, frozen=True, kw_only=True):
    """The answer, and in a stream its state. `created_at`: seconds since 1970."""

    id: str
    created_at: int
    model: str
    object: Literal["response"] = "response"
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    output: list[OutputItem] = []
    usage: ResponseUsage | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[FlatTool] = []
    tool_choice: str | FlatChoice = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions(format=TextFormat())
    reasoning: ReasoningOptions = ReasoningOptions()
    max_output_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    truncation: Literal["disabled"] = "disabled"
    background: bool = False
    store: bool = False
    metadata: Metadata = {}
    user: str | None = None
    service_tier: str | None = None
    stretto: AnswerReport | UnsetType = UNSET


class ResponseEvent(Struct, frozen=True, kw_only=True):
    """One event of a stream. Its type decides which of the later fields it has."""

    type: str
    sequence_number: int
    response: ResponseObject | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    item: OutputItem | UnsetType = UNSET
    part: OutputText | ReasoningText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[Any] | UnsetType = UNSET


class DeletedResponse(Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["response.deleted"] = "response.deleted"
    deleted: bool = True
