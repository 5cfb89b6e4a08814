"""The types of OpenAI's API that Stretto implements: requests, responses and errors. No behaviour.

Every field is implemented or refused. An unknown field is an error. A field of a feature that Stretto lacks
is typed `None`: null is accepted, and any other value is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

from stretto.protocol.extensions.report import AnswerReport
from stretto.protocol.limits import up_to
from stretto.protocol.logprobs import ChatLogprobs, PromptLogprobs, TextLogprobs
from stretto.types import (
    BOUNDS,
    INT32_MAX,
    Milliseconds,
    Preference,
    QualityFloor,
)

Positive = Annotated[int, Meta(ge=1, le=INT32_MAX)]
TokenId = Annotated[int, Meta(ge=0, le=INT32_MAX)]
TokenIds = Annotated[list[TokenId], up_to("token_ids")]
StopString = Annotated[str, up_to("stop_string", min_length=1)]
Identifier = Annotated[str, up_to("identifier")]
UserKey = Annotated[str, up_to("user")]
ModelName = Annotated[str, up_to("model")]
Description = Annotated[str, up_to("description")]
Bias = Annotated[float, BOUNDS["logit_bias"]]
MaxTokens = Annotated[int, Meta(ge=1, le=INT32_MAX)]
TopLogprobs = Annotated[int, BOUNDS["logprobs"]]
ToolName = Annotated[str, up_to("tool_name", pattern=r"^[a-zA-Z0-9_.:\-]{1,64}$", min_length=1)]
Empty = Annotated[list[Any], Meta(max_length=0)]
MetadataKey = Annotated[str, up_to("metadata_key")]
MetadataValue = Annotated[str, up_to("metadata_value")]
Metadata = Annotated[dict[MetadataKey, MetadataValue], up_to("metadata")]


class Wire(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The base of request types. An absent field and a null field mean the same."""


# Messages. `extra` holds the members that a template may know and this server does not. Clients send them
# beside the others; `compatibility` puts them under this name, which no client uses.
TEMPLATE_MEMBERS = "members for the template"


class TextPart(Wire, frozen=True, kw_only=True, tag_field="type", tag="text"):
    text: str


class RefusalPart(Wire, frozen=True, kw_only=True, tag_field="type", tag="refusal"):
    refusal: str


class CalledFunction(Wire, frozen=True, kw_only=True):
    """`arguments` is a JSON object written as a string, as the model wrote it."""

    name: Identifier
    arguments: Annotated[str, up_to("arguments")]


class ToolCall(Wire, frozen=True, kw_only=True):
    id: Identifier
    function: CalledFunction
    type: Literal["function"] = "function"


TextParts = Annotated[list[TextPart], up_to("parts")]


class SystemMessage(Wire, frozen=True, kw_only=True, tag_field="role", tag="system"):
    content: str | TextParts
    name: Identifier | None = None
    extra: dict[str, Any] | None = field(default=None, name=TEMPLATE_MEMBERS)


class DeveloperMessage(Wire, frozen=True, kw_only=True, tag_field="role", tag="developer"):
    content: str | TextParts
    name: Identifier | None = None
    extra: dict[str, Any] | None = field(default=None, name=TEMPLATE_MEMBERS)


class UserMessage(Wire, frozen=True, kw_only=True, tag_field="role", tag="user"):
    content: str | TextParts
    name: Identifier | None = None
    extra: dict[str, Any] | None = field(default=None, name=TEMPLATE_MEMBERS)


class AssistantMessage(Wire, frozen=True, kw_only=True, tag_field="role", tag="assistant"):
    """An earlier answer. Every field of a response may come back in the next request."""

    content: str | Annotated[list[TextPart | RefusalPart], up_to("parts")] | None = None
    name: Identifier | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], up_to("tool_calls")] | None = None
    extra: dict[str, Any] | None = field(default=None, name=TEMPLATE_MEMBERS)


class ToolMessage(Wire, frozen=True, kw_only=True, tag_field="role", tag="tool"):
    content: str | TextParts
    tool_call_id: Identifier
    name: Identifier | None = None
    extra: dict[str, Any] | None = field(default=None, name=TEMPLATE_MEMBERS)


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


# Options


