"""A chat request -> the values that a chat template reads, and the grammar of a forced tool call."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from msgspec import to_builtins

from stretto.errors import InvalidRequest, UnsupportedField
from stretto.protocol.limits import check_json
from stretto.protocol.openai import (
    AssistantMessage,
    ChatRequest,
    ChosenTool,
    DeveloperMessage,
    Message,
    RefusalPart,
    TextPart,
    Tool,
    ToolCall,
)
from stretto.text import reasoning_parser
from stretto.text.tokenizer import TextModel
from stretto.text.tool_parser import FORCED, NamedCallParser, ToolFormat, ToolParser, choose
from stretto.types import Grammar


def messages(request: ChatRequest, text: TextModel) -> list[dict[str, Any]]:
    """The messages as a chat template reads them: one dict each, without absent fields.

    Raises InvalidRequest for an assistant message without content, or with arguments that are not JSON.
    """
    thinks = text.template is not None and text.template.mentions(reasoning_parser.OPEN)
    knows_developer = text.template is not None and text.template.mentions("developer")
    found: list[dict[str, Any]] = []
    for at, message in enumerate(request.messages):
        path = f"$.messages[{at}]"
        if isinstance(message, AssistantMessage):
            found.append(_assistant(message, path, thinks))
        else:
            role = message.__struct_config__.tag
            if isinstance(message, DeveloperMessage) and not knows_developer:
                role = "system"
            found.append({"role": role, **_named(message), "content": _joined(message.content)})
    return found


def _named(message: Message) -> dict[str, str]:
    fields = {name: getattr(message, name, None) for name in ("name", "tool_call_id")}
    return {name: value for name, value in fields.items() if value is not None}


def _joined(content: str | Sequence[TextPart | RefusalPart]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def _assistant(message: AssistantMessage, path: str, thinks: bool) -> dict[str, Any]:
    content = None if message.content is None else _joined(message.content)
    if content is None and message.refusal is not None:
        content = message.refusal
    if content is None and not message.tool_calls:
        raise InvalidRequest(f"{path} needs content or tool_calls", param=f"{path}.content")
    values: dict[str, Any] = {"role": "assistant", **_named(message), "content": content}
    thought = message.reasoning_content
    if thought is None and thinks and content is not None and reasoning_parser.CLOSE in content:
        # A template would cut the reasoning out itself, but cannot see tags that the guard broke.
        thought, values["content"] = reasoning_parser.split_whole(content)
    if thought is not None:
        values["reasoning_content"] = thought
    if message.tool_calls:
        values["tool_calls"] = [
            _called(call, f"{path}.tool_calls[{at}]") for at, call in enumerate(message.tool_calls)
        ]
    return values


def _called(call: ToolCall, path: str) -> dict[str, Any]:
    where = f"{path}.function.arguments"
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError:
        arguments = None
    except RecursionError:
        raise InvalidRequest(f"{where} is nested too deeply; flatten it", param=where) from None
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{where} must be a string that contains a JSON object", param=where)
    check_json(cast("dict[str, Any]", arguments), where)
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


def variables(request: ChatRequest, text: TextModel) -> dict[str, Any]:
    """The request's variables for the template. Raises UnsupportedField for one that the template ignores."""
    found = dict(request.chat_template_kwargs or {})
    template = text.template
    if template is None:
        return found
    for name in found:
        if not template.mentions(name):
            where = f"$.chat_template_kwargs.{name}"
            raise UnsupportedField(
                f"{where}: this model's chat template does not use it; leave it out", param=where
            )
    if (effort := request.reasoning_effort) is not None:
        if template.mentions("reasoning_effort"):
            found.setdefault("reasoning_effort", effort)
        elif template.mentions("enable_thinking"):
            found.setdefault("enable_thinking", effort not in ("none", "minimal"))
        else:
            where = "$.reasoning_effort"
            raise UnsupportedField(f"{where}: this model does not support it; leave it out", param=where)
    return found


@dataclass(frozen=True, slots=True)
class ToolCalling:
    """How a request calls tools. `shown` are the tools for the template. `grammar` forces a call. `parser`
    makes the parser of one answer. `single`: the first call ends the answer."""

    shown: list[dict[str, Any]] | None = None
    grammar: Grammar | None = None
    parser: Callable[[], ToolParser | NamedCallParser] | None = None
    single: bool = False


def calls(request: ChatRequest, text: TextModel) -> ToolCalling:
    """How the request's tools are called.

    Raises UnsupportedField for tools this model cannot call, InvalidRequest for a tool_choice without a tool.
    """
    tools = request.tools or []
    choice = request.tool_choice or ("auto" if tools else "none")
    if not tools and choice not in ("none", "auto"):
        raise InvalidRequest("$.tool_choice asks for a call, but $.tools is empty", param="$.tool_choice")
    if choice == "none" or not tools:
        return ToolCalling()
    if text.template is None or not text.template.mentions("tools"):
        raise UnsupportedField(
            "$.tools: this model's chat template has no place for tools; leave them out", param="$.tools"
        )
    shown: list[dict[str, Any]] = [to_builtins(tool) for tool in tools]
    names = frozenset(tool.function.name for tool in tools)
    single = request.parallel_tool_calls is False
    if isinstance(choice, ChosenTool):
        return _named_call(choice.function.name, tools, shown)
    if choice == "required":
        grammar = Grammar("json_schema", json.dumps(_any_call(tools, single)))
        return ToolCalling(shown, grammar, lambda: ToolParser(FORCED, names))
    for at, tool in enumerate(tools):
        if tool.function.strict:
            where = f"$.tools[{at}].function.strict"
            raise UnsupportedField(
                f"{where} needs a tool_choice that forces a call: `required`, or the name of the function",
                param=where,
            )
    form = _format_of(text)
    if form is None:
        raise UnsupportedField(
            "$.tools: Stretto cannot read this model's tool calls; tool_choice `required` works",
            param="$.tools",
        )
    return ToolCalling(shown, None, lambda: ToolParser(form, names), single)


def _format_of(text: TextModel) -> ToolFormat | None:
    """The tool call format that the chat template mentions, or else the vocabulary has tokens for."""
    template = text.template
    return None if template is None else choose(template.mentions) or choose(text.holds)


def _named_call(name: str, tools: list[Tool], shown: list[dict[str, Any]]) -> ToolCalling:
    for tool in tools:
        if tool.function.name == name:
            schema = tool.function.parameters or {"type": "object"}
            return ToolCalling(
                shown, Grammar("json_schema", json.dumps(schema)), lambda: NamedCallParser(name)
            )
    where = "$.tool_choice.function.name"
    raise InvalidRequest(f"{where}: $.tools has no function {name!r}", param=where)


def _any_call(tools: list[Tool], single: bool) -> dict[str, Any]:
    """The schema of a list of calls. Each tool's schema becomes a definition, and its references follow."""
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for at, tool in enumerate(tools):
        place = f"#/$defs/tool{at}"
        definitions[f"tool{at}"] = _moved(tool.function.parameters or {"type": "object"}, place)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": {"$ref": place}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "$defs": definitions}
    return schema | {"maxItems": 1} if single else schema


def _moved(schema: Any, place: str) -> Any:
    if isinstance(schema, list):
        return [_moved(item, place) for item in cast("list[Any]", schema)]
    if isinstance(schema, dict):
        return {
            key: place + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, place)
            for key, value in cast("dict[str, Any]", schema).items()
        }
    return schema
