"""A chat request -> the values that a chat template reads, and the grammar of a forced tool call."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from stretto.text.json_stream import whole_members
from stretto.text.schema import EnforceableSchema, enforceable, moved, object_schema
from stretto.text.tokenizer import TextModel
from stretto.text.tools.harmony_parser import (
    CHANNEL,
    HARMONY,
    HARMONY_TOKENS,
    MESSAGE,
    HarmonyParser,
)
from stretto.text.tools.parser import FORCED, CallParser, NamedCallParser, ToolFormat, ToolParser, choose
from stretto.text.tools.strict.formats import StrictTool
from stretto.text.tools.strict.lark import Rules
from stretto.text.tools.tag_formats import TAG_FORMATS, Parameters, TagFormat
from stretto.text.tools.tag_parser import TagParser
from stretto.types import CallGrammar, Grammar

CallFormat = ToolFormat | TagFormat


def messages(request: ChatRequest, text: TextModel) -> list[dict[str, Any]]:
    """The messages as a chat template reads them: one dict each, without absent fields.

    An answer that was cut by length may come back: of a call's arguments, the whole members count. Raises
    InvalidRequest for arguments that are no JSON object.
    """
    thinks = text.template is not None and text.template.mentions(reasoning_parser.OPEN)
    knows_calls = text.template is not None and text.template.mentions("tool_calls")
    knows_developer = text.template is not None and text.template.mentions("developer")
    found: list[dict[str, Any]] = []
    for at, message in enumerate(request.messages):
        path = f"$.messages[{at}]"
        if isinstance(message, AssistantMessage):
            found.append(_assistant(message, path, thinks, knows_calls))
        else:
            role = message.__struct_config__.tag
            if isinstance(message, DeveloperMessage) and not knows_developer:
                role = "system"
            values = {"role": role, **_named(message), "content": _joined(message.content)}
            found.append(_extra(message, path) | values)
    return found


def _extra(message: Message, path: str) -> dict[str, Any]:
    """The members that only the template may know. Raises InvalidRequest beyond the limits of free JSON."""
    if not message.extra:
        return {}
    check_json(message.extra, path)
    return message.extra


def _named(message: Message) -> dict[str, str]:
    fields = {name: getattr(message, name, None) for name in ("name", "tool_call_id")}
    return {name: value for name, value in fields.items() if value is not None}


def _joined(content: str | Sequence[TextPart | RefusalPart]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def _assistant(message: AssistantMessage, path: str, thinks: bool, knows_calls: bool) -> dict[str, Any]:
    content = None if message.content is None else _joined(message.content)
    if content is None and message.refusal is not None:
        content = message.refusal
    if content is None and not (message.tool_calls and knows_calls):
        content = ""  # only where a template writes calls does it read null as "calls alone"
    values: dict[str, Any] = _extra(message, path)
    values = values | {"role": "assistant", **_named(message), "content": content}
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
        arguments = whole_members(call.function.arguments)
    except RecursionError:
        raise InvalidRequest(f"{where} is nested too deeply; flatten it", param=where) from None
    if arguments is None:
        raise InvalidRequest(f"{where} must be a string that contains a JSON object", param=where)
    check_json(arguments, where)
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


def variables(request: ChatRequest, text: TextModel) -> dict[str, Any]:
    """The request's variables for the template. Raises UnsupportedField for one that the template ignores."""
    found = dict(request.chat_template_kwargs or {})
    if request.continue_final_message and request.add_generation_prompt is not False:
        where = "$.continue_final_message"
        raise InvalidRequest(f"{where} needs add_generation_prompt: false", param=where)
    template = text.template
    if template is None:
        return found
    for name in list(found):
        if name == "enable_thinking" and not found[name] and not template.mentions(name):
            del found[name]  # this model never reasons
        elif not template.mentions(name):
            where = f"$.chat_template_kwargs.{name}"
            raise UnsupportedField(
                f"{where}: this model's chat template does not use it; leave it out", param=where
            )
    if (effort := request.reasoning_effort) is not None:
        if template.mentions("reasoning_effort"):
            found.setdefault("reasoning_effort", effort)
        elif template.mentions("enable_thinking"):
            found.setdefault("enable_thinking", effort not in ("none", "minimal"))
        elif effort not in ("none", "minimal"):
            where = "$.reasoning_effort"
            raise UnsupportedField(f"{where}: this model does not support it; leave it out", param=where)
    if request.add_generation_prompt is False:
        found["add_generation_prompt"] = False
    return found


@dataclass(frozen=True, slots=True)
class ToolCalling:
    """How a request calls tools. `shown` are the tools for the template. `grammar` forces a call, or what
    follows once a call has begun. `parser` makes the parser of one answer. `single`: the first call ends the
    answer. `relaxed`: paths of the schemas' parts that the grammar does not enforce."""

    shown: list[dict[str, Any]] | None = None
    grammar: Grammar | None = None
    parser: Callable[[], CallParser] | None = None
    single: bool = False
    relaxed: tuple[str, ...] = ()

    @property
    def forced(self) -> bool:
        """Whether the answer is a call from its first token on."""
        return self.grammar is not None and self.grammar.kind != "tool_calls"


