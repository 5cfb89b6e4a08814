"""Ollama's API: its requests as requests for text or embeddings, and the handlers of its routes."""

from __future__ import annotations

import json as plain_json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from msgspec import UNSET, json, structs
from starlette.responses import Response

from stretto.errors import InvalidRequest, UnsupportedField
from stretto.http.dialects import OLLAMA
from stretto.protocol.limits import LIMITS, check_json
from stretto.protocol.ollama import (
    HISTORY,
    OllamaAnswer,
    OllamaCall,
    OllamaChat,
    OllamaEmbed,
    OllamaEmbedding,
    OllamaGenerate,
    OllamaMessage,
    OllamaOptions,
    OllamaRequest,
    OllamaSaid,
    OllamaTool,
    OllamaVector,
    OllamaVectors,
)
from stretto.protocol.openai import (
    AssistantMessage,
    CalledFunction,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    Message,
    NamedSchema,
    SystemMessage,
    Tool,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from stretto.protocol.parsing import JSON, as_it_is, parse
from stretto.server.adapters.naming import fields_named, with_possible_reasoning
from stretto.server.adapters.ollama.writer import NDJSON, OllamaWriter, stamp
from stretto.server.embeddings import embedded
from stretto.server.generation import run
from stretto.server.objectives import DEFAULT
from stretto.server.state import Call
from stretto.server.validation import (
    AnswerSpec,
    ModelHandle,
    RequestLimits,
    check_chat,
    check_completion,
)

CHAT = json.Decoder(OllamaChat)
GENERATE = json.Decoder(OllamaGenerate)
EMBED = json.Decoder(OllamaEmbed)
EMBEDDING = json.Decoder(OllamaEmbedding)
LATEST = ":latest"
NAMES = (
    ("$.max_tokens", "$.options.num_predict"),
    ("lower max_tokens", "lower num_predict"),
    ("$.stop", "$.options.stop"),
    ("$.response_format.json_schema.schema", "$.format"),
    ("$.response_format", "$.format"),
)
PROMPT = (("$.messages", "$.prompt"),)


def known_as(name: str | None) -> str | None:
    """The name of a model here. Ollama's clients may add the tag that it has when none is given."""
    return None if name is None else name.removesuffix(LATEST)


async def chat(call: Call) -> None:
    """Answers `/api/chat`. Raises StrettoError."""
    with fields_named(NAMES):
        request = parse(CHAT, call.body, as_it_is, HISTORY)
        if not request.messages:
            await _load(call, request, chat=True)
            return
        tools = [_tool(tool, at) for at, tool in enumerate(request.tools or ())] or None
        wanted = ChatRequest(messages=_messages(request.messages), tools=tools, **_chat_fields(request))
        await _generate(call, request, wanted)


async def generate(call: Call) -> None:
    """Answers `/api/generate`. Raises StrettoError."""
    with fields_named(NAMES + PROMPT):
        request = parse(GENERATE, call.body, as_it_is)
        if not request.prompt:
            await _load(call, request, chat=False)
            return
        if request.raw:
            await _generate(call, request, _raw(request, request.prompt))
            return
        system: list[Message] = [SystemMessage(content=request.system)] if request.system else []
        messages: list[Message] = [*system, UserMessage(content=request.prompt)]
        await _generate(call, request, ChatRequest(messages=messages, **_chat_fields(request)))


async def embed(call: Call) -> None:
    """Answers `/api/embed`. Raises StrettoError."""
    request = parse(EMBED, call.body, as_it_is)
    if request.input == []:
        raise InvalidRequest("$.input is empty: send a text, or a list of texts", param="$.input")
    texts: str | list[str | int | list[int]] = (
        request.input if isinstance(request.input, str) else [*request.input]
    )
    wanted = EmbeddingRequest(model=known_as(request.model), input=texts, dimensions=request.dimensions)
    found = await embedded(call, wanted, cut=request.truncate is not False)
    answer = OllamaVectors(
        model=request.model or found.model,
        embeddings=[list(vector) for vector in found.vectors],
        total_duration=int((time.monotonic() - call.arrival) * 1e9),
        prompt_eval_count=found.tokens,
    )
    await call.respond(Response(json.encode(answer), media_type=JSON))


async def embedding(call: Call) -> None:
    """Answers `/api/embeddings`. Raises StrettoError."""
    with fields_named((("$.input", "$.prompt"),)):
        request = parse(EMBEDDING, call.body, as_it_is)
        wanted = EmbeddingRequest(model=known_as(request.model), input=request.prompt)
        found = await embedded(call, wanted, cut=True)
    await call.respond(Response(json.encode(OllamaVector(list(found.vectors[0]))), media_type=JSON))


async def _generate(call: Call, request: OllamaRequest, wanted: ChatRequest | CompletionRequest) -> None:
    call.stream_type = NDJSON
    call.error_event = partial(OLLAMA.ending, request_id=call.exchange.id)
    shown = isinstance(request, OllamaChat)
    await run(
        call,
        wanted,
        check,
        lambda spec, tier: OllamaWriter(spec, request.model or spec.model.name, chat=shown),
    )


async def _load(call: Call, request: OllamaRequest, *, chat: bool) -> None:
    """Answers a request that only loads or unloads the model, which stays loaded."""
    call.label(known_as(request.model), DEFAULT)
    model = call.server.model(known_as(request.model))
    answer = OllamaAnswer(
        model=request.model or model.name,
        created_at=stamp(),
        done=True,
        done_reason="unload" if request.keep_alive in (0, "0", "0s") else "load",
        message=OllamaSaid(content="") if chat else UNSET,
        response=UNSET if chat else "",
    )
    streamed = request.stream is not False
    body = json.encode(answer) + (b"\n" if streamed else b"")
    await call.respond(Response(body, headers={"content-type": NDJSON.decode() if streamed else JSON}))


def check(request: ChatRequest | CompletionRequest, model: ModelHandle, limits: RequestLimits) -> AnswerSpec:
    """Checks a request. Raises InvalidRequest and its subclasses."""
    if isinstance(request, ChatRequest):
        spec = check_chat(with_possible_reasoning(request, model), model, limits)
        return replace(spec, whole_calls=True)
    if request.max_tokens is not None:
        return check_completion(request, model, limits)
    # Ollama's prompts without a template have no limit of their own, and plain completions have.
    spec = check_completion(structs.replace(request, max_tokens=1), model, limits)
    return replace(spec, sampling=structs.replace(spec.sampling, max_tokens=None))


def _raw(request: OllamaGenerate, prompt: str) -> CompletionRequest:
    for name in ("system", "think"):
        if getattr(request, name):
            path = f"$.{name}"
            raise UnsupportedField(f"{path} has no place in a raw prompt; leave it out", param=path)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return CompletionRequest(prompt=prompt, logprobs=logprobs, **_fields(request))


def _chat_fields(request: OllamaRequest) -> dict[str, Any]:
    effort = "medium" if request.think is True else "none" if request.think is False else request.think
    return _fields(request) | {
        "reasoning_effort": effort,
        "logprobs": request.logprobs,
        "top_logprobs": request.top_logprobs if request.logprobs else None,
    }


def _fields(request: OllamaRequest) -> dict[str, Any]:
    """What chats and raw prompts share. Raises UnsupportedField for a window of the repeat penalty."""
    options = request.options or OllamaOptions()
    penalised = options.repeat_penalty not in (None, 1)
    if penalised and options.repeat_last_n not in (None, -1):
        path = "$.options.repeat_last_n"
        raise UnsupportedField(f"{path}: repeat_penalty counts all tokens here; send -1", param=path)
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "presence_penalty", "frequency_penalty")
    predict = options.num_predict
    return {name: getattr(options, name) for name in names} | {
        "model": known_as(request.model),
        "max_tokens": predict if predict is not None and predict > 0 else None,
        "stop": options.stop or None,
        "repetition_penalty": options.repeat_penalty,
        "stream": request.stream is not False,
        "response_format": _format(request),
        "objective": request.objective,
    }


