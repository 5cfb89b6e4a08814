"""The types of Ollama's API that Stretto implements: requests and responses. No behaviour.

An `Annotation` configures Ollama's runner, such as its number of threads, and changes no answer here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from stretto.protocol.anthropic import Annotation
from stretto.protocol.limits import up_to
from stretto.protocol.logprobs import TokenLogprob
from stretto.protocol.openai import (
    AnswerReport,
    Empty,
    Function,
    Identifier,
    ModelName,
    ObjectiveFields,
    Positive,
    StopString,
    TopLogprobs,
    Wire,
)
from stretto.types import BOUNDS, INT32_MAX

One = Annotated[float, Meta(ge=1, le=1)]
# The version of Ollama whose API this is. Clients compare it before they use a field.
API_VERSION = "0.12.11"
KeepAlive = float | str
Format = Literal["", "json"] | dict[str, Any]
Think = bool | Literal["low", "medium", "high"]


# Requests


class OllamaOptions(Wire, frozen=True, kw_only=True):
    """`num_predict` of 0 or less means no limit. `repeat_last_n` needs -1 with a `repeat_penalty`, which
    counts all tokens here. A prompt is never cut, so `num_ctx` and `num_keep` change nothing."""

    num_predict: Annotated[int, Meta(ge=-2, le=INT32_MAX)] | None = None
    temperature: Annotated[float, BOUNDS["temperature"]] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=INT32_MAX)] | None = None
    top_p: Annotated[float, BOUNDS["top_p"]] | None = None
    min_p: Annotated[float, BOUNDS["min_p"]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], up_to("stop")] | None = None
    repeat_penalty: Annotated[float, BOUNDS["repetition_penalty"]] | None = None
    presence_penalty: Annotated[float, BOUNDS["presence_penalty"]] | None = None
    frequency_penalty: Annotated[float, BOUNDS["frequency_penalty"]] | None = None
    repeat_last_n: int | None = None
    mirostat: Literal[0] | None = None
    mirostat_tau: Annotation = None
    mirostat_eta: Annotation = None
    tfs_z: One | None = None
    typical_p: One | None = None
    penalize_newline: Annotation = None
    num_keep: Annotation = None
    num_ctx: Annotation = None
    num_batch: Annotation = None
    num_gpu: Annotation = None
    num_thread: Annotation = None
    main_gpu: Annotation = None
    numa: Annotation = None
    low_vram: Annotation = None
    f16_kv: Annotation = None
    use_mmap: Annotation = None
    use_mlock: Annotation = None
    logits_all: Literal[False] | None = None
    vocab_only: Literal[False] | None = None
    embedding_only: Literal[False] | None = None


class OllamaFunction(Wire, frozen=True, kw_only=True):
    name: Identifier
    arguments: dict[str, Any] | None = None
    index: Annotation = None
    description: Annotation = None


class OllamaCall(Wire, frozen=True, kw_only=True):
    function: OllamaFunction
    id: Identifier | None = None
    type: Literal["function"] | None = None


class OllamaMessage(Wire, frozen=True, kw_only=True):
    """A result of a tool without `tool_call_id` belongs to the first call of `tool_name` that has none."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Empty | None = None
    tool_calls: Annotated[list[OllamaCall], up_to("tool_calls")] | None = None
    tool_name: Identifier | None = None
    tool_call_id: Identifier | None = None
    name: Identifier | None = None


# Unknown members of these annotate, and are left out.
HISTORY = frozenset({OllamaMessage, OllamaCall, OllamaFunction})


class OllamaTool(Wire, frozen=True, kw_only=True):
    function: Function
    type: Literal["function"] | None = None


class OllamaRequest(Wire, frozen=True, kw_only=True):
    """What `/api/chat` and `/api/generate` share. A stream is the default. `keep_alive` changes nothing: a
    model stays loaded."""

    model: ModelName | None = None
    format: Format | None = None
    options: OllamaOptions | None = None
    stream: bool | None = None
    think: Think | None = None
    keep_alive: KeepAlive | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    objective: ObjectiveFields | None = None


class OllamaChat(OllamaRequest, frozen=True, kw_only=True):
    """Without messages, the request only loads the model."""

    messages: Annotated[list[OllamaMessage], up_to("messages")] | None = None
    tools: Annotated[list[OllamaTool], up_to("tools")] | None = None


class OllamaGenerate(OllamaRequest, frozen=True, kw_only=True):
    """Without a prompt, the request only loads the model. `raw`: the prompt has no template."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    suffix: Literal[""] | None = None
    template: Literal[""] | None = None
    context: Empty | None = None
    images: Empty | None = None


class OllamaEmbed(Wire, frozen=True, kw_only=True):
    """Without `truncate: false`, a text that is too long is cut, as Ollama does."""

    model: ModelName | None = None
    input: str | Annotated[list[str], up_to("prompts")]
    truncate: bool | None = None
    dimensions: Positive | None = None
    options: Annotation = None
    keep_alive: KeepAlive | None = None


class OllamaEmbedding(Wire, frozen=True, kw_only=True):
    """The older form, for one text."""

    model: ModelName | None = None
    prompt: str
    options: Annotation = None
    keep_alive: KeepAlive | None = None


class OllamaShow(Wire, frozen=True, kw_only=True):
    """`name` is the older form of `model`."""

    model: ModelName | None = None
    name: ModelName | None = None
    verbose: Annotation = None


# Responses


class CalledTool(Struct, frozen=True, kw_only=True):
    index: int
    name: str
    arguments: dict[str, Any]


class OllamaMade(Struct, frozen=True, kw_only=True):
    id: str
    function: CalledTool


class OllamaSaid(Struct, frozen=True, kw_only=True):
    content: str
    role: Literal["assistant"] = "assistant"
    thinking: str | UnsetType = UNSET
    tool_calls: list[OllamaMade] | UnsetType = UNSET


class OllamaAnswer(Struct, frozen=True, kw_only=True):
    """A whole answer, or a line of a stream. A chat has `message`, the other API `response`. Only the last
    line has the counts of tokens, the durations in nanoseconds, and `stretto`."""

    model: str
    created_at: str
    message: OllamaSaid | UnsetType = UNSET
    response: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    logprobs: list[TokenLogprob] | UnsetType = UNSET
    done: bool = False
    done_reason: Literal["stop", "length", "load", "unload"] | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET
    stretto: AnswerReport | UnsetType = UNSET


class OllamaVectors(Struct, frozen=True, kw_only=True):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    prompt_eval_count: int
    load_duration: int = 0


class OllamaVector(Struct, frozen=True):
    embedding: list[float]


class ModelDetails(Struct, frozen=True, kw_only=True):
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str
    parent_model: str = ""
    format: str = "safetensors"


class OllamaModel(Struct, frozen=True, kw_only=True):
    """A model in a list. `size` is in bytes. `digest` names the model here, and is no hash of its weights."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: ModelDetails
    expires_at: str | UnsetType = UNSET
    size_vram: int | UnsetType = UNSET
    context_length: int | UnsetType = UNSET


class OllamaModels(Struct, frozen=True):
    models: list[OllamaModel]


class OllamaShown(Struct, frozen=True, kw_only=True):
    template: str
    details: ModelDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str
    modelfile: str = ""
    parameters: str = ""
    license: str = ""


class OllamaVersion(Struct, frozen=True):
    version: str


class OllamaError(Struct, frozen=True):
    error: str