def calls(request: ChatRequest, text: TextModel) -> ToolCalling:
    """How the request's tools are called.

    Raises UnsupportedField for tools this model cannot call, InvalidRequest for a tool_choice without a tool.
    """
    tools = request.tools or []
    choice = request.tool_choice or ("auto" if tools else "none")
    if not tools and choice not in ("none", "auto"):
        raise InvalidRequest("$.tool_choice asks for a call, but $.tools is empty", param="$.tool_choice")
    harmony = text.template is not None and all(map(text.template.mentions, (CHANNEL, MESSAGE)))
    if choice == "none" or not tools:
        return ToolCalling(parser=partial(HarmonyParser, frozenset[str]()) if harmony else None)
    if text.template is None or not text.template.mentions("tools"):
        raise UnsupportedField(
            "$.tools: this model's chat template has no place for tools; leave them out", param="$.tools"
        )
    shown: list[dict[str, Any]] = [to_builtins(tool) for tool in tools]
    names = frozenset(tool.function.name for tool in tools)
    single = request.parallel_tool_calls is False
    strict = any(tool.function.strict for tool in tools)
    forced = choice != "auto"
    schemas = [_parameters(tool, at) for at, tool in enumerate(tools)] if forced or strict else []
    relaxed = tuple(path for schema in schemas for path in schema.relaxed)
    if isinstance(choice, ChosenTool):
        return _named_call(choice.function.name, tools, schemas, shown)
    if choice == "required":
        grammar = Grammar("json_schema", json.dumps(_any_call(tools, schemas, single)))
        return ToolCalling(shown, grammar, lambda: ToolParser(FORCED, names), relaxed=relaxed)
    form = _format_of(text, harmony)
    if form is None:
        raise UnsupportedField(
            "$.tools: Stretto cannot read this model's tool calls; tool_choice `required` works",
            param="$.tools",
        )
    grammar = _strict_calls(tools, schemas, form, text) if strict else None
    parameters = {tool.function.name: tool.function.parameters for tool in tools}
    return ToolCalling(shown, grammar, lambda: _parser(form, parameters), single, relaxed)


def _parser(form: CallFormat, parameters: Parameters) -> CallParser:
    names = frozenset(parameters)
    if isinstance(form, TagFormat):
        return TagParser(form, parameters)
    return HarmonyParser(names) if form is HARMONY else ToolParser(form, names)


def _parameters(tool: Tool, at: int) -> EnforceableSchema:
    """The schema of a tool's arguments. Raises UnsupportedField for one that `strict` cannot enforce, and
    InvalidRequest for one that describes no object."""
    path = f"$.tools[{at}].function.parameters"
    schema = object_schema(tool.function.parameters)
    if schema is None:
        raise InvalidRequest(f"{path}: arguments are an object, so `type` must be object", param=path)
    return checked_schema(schema, path, strict=bool(tool.function.strict))


def checked_schema(schema: dict[str, Any], path: str, *, strict: bool) -> EnforceableSchema:
    """The enforceable part of a schema. Raises UnsupportedField if `strict` forbids to leave a part out."""
    found = enforceable(schema, path)
    if found.essential:
        if strict:
            where = found.essential[0]
            raise UnsupportedField(
                f"{where} cannot be enforced while an answer is generated; leave it out, or leave strict out",
                param=where,
            )
        found.relaxed += found.essential
    return found


def _strict_calls(
    tools: list[Tool], schemas: list[EnforceableSchema], form: CallFormat, text: TextModel
) -> Grammar:
    """Free text, in which a call of a strict tool has arguments that satisfy its schema. Raises
    UnsupportedField for a schema that calls in this form cannot be held to."""
    known, others = text.marks(), text.marks(without=form.marks)
    if form.strict is None or (form is HARMONY and not known.keys() >= HARMONY_TOKENS):
        where = "$.tools[0].function.strict"
        raise UnsupportedField(
            f"{where}: the tokenizer lacks the special tokens that mark this model's calls; use tool_choice"
            " `required`",
            param=where,
        )
    rules = Rules({token: id for token, id in known.items() if token in form.marks})
    strict = [
        StrictTool(
            tool.function.name,
            schema.schema if tool.function.strict else {"type": "object"},
            f"$.tools[{at}].function.parameters",
        )
        for at, (tool, schema) in enumerate(zip(tools, schemas, strict=True))
    ]
    frame = form.strict(rules, strict, list(others.values()))
    found = CallGrammar(rules.source(*frame), rules.marks, rules.calls)
    return Grammar("tool_calls", json.dumps(to_builtins(found)))


def _format_of(text: TextModel, harmony: bool) -> CallFormat | None:
    """The tool call format that the chat template mentions, or else the vocabulary has tokens for."""
    template = text.template
    if template is None:
        return None
    if harmony:
        return HARMONY
    for form in TAG_FORMATS:
        if all(map(template.mentions, form.mentioned)):
            return form
    return choose(template.mentions) or choose(text.holds)


def _named_call(
    name: str, tools: list[Tool], schemas: list[EnforceableSchema], shown: list[dict[str, Any]]
) -> ToolCalling:
    for tool, schema in zip(tools, schemas, strict=True):
        if tool.function.name == name:
            grammar = Grammar("json_schema", json.dumps(schema.schema))
            return ToolCalling(shown, grammar, lambda: NamedCallParser(name), relaxed=tuple(schema.relaxed))
    where = "$.tool_choice.function.name"
    raise InvalidRequest(f"{where}: $.tools has no function {name!r}", param=where)


def _any_call(tools: list[Tool], schemas: list[EnforceableSchema], single: bool) -> dict[str, Any]:
    """The schema of a list of calls. Each tool's schema becomes a definition, and its references follow."""
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for at, tool in enumerate(tools):
        place = f"#/$defs/tool{at}"
        definitions[f"tool{at}"] = moved(schemas[at].schema, place)
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