def _format(request: OllamaRequest) -> JsonObjectFormat | JsonSchemaFormat | None:
    if not isinstance(request.format, dict):
        return JsonObjectFormat() if request.format else None
    check_json(request.format, "$.format")
    return JsonSchemaFormat(json_schema=NamedSchema(name="answer", schema=request.format))


def _tool(tool: OllamaTool, at: int) -> Tool:
    check_json(tool.function.parameters, f"$.tools[{at}].function.parameters")
    return Tool(type="function", function=tool.function)


def _messages(messages: Sequence[OllamaMessage]) -> list[Message]:
    found: list[Message] = []
    open_calls: list[ToolCall] = []
    for at, message in enumerate(messages):
        content = message.content or ""
        if message.role == "assistant":
            calls = [
                _called(
                    call, f"call_{at}_{index}", f"$.messages[{at}].tool_calls[{index}].function.arguments"
                )
                for index, call in enumerate(message.tool_calls or ())
            ]
            open_calls += calls
            found.append(
                AssistantMessage(
                    content=message.content if calls else content,
                    reasoning_content=message.thinking,
                    tool_calls=calls or None,
                )
            )
        elif message.role == "tool":
            found.append(_result(message, open_calls))
        else:
            kind = SystemMessage if message.role == "system" else UserMessage
            found.append(kind(content=content, name=message.name))
    return found


def _result(message: OllamaMessage, open_calls: list[ToolCall]) -> ToolMessage:
    """The result of a tool, with the id of its call, which is no longer open then."""
    name = message.tool_name or message.name
    for call in open_calls:
        if message.tool_call_id == call.id or (
            message.tool_call_id is None and name in (None, call.function.name)
        ):
            open_calls.remove(call)
            return ToolMessage(tool_call_id=call.id, name=name, content=message.content or "")
    return ToolMessage(tool_call_id=message.tool_call_id or "call", name=name, content=message.content or "")


def _called(call: OllamaCall, id: str, path: str) -> ToolCall:
    given = call.function.arguments or {}
    check_json(given, path)
    arguments = plain_json.dumps(given, ensure_ascii=False)
    if len(arguments) > (most := LIMITS["arguments"]).most:
        raise most.error(path, len(arguments))
    return ToolCall(id=call.id or id, function=CalledFunction(name=call.function.name, arguments=arguments))
