"""The text of a chat that its quality is estimated from. It knows neither variants nor tokens."""

from __future__ import annotations

from itertools import chain
from typing import cast

from stretto.ladder.estimate import prompt_text
from stretto.protocol.openai import (
    AssistantMessage,
    CalledFunction,
    ChatRequest,
    DeveloperMessage,
    Function,
    Message,
    SystemMessage,
    TextPart,
    ToolMessage,
)


def question(request: ChatRequest) -> str:
    """The text of a chat that its quality is estimated from: as a recipe's samples have it, in which calls
    and results stand as most templates write them, and tools after the system's message."""
    *others, last = request.messages
    system = others[:1] if others and isinstance(others[0], SystemMessage | DeveloperMessage) else []
    tools = [_signature(tool.function) for tool in request.tools or ()]
    if tools:
        tools.insert(0, "Tools:")
    return prompt_text(_text(last), chain(map(_text, system), tools, map(_text, others[len(system) :])))


def _text(message: Message) -> str:
    content = message.content
    if content is not None and not isinstance(content, str):
        content = "".join(part.text for part in content if isinstance(part, TextPart))
    if isinstance(message, ToolMessage):
        return f"<tool_response>\n{content}\n</tool_response>"
    called = message.tool_calls or () if isinstance(message, AssistantMessage) else ()
    return "\n".join([content or "", *(_call(each.function) for each in called)])


def _call(called: CalledFunction) -> str:
    return f'<tool_call>\n{{"name": "{called.name}", "arguments": {called.arguments}}}\n</tool_call>'


def _signature(function: Function) -> str:
    """A tool in one line: its name, its parameters, and what it does."""
    properties = (function.parameters or {}).get("properties")
    named = cast("dict[str, object]", properties) if isinstance(properties, dict) else {}
    listed = ", ".join(f"{name}: {_kind(value)}" for name, value in named.items())
    return f"{function.name}({listed}) {function.description or ''}"


def _kind(schema: object) -> str:
    """What a parameter may be: its values or its type, and what it means."""
    if not isinstance(schema, dict):
        return "any"
    known = cast("dict[str, object]", schema)
    values, kind, meaning = known.get("enum"), known.get("type"), known.get("description")
    listed = "|".join(map(str, cast("list[object]", values))) if isinstance(values, list) else ""
    shown = listed or (kind if isinstance(kind, str) else "any")
    return f"{shown} ({meaning})" if isinstance(meaning, str) else shown
