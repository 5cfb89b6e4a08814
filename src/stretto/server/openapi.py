"""The OpenAPI document, generated from the wire types of requests and responses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from typing import Any, get_args

from msgspec import json

from stretto.http.dialects import OVERLOADED
from stretto.protocol import anthropic, ollama
from stretto.protocol.anthropic import (
    AnthropicError,
    MadeMessage,
    MessagesPrompt,
    MessagesRequest,
    TokenCount,
)
from stretto.protocol.descriptions import FIELDS, TYPES
from stretto.protocol.extensions.feedback import (
    CorrectedSample,
    ErasedFeedback,
    FeedbackPolicies,
    FeedbackReceipt,
    FeedbackRequest,
    FeedbackSummary,
)
from stretto.protocol.health import Health, Status
from stretto.protocol.ollama import (
    OllamaAnswer,
    OllamaChat,
    OllamaEmbed,
    OllamaEmbedding,
    OllamaError,
    OllamaGenerate,
    OllamaModels,
    OllamaShow,
    OllamaShown,
    OllamaVector,
    OllamaVectors,
    OllamaVersion,
)
from stretto.protocol.openai import (
    TEMPLATE_MEMBERS,
    CalledFunction,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    CompletionRequest,
    EmbeddingList,
    EmbeddingRequest,
    ErrorBody,
    Message,
    ModelCard,
    ModelList,
    RefusalPart,
    TextCompletion,
    TextPart,
    ToolCall,
    ToolMessage,
)
from stretto.protocol.responses import DeletedResponse, ResponseEvent, ResponseObject, ResponseRequest
from stretto.protocol.vllm import (
    Detokenized,
    DetokenizeRequest,
    Ranking,
    RerankRequest,
    ScoreRequest,
    Scores,
    Tokenized,
    TokenizeRequest,
    Version,
)
from stretto.telemetry.live import Live
from stretto.types import WorkerState

ERRORS = {
    400: "The request is malformed, out of range or not supported; `param` is the path of the field.",
    401: "No API key, or an unknown one.",
    403: "The host is not one of this server's, or a web page of another origin sent the request.",
    404: "This server has no model, or keeps no answer, of that name.",
    408: "The request did not arrive whole in time.",
    413: "The body is too large.",
    415: "The content type is not JSON, or the body is compressed.",
    431: "The headers are too large.",
    500: "A bug, or a request that the engine could not finish.",
    503: "Unavailable: the objective cannot be met, the queue is full, the engine is starting, or the server "
    "is shutting down. `Retry-After` says when to try again.",
    529: "The queue is full, or the objective cannot be met: Anthropic's status for that.",
}
RETRY = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}}
SSE = "text/event-stream"
PREFIX = "#/components/schemas/"
# Members of a history that some servers give another type, and which.
LOOSE = (
    (CalledFunction, "arguments", ("object", "null")),
    (ToolCall, "type", ("null",)),
    (ToolMessage, "content", ("null",)),
)
# Parts of a history: they come back from the answers of any server.
OPEN = {
    *get_args(Message),
    TextPart,
    RefusalPart,
    ToolCall,
    CalledFunction,
    *anthropic.HISTORY,
    *ollama.HISTORY,
}
_TALK = [{"role": "user", "content": "Hello!"}]
_TEXTS = ["a blue car", "a red apple"]
# One small request for each route that takes one.
EXAMPLES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": _TALK, "max_tokens": 64, "stream": True},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 16},
    "/v1/embeddings": {"input": _TEXTS},
    "/v1/responses": {"input": "Hello!", "max_output_tokens": 64},
    "/v1/messages": {"messages": _TALK, "max_tokens": 64},
    "/v1/messages/count_tokens": {"messages": _TALK},
    "/api/chat": {"messages": _TALK, "stream": False},
    "/api/generate": {"prompt": "Hello!", "stream": False},
    "/api/embed": {"input": _TEXTS},
    "/api/embeddings": {"prompt": _TEXTS[0]},
    "/api/show": {},
    "/v1/score": {"text_1": "a car", "text_2": _TEXTS},
    "/v1/rerank": {"query": "a car", "documents": _TEXTS},
    "/tokenize": {"prompt": "Hello!"},
    "/detokenize": {"tokens": [72, 105]},
    "/v1/feedback": {"request_id": "chatcmpl-0", "thumbs": "up"},
}
OF_ERRORS = (
    "The body of an error is an [ErrorBody](#errorbody). Of Anthropic's routes it is an"
    " [AnthropicError](#anthropicerror), of Ollama's an [OllamaError](#ollamaerror)."
)


@dataclass(frozen=True, slots=True)
class _Route:
    path: str
    method: str
    summary: str
    errors: tuple[int, ...]
    request: type | None = None
    response: type | None = None
    chunk: type | None = None
    media: tuple[str, ...] = ()
    error: type = ErrorBody
    streamed: str = SSE


WORK = (400, 401, 403, 404, 408, 413, 415, 431, 500, 503)
ANTHROPIC = (
    _Route(
        "/v1/messages",
        "post",
        "Answer a conversation, as Anthropic's API does.",
        (*WORK, OVERLOADED),
        MessagesRequest,
        MadeMessage,
        MadeMessage,
        error=AnthropicError,
    ),
    _Route(
        "/v1/messages/count_tokens",
        "post",
        "Count the tokens of a conversation.",
        WORK,
        MessagesPrompt,
        TokenCount,
        error=AnthropicError,
    ),
)
_OLLAMA = partial(_Route, error=OllamaError, streamed="application/x-ndjson")
OLLAMA = (
    _OLLAMA(
        "/api/chat",
        "post",
        "Answer a conversation, as Ollama's API does.",
        WORK,
        OllamaChat,
        OllamaAnswer,
        OllamaAnswer,
    ),
    _OLLAMA("/api/generate", "post", "Answer a prompt.", WORK, OllamaGenerate, OllamaAnswer, OllamaAnswer),
    _OLLAMA("/api/embed", "post", "Compute the embeddings of texts.", WORK, OllamaEmbed, OllamaVectors),
    _OLLAMA("/api/embeddings", "post", "Compute an embedding.", WORK, OllamaEmbedding, OllamaVector),
    _OLLAMA("/api/show", "post", "Describe one model.", WORK, OllamaShow, OllamaShown),
    _OLLAMA("/api/tags", "get", "List the models.", (401,), response=OllamaModels),
    _OLLAMA("/api/ps", "get", "List the models with their memory.", (401,), response=OllamaModels),
    _OLLAMA("/api/version", "get", "The version of Ollama whose API this is.", (), response=OllamaVersion),
)
ROUTES = (
    _Route(
        "/v1/chat/completions", "post", "Answer a conversation.", WORK, ChatRequest, ChatCompletion, ChatChunk
    ),
    _Route(
        "/v1/completions", "post", "Continue a text.", WORK, CompletionRequest, TextCompletion, TextCompletion
    ),
    _Route(
        "/v1/embeddings", "post", "Compute the embeddings of texts.", WORK, EmbeddingRequest, EmbeddingList
    ),
    _Route(
        "/v1/responses",
        "post",
        "Answer items of a conversation.",
        WORK,
        ResponseRequest,
        ResponseObject,
        ResponseEvent,
    ),
    _Route("/v1/responses/{id}", "get", "A kept answer.", (401, 404), response=ResponseObject),
    _Route("/v1/responses/{id}", "delete", "Drop a kept answer.", (401, 404), response=DeletedResponse),
    _Route("/v1/feedback", "post", "Say what an answer was worth.", WORK, FeedbackRequest, FeedbackReceipt),
    _Route("/v1/feedback", "get", "Your feedback, by variant.", (401,), response=FeedbackSummary),
    _Route(
        "/v1/feedback/policies",
        "get",
        "What other choices would have been worth, by your feedback.",
        (401,),
        response=FeedbackPolicies,
    ),
    _Route("/v1/feedback", "delete", "Erase all of your feedback.", (401,), response=ErasedFeedback),
    _Route(
        "/v1/feedback/export",
        "get",
        "Your corrected answers, a CorrectedSample on each line.",
        (401,),
        chunk=CorrectedSample,
        streamed="application/jsonl",
    ),
    _Route(
        "/v1/feedback/users/{user}",
        "delete",
        "Erase the feedback of one user.",
        (401,),
        response=ErasedFeedback,
    ),
    _Route(
        "/v1/feedback/{id}",
        "delete",
        "Erase the feedback of one request.",
        (401, 404),
        response=ErasedFeedback,
    ),
    *ANTHROPIC,
    *OLLAMA,
    _Route("/v1/score", "post", "Compare pairs of texts.", WORK, ScoreRequest, Scores),
    _Route(
        "/v1/rerank", "post", "Sort documents by their nearness to a query.", WORK, RerankRequest, Ranking
    ),
    _Route("/tokenize", "post", "Count and list a prompt's tokens.", WORK, TokenizeRequest, Tokenized),
    _Route("/detokenize", "post", "Write the text of tokens.", WORK, DetokenizeRequest, Detokenized),
    _Route("/v1/models", "get", "List the models.", (401,), response=ModelList),
    _Route("/v1/models/{name}", "get", "Describe one model.", (401, 404), response=ModelCard),
    _Route("/health", "get", "Whether the process is alive, and its engine's state.", (), response=Health),
    _Route("/ready", "get", "Whether the server accepts requests.", (503,), response=Status),
    _Route("/state", "get", "The worker's state.", (401,), response=WorkerState),
    _Route(
        "/live", "get", "A stream of statistics of the last seconds, twice a second.", (401, 503), chunk=Live
    ),
    _Route("/metrics", "get", "Metrics for Prometheus.", (), media=("text/plain",)),
    _Route("/version", "get", "The version of Stretto.", (), response=Version),
    _Route("/openapi.json", "get", "This document.", ()),
    _Route("/docs", "get", "This reference as a web page.", (), media=("text/html",)),
    _Route("/", "get", "A web page to try the server.", (), media=("text/html",)),
    _Route("/realtime", "get", "A web page whose prompt is read while you type.", (), media=("text/html",)),
)


@cache
def document() -> dict[str, Any]:
    """The document, in OpenAPI 3.1."""
    types = [part for route in ROUTES for part in (route.request, route.response, route.chunk) if part]
    types += [route.error for route in ROUTES]
    _, components = json.schema_components(types, ref_template=PREFIX + "{name}")
    _open(components)
    _describe(components)
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Stretto",
            "version": version("stretto"),
            "summary": "A real-time LLM server with OpenAI's API.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        # Only a server that was started with API keys requires one.
        "security": [{}, {"key": []}, {"header": []}],
    }


def _operation(route: _Route) -> dict[str, Any]:
    content: dict[str, Any] = {media: {"schema": {"type": "string"}} for media in route.media}
    if route.chunk is not None:
        content[route.streamed] = {"schema": _events(route, route.chunk)}
    if route.path == "/openapi.json":
        content["application/json"] = {"schema": {"type": "object"}}
    if route.response is not None:
        content["application/json"] = {"schema": {"$ref": PREFIX + route.response.__name__}}
    responses: dict[str, Any] = {"200": {"description": "Success.", "content": content}}
    for status in route.errors:
        error: dict[str, Any] = {
            "description": ERRORS[status],
            "content": {"application/json": {"schema": {"$ref": PREFIX + route.error.__name__}}},
        }
        responses[str(status)] = error | ({"headers": RETRY} if status in (503, OVERLOADED) else {})
    operation: dict[str, Any] = {
        "operationId": route.method + "".join(part.title() for part in _words(route.path)),
        "summary": route.summary,
        "responses": responses,
    }
    if route.request is not None:
        schema = {"$ref": PREFIX + route.request.__name__}
        body = {"schema": schema, "example": EXAMPLES[route.path]}
        operation["requestBody"] = {"required": True, "content": {"application/json": body}}
    if "{" in route.path:
        name = route.path.partition("{")[2][:-1]
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    return operation


def _events(route: _Route, chunk: type) -> dict[str, Any]:
    """The schema of a stream."""
    if route.streamed != SSE:
        return {"type": "string", "description": f"The JSON of a {chunk.__name__} on each line."}
    if route.error is AnthropicError:
        return _event(f"The JSON of one of Anthropic's events, which make a {chunk.__name__}.", "event")
    ends = "; the last event is [DONE], or the JSON of an ErrorBody" if chunk is not Live else ""
    return _event(f"The JSON of a {chunk.__name__}{ends}.")


def _event(description: str, *named: str) -> dict[str, Any]:
    """The schema of a server-sent event. OpenAPI 3.1 cannot type its data; the description names the type."""
    names = {name: {"type": "string", "description": "The type of the event."} for name in named}
    return {
        "type": "object",
        "properties": {"data": {"type": "string", "description": description}, **names},
        "required": ["data", *named],
    }


def _words(path: str) -> list[str]:
    return [word for word in path.replace("{", "").replace("}", "").replace(".", "/").split("/") if word] or [
        "page"
    ]


def _open(components: dict[str, Any]) -> None:
    """Say which unknown members `protocol.compatibility` accepts: null anywhere, and any in a history."""
    for schema in components.values():
        if schema.get("additionalProperties") is False:
            schema["additionalProperties"] = {"type": "null"}
    for each in OPEN:
        components[each.__name__]["additionalProperties"] = True
        components[each.__name__]["properties"].pop(TEMPLATE_MEMBERS, None)
    components[CalledFunction.__name__]["required"].remove("arguments")
    for kind, name, accepted in LOOSE:
        properties = components[kind.__name__]["properties"]
        properties[name] = {"anyOf": [properties[name], *({"type": each} for each in accepted)]}


def _describe(components: dict[str, Any]) -> None:
    """Add the descriptions of `protocol.descriptions` to types and properties that have none."""
    for name, schema in components.items():
        if name in TYPES:
            schema.setdefault("description", TYPES[name])
        for field, value in schema.get("properties", {}).items():
            meaning = FIELDS.get(f"{name}.{field}") or FIELDS.get(field)
            if meaning is not None:
                value.setdefault("description", meaning)


def reference() -> str:
    """The routes and types of the document as Markdown, for docs/reference.md."""
    whole = document()
    lines = ["## Routes", "", "| route | what it does | request | response |", "| --- | --- | --- | --- |"]
    for path, methods in whole["paths"].items():
        for method, operation in methods.items():
            asked = operation.get("requestBody", {}).get("content", {})
            given = operation["responses"]["200"]["content"]
            shown = (f"`{method.upper()} {path}`", operation["summary"], _media(asked), _media(given))
            lines.append(f"| {' | '.join(shown)} |")
    lines += ["", "## Errors", "", OF_ERRORS, ""]
    lines += ["| status | meaning |", "| --- | --- |"]
    lines += [f"| {status} | {meaning} |" for status, meaning in ERRORS.items()]
    for name, schema in sorted(whole["components"]["schemas"].items()):
        about = " ".join(schema.get("description", "").split())
        lines += ["", f"## {name}", "", about or "A choice of types."]
        if schema.get("properties"):
            lines += ["", "| field | type | meaning |", "| --- | --- | --- |"]
        required = schema.get("required", ())
        for field, value in schema.get("properties", {}).items():
            must = " (required)" if field in required else ""
            lines.append(f"| `{field}`{must} | {_kind(value)} | {value.get('description', '')} |")
    return "\n".join(lines) + "\n"


def _media(content: dict[str, Any]) -> str:
    """Each content type with its schema. An event stream names its type in the description of its data."""
    found: list[str] = []
    for media, each in content.items():
        schema: dict[str, Any] = each["schema"]
        told = schema.get("properties", {}).get("data", schema).get("description")
        if told is not None:
            found.append(f"a stream: {told.split(';')[0]}")
        else:
            found.append(_kind(schema) if "$ref" in schema else media)
    return ", or ".join(found)


def _kind(schema: dict[str, Any]) -> str:
    """The type of a value, in words, with a link to a type that has a name."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(PREFIX)
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(each) for each in schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(f"`{json.encode(each).decode()}`" for each in schema["enum"])
    if schema.get("type") == "array":
        items: dict[str, Any] = schema.get("items") or {}
        return f"list of ({_kind(items)})" if items else "list"
    return _within(schema)


def _within(schema: dict[str, Any]) -> str:
    ends = [(">=", "minimum"), (">", "exclusiveMinimum"), ("<=", "maximum"), ("<", "exclusiveMaximum")]
    limits = [f"{sign} {schema[key]}" for sign, key in ends if key in schema]
    return " ".join([str(schema.get("type", "any")), " and ".join(limits)]).strip()
