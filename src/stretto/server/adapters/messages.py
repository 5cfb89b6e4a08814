"""Anthropic's Messages API: its requests as chat requests, and the handlers of its routes."""

from __future__ import annotations

import json as plain_json
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from msgspec import json, structs
from starlette.responses import Response

from stretto.errors import CannotBeOnTime, Overloaded, UnsupportedField
from stretto.http.dialects import ANTHROPIC, OVERLOADED
from stretto.protocol.anthropic import (
    HISTORY,
    AnyChoice,
    AssistantBlock,
    AssistantTurn,
    CustomTool,
    MessagesPrompt,
    MessagesRequest,
    NoChoice,
    SystemTurn,
    TextBlock,
    ThinkingBlock,
    ThinkingDisabled,
    TokenCount,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
    UserBlock,
)
from stretto.protocol.limits import LIMITS, check_json
from stretto.protocol.openai import (
    AssistantMessage,
    CalledFunction,
    ChatRequest,
    ChosenFunction,
    ChosenTool,
    Function,
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
from stretto.server.adapters.message_writer import MessageWriter
from stretto.server.adapters.naming import fields_named, with_possible_reasoning
from stretto.server.generation import run
from stretto.server.objectives import DEFAULT
from stretto.server.state import Call
from stretto.server.validation import AnswerSpec, ModelHandle, RequestLimits, check_chat
from stretto.types import INT32_MAX

REQUEST = json.Decoder(MessagesRequest)
COUNTED = json.Decoder(MessagesPrompt)
NAMES = (
    (".function.parameters", ".input_schema"),
    ("$.stop ", "$.stop_sequences "),
    ("$.stop[", "$.stop_sequences["),
    ("$.response_format.json_schema.schema", "$.output_config.format.schema"),
    ("$.response_format", "$.output_config.format"),
    (".function.strict", ".strict"),
    ("tool_choice `required`", "tool_choice `any`"),
    ("$.tool_choice.function.name", "$.tool_choice.name"),
    ("$.user", "$.metadata.user_id"),
)
Effort = Literal["none", "low", "medium", "high", "xhigh"]


async def create_message(call: Call) -> None:
    """Answers `/v1/messages`. Raises StrettoError."""
    _identify(call)
    call.error_event = partial(ANTHROPIC.ending, request_id=call.exchange.id)
    with fields_named(NAMES):
        request = parse(REQUEST, call.body, as_it_is, HISTORY)
        try:
            await run(
                call, chat_request(request), check, lambda spec, tier: MessageWriter(spec, call.exchange.id)
            )
        except (Overloaded, CannotBeOnTime) as error:
            error.status = OVERLOADED
            raise


async def count_tokens(call: Call) -> None:
    """Answers `/v1/messages/count_tokens`: also for a prompt that is too long. Raises StrettoError."""
    _identify(call)
    with fields_named(NAMES):
        request = chat_request(parse(COUNTED, call.body, as_it_is, HISTORY))
        call.label(request.model, DEFAULT)
        model = call.server.model(request.model)
        endless = model._replace(info=structs.replace(model.info, context=INT32_MAX))
        spec = check(request, endless, call.server.limits)
        (prompt,) = await call.server.run_text(call, spec.encode)
    await call.respond(Response(json.encode(TokenCount(len(prompt.ids))), media_type=JSON))


def _identify(call: Call) -> None:
    """Gives the answer the header in which Anthropic's clients look for its id."""
    exchange = call.exchange
    exchange.extra = [*exchange.extra, (b"request-id", exchange.id.encode())]


def check(request: ChatRequest, model: ModelHandle, limits: RequestLimits) -> AnswerSpec:
    """Checks a request. Raises InvalidRequest and its subclasses."""
    return check_chat(with_possible_reasoning(request, model), model, limits)


def chat_request(request: MessagesPrompt) -> ChatRequest:
    """The chat request that means the same. Raises InvalidRequest and UnsupportedField."""
    choice = request.tool_choice
    given: dict[str, Any] = {}
    if isinstance(request, MessagesRequest):
        for name in ("max_tokens", "temperature", "top_k", "top_p", "stream", "objective"):
            given[name] = getattr(request, name)
        given["stop"] = request.stop_sequences or None
        given["user"] = None if request.metadata is None else request.metadata.user_id
        given["service_tier"] = None if request.service_tier == "standard_only" else request.service_tier
    single = getattr(choice, "disable_parallel_tool_use", None)
    return ChatRequest(
        model=request.model,
        messages=_messages(request),
        tools=[_tool(tool, at) for at, tool in enumerate(request.tools or ())] or None,
        tool_choice=_choice(request),
        parallel_tool_calls=False if single else None,
        reasoning_effort=_effort(request),
        response_format=_format(request),
        **given,
    )


def _choice(request: MessagesPrompt) -> Literal["none", "auto", "required"] | ChosenTool | None:
    choice = request.tool_choice
    if isinstance(choice, ToolChoice):
        return ChosenTool(type="function", function=ChosenFunction(name=choice.name))
    if choice is None:
        return None
    return "required" if isinstance(choice, AnyChoice) else "none" if isinstance(choice, NoChoice) else "auto"


def _effort(request: MessagesPrompt) -> Effort:
    if request.thinking is None or isinstance(request.thinking, ThinkingDisabled):
        return "none"
    effort = None if request.output_config is None else request.output_config.effort
    return "xhigh" if effort == "max" else effort or "medium"


def _format(request: MessagesPrompt) -> JsonSchemaFormat | None:
    form = None if request.output_config is None else request.output_config.format
    if form is None:
        return None
    check_json(form.schema, "$.output_config.format.schema")
    return JsonSchemaFormat(json_schema=NamedSchema(name="answer", schema=form.schema))


def _tool(tool: CustomTool, at: int) -> Tool:
    check_json(tool.input_schema, f"$.tools[{at}].input_schema")
    function = Function(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )
    return Tool(type="function", function=function)


def _messages(request: MessagesPrompt) -> list[Message]:
    found: list[Message] = []
    if request.system:
        found.append(SystemMessage(content=_text(request.system)))
    for at, turn in enumerate(request.messages):
        path = f"$.messages[{at}]"
        if isinstance(turn, SystemTurn):
            found.append(SystemMessage(content=_text(turn.content)))
        elif isinstance(turn, AssistantTurn):
            found.append(_answered(turn.content or "", path))
        else:
            found += _asked(turn.content)
    if isinstance(request.messages[-1], AssistantTurn):
        path = f"$.messages[{len(request.messages) - 1}]"
        raise UnsupportedField(
            f"{path}: this server does not continue a begun answer; end with a message of the user",
            param=path,
        )
    return found


def _asked(content: str | Sequence[UserBlock]) -> list[Message]:
    """A user's turn: the results of tools, and the texts between them."""
    if isinstance(content, str):
        return [UserMessage(content=content)]
    found: list[Message] = []
    texts: list[str] = []
    for block in content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
            continue
        if texts:
            found.append(UserMessage(content="\n".join(texts)))
            texts = []
        found.append(_result(block))
    return [*found, UserMessage(content="\n".join(texts))] if texts or not found else found


def _result(block: ToolResultBlock) -> ToolMessage:
    text = _text(block.content or "")
    return ToolMessage(tool_call_id=block.tool_use_id, content=f"Error: {text}" if block.is_error else text)


def _answered(content: str | Sequence[AssistantBlock], path: str) -> AssistantMessage:
    if isinstance(content, str):
        return AssistantMessage(content=content)
    texts = [block.text for block in content if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in content if isinstance(block, ThinkingBlock)]
    calls = [
        _called(block, f"{path}.content[{at}].input")
        for at, block in enumerate(content)
        if isinstance(block, ToolUseBlock)
    ]
    if len(calls) > (most := LIMITS["tool_calls"]).most:
        raise most.error(f"{path}.content", len(calls))
    return AssistantMessage(
        content="\n".join(texts) if texts else None,
        reasoning_content="\n".join(thoughts) if thoughts else None,
        tool_calls=calls or None,
    )


def _called(block: ToolUseBlock, path: str) -> ToolCall:
    given = block.input or {}
    check_json(given, path)
    arguments = plain_json.dumps(given, ensure_ascii=False)
    if len(arguments) > (most := LIMITS["arguments"]).most:
        raise most.error(path, len(arguments))
    return ToolCall(id=block.id, function=CalledFunction(name=block.name, arguments=arguments))


def _text(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)