class Function(Wire, frozen=True, kw_only=True):
    """`parameters` is a JSON schema. With `strict` every call satisfies it."""

    name: ToolName
    description: Description | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Wire, frozen=True, kw_only=True):
    type: Literal["function"]
    function: Function


class ChosenFunction(Wire, frozen=True, kw_only=True):
    name: Identifier


class ChosenTool(Wire, frozen=True, kw_only=True):
    type: Literal["function"]
    function: ChosenFunction


class StreamOptions(Wire, frozen=True, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class TextFormat(Wire, frozen=True, kw_only=True, tag_field="type", tag="text"):
    pass


class JsonObjectFormat(Wire, frozen=True, kw_only=True, tag_field="type", tag="json_object"):
    pass


class NamedSchema(Wire, frozen=True, kw_only=True):
    name: Identifier
    schema: dict[str, Any]
    description: Description | None = None
    strict: bool | None = None


class JsonSchemaFormat(Wire, frozen=True, kw_only=True, tag_field="type", tag="json_schema"):
    json_schema: NamedSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


Choice = Annotated[str, up_to("schema", min_length=1)]


class StructuredOutputs(Wire, frozen=True, kw_only=True):
    """vLLM's extension of `response_format`. Exactly one field is set."""

    json: Annotated[str, up_to("schema")] | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: Annotated[str, up_to("regex")] | None = None
    choice: Annotated[list[Choice], up_to("choices", min_length=1)] | None = None
    whitespace_pattern: Annotated[str, up_to("stop_string", min_length=1)] | None = None


class ObjectiveFields(Wire, frozen=True, kw_only=True):
    """The objective of a request; times are milliseconds. An absent limit is that of the tier.

    `prefer`: by what a variant is chosen among those that are on time; absent: the server's setting.
    `cascade`: whether a small variant may begin the answer; absent: the server's setting.
    """

    ttft_ms: Milliseconds | None = None
    itl_ms: Milliseconds | None = None
    total_ms: Milliseconds | None = None
    min_quality: QualityFloor | None = None
    prefer: Preference | None = None
    cascade: bool | None = None
    on_miss: Literal["degrade", "reject", "late"] | None = None


class TotalObjective(Wire, frozen=True, kw_only=True):
    """The objective of an embedding request, which has no stream of tokens."""

    total_ms: Milliseconds | None = None


class CacheFields(Wire, frozen=True, kw_only=True):
    """What a gateway's cache may do with the answer. A worker by itself keeps no answers.

    `mode`: `use` keeps and takes also an answer drawn at random, `refresh` replaces the kept answer, `bypass`
    neither takes nor keeps one. `personal`: the request holds personal data, so its answer is never kept.
    """

    mode: Literal["use", "refresh", "bypass"] | None = None
    personal: bool | None = None


# Requests


class Generation(Wire, frozen=True, kw_only=True):
    """The fields that chat and plain completions share. `top_k` of 0 or -1 means no limit, as in vLLM.

    `user`, `safety_identifier`, `prompt_cache_key` and `cache_salt` separate the prefix cache: requests share
    KV blocks only when all four are equal. The response repeats `metadata`, and the server does not store it.
    """

    model: ModelName | None = None
    max_tokens: MaxTokens | None = None
    min_tokens: Annotated[int, BOUNDS["min_tokens"]] | None = None
    temperature: Annotated[float, BOUNDS["temperature"]] | None = None
    top_p: Annotated[float, BOUNDS["top_p"]] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=INT32_MAX)] | None = None
    min_p: Annotated[float, BOUNDS["min_p"]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, BOUNDS["n"]] | None = None
    stop: StopString | Annotated[list[StopString], up_to("stop")] | None = None
    stop_token_ids: Annotated[list[TokenId], up_to("stop_token_ids")] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: TopLogprobs | None = None
    return_token_ids: bool | None = None
    truncate_prompt_tokens: Positive | None = None
    presence_penalty: Annotated[float, BOUNDS["presence_penalty"]] | None = None
    frequency_penalty: Annotated[float, BOUNDS["frequency_penalty"]] | None = None
    repetition_penalty: Annotated[float, BOUNDS["repetition_penalty"]] | None = None
    logit_bias: Annotated[dict[int, Bias], up_to("logit_bias")] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    service_tier: Literal["auto", "default", "priority", "flex"] | None = None
    objective: ObjectiveFields | None = None
    user: UserKey | None = None
    safety_identifier: UserKey | None = None
    prompt_cache_key: UserKey | None = None
    cache_salt: UserKey | None = None
    cache: CacheFields | None = None
    metadata: Metadata | None = None
    store: bool | None = None


class ChatRequest(Generation, frozen=True, kw_only=True):
    messages: Annotated[list[Message], up_to("messages", min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Annotated[list[Tool], up_to("tools")] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], up_to("variables")] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: Annotated[list[Literal["text"]], up_to("modalities")] | None = None
    audio: None = None
    function_call: None = None
    functions: None = None
    prediction: None = None
    verbosity: None = None
    web_search_options: None = None


class CompletionRequest(Generation, frozen=True, kw_only=True):
    """A prompt is a text, token ids, or a list of either. Special token ids are allowed. Without
    `add_special_tokens: false`, a text gets the tokenizer's own BOS or EOS."""

    prompt: str | Annotated[list[str | TokenId | TokenIds], up_to("token_ids", min_length=1)]
    max_tokens: Annotated[int, BOUNDS["max_tokens"]] | None = None
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    best_of: Positive | None = None
    add_special_tokens: bool | None = None
    suffix: None = None


class EmbeddingRequest(Wire, frozen=True, kw_only=True):
    input: str | Annotated[list[str | TokenId | TokenIds], up_to("token_ids", min_length=1)]
    model: ModelName | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    add_special_tokens: bool | None = None
    user: UserKey | None = None
    cache_salt: UserKey | None = None
    cache: CacheFields | None = None
    objective: TotalObjective | None = None


# Responses


class CachedTokens(Struct, frozen=True):
    cached_tokens: int


class Usage(Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class FunctionDelta(Struct, frozen=True, omit_defaults=True):
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallDelta(Struct, frozen=True, kw_only=True):
    """A part of a tool call. Only the first part of each `index` has the id and the name."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(Struct, frozen=True, kw_only=True, gc=False):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


FinishReason = Literal["stop", "length", "tool_calls", "deadline"]


class ChunkChoice(Struct, frozen=True, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | UnsetType = UNSET


class AnswerFields(Struct, frozen=True, kw_only=True):
    """The fields that all answers and chunks have. `created`: seconds since 1970."""

    id: str
    created: int
    model: str
    service_tier: str | UnsetType = UNSET
    metadata: dict[str, str] | UnsetType = UNSET


class ChatChunk(AnswerFields, frozen=True, kw_only=True):
    choices: list[ChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    prompt_token_ids: list[int] | UnsetType = UNSET
    usage: Usage | UnsetType | None = UNSET
    stretto: AnswerReport | UnsetType = UNSET


class MadeCall(Struct, frozen=True, kw_only=True):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class AnswerMessage(Struct, frozen=True, kw_only=True):
    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[MadeCall] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True, kw_only=True):
    index: int
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(AnswerFields, frozen=True, kw_only=True):
    choices: list[ChatChoice]
    usage: Usage
    stretto: AnswerReport
    object: Literal["chat.completion"] = "chat.completion"
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class TextChoice(Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class TextCompletion(AnswerFields, frozen=True, kw_only=True):
    """A whole answer or one chunk of a stream. Only the last chunks have `usage` and `stretto`."""

    choices: list[TextChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | UnsetType | None = UNSET
    stretto: AnswerReport | UnsetType = UNSET


class Embedding(Struct, frozen=True, kw_only=True):
    """`embedding` is a list of numbers, or the base64 of little-endian 32-bit floats."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct, frozen=True, kw_only=True):
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class VariantCard(Struct, frozen=True, kw_only=True):
    """A variant of a ladder: its measured quality with the 95 % interval, and what a step of it takes now."""

    id: str
    quality: float
    quality_low: float
    quality_high: float
    step_ms: float | None = None


class ModelCard(Struct, frozen=True, kw_only=True):
    """`max_model_len` is the context in tokens, as in vLLM. It is null until the engine is ready.

    `variants`: those of a ladder, the best first; null for a model that is none.
    """

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: Literal["stretto"] = "stretto"
    max_model_len: int | None = None
    variants: list[VariantCard] | None = None


class ModelList(Struct, frozen=True, kw_only=True):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class ErrorDetail(Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Struct, frozen=True):
    error: ErrorDetail
