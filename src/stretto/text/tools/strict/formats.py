"""How each family writes strict calls: the rows that the formats of the parsers refer to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from stretto.errors import UnsupportedField
from stretto.text.schema import Schema
from stretto.text.tools.strict.braces import BracesWriter
from stretto.text.tools.strict.branches import NotWritable
from stretto.text.tools.strict.frames import Frame, between_text, from_the_start, in_messages
from stretto.text.tools.strict.lark import GrammarPiece, RuleName, Rules, TerminalText, quoted
from stretto.text.tools.strict.tags import TagLayout, tagged_arguments


class StrictTool(NamedTuple):
    """A tool that may be called: what its arguments satisfy, and where that stands in the request."""

    name: str
    schema: Schema
    path: str


# (rules, tools, special tokens that may occur in text) -> the frame of an answer
StrictFormat = Callable[[Rules, Sequence[StrictTool], Sequence[int]], Frame]


def each_call(
    rules: Rules, tools: Sequence[StrictTool], write: Callable[[StrictTool], Sequence[GrammarPiece]]
) -> RuleName:
    """A call of any tool. Raises UnsupportedField for a schema that a call cannot be held to."""
    found: list[RuleName] = []
    for tool in tools:
        try:
            found.append(rules.rule(write(tool)))
        except NotWritable as error:
            raise UnsupportedField(
                f"{tool.path}: {error} cannot be enforced in this model's way to write calls; change the"
                " schema, leave strict out, or use tool_choice `required`",
                param=tool.path,
            ) from None
    rules.calls += [rule.name for rule in found]
    return rules.rule(*([rule] for rule in found))


def objects(
    rules: Rules, tools: Sequence[StrictTool], before: str, field: str, closer: Sequence[GrammarPiece]
) -> RuleName:
    """A call as a JSON object with `name` and, in `field`, the arguments. `before`: the text in front of it;
    `closer`: what ends it."""
    return each_call(
        rules,
        tools,
        lambda tool: [
            TerminalText(quoted(f'{before}{{"name": {json.dumps(tool.name)}, "{field}": ')),
            rules.json(tool.schema),
            *closer,
        ],
    )


def hermes(rules: Rules, tools: Sequence[StrictTool], others: Sequence[int]) -> Frame:
    """`<tool_call>`, a JSON object with `name` and `arguments`, `</tool_call>`."""
    end = [TerminalText(quoted("}\n")), *rules.literal("</tool_call>")]
    calls = objects(rules, tools, "\n", "arguments", end)
    return between_text(rules, "<tool_call>", calls, (), others)


def llama(rules: Rules, tools: Sequence[StrictTool], others: Sequence[int]) -> Frame:
    """A JSON object with `name` and `parameters`, from the first character on or after a token."""
    call = objects(rules, tools, "", "parameters", [TerminalText('"}"')])
    return from_the_start(rules, "<|python_tag|>", call, "/; ?/", others)


def mistral(rules: Rules, tools: Sequence[StrictTool], others: Sequence[int]) -> Frame:
    """After a token either an array of JSON objects, or a name, perhaps an id, and the arguments."""
    listed = objects(rules, tools, "", "arguments", [TerminalText('"}"')])
    mark = rules.literal("[ARGS]") if rules.special("[ARGS]") else []
    if rules.special("[CALL_ID]"):
        id = [*rules.literal("[CALL_ID]"), TerminalText("/[a-zA-Z0-9]{9}/")]
        mark = [rules.repeated(id, "?"), *mark]
    named = each_call(
        rules, tools, lambda tool: [TerminalText(quoted(tool.name)), *mark, rules.json(tool.schema)]
    )
    more = rules.repeated([TerminalText("/, ?/"), listed], "*")
    calls = rules.rule([TerminalText('"["'), listed, more, TerminalText('"]"')], [named])
    return between_text(rules, "[TOOL_CALLS]", calls, (), others)


def harmony(rules: Rules, tools: Sequence[StrictTool], others: Sequence[int]) -> Frame:
    """Messages to a function, whose text is JSON."""
    schemas = [(tool.name, rules.json(tool.schema)) for tool in tools]
    rules.calls += [schema.name for _, schema in schemas]
    return in_messages(rules, schemas, ("<|end|>",))


def tagged(
    layout: TagLayout,
    openers: tuple[str, ...],
    wrappers: tuple[str, ...],
    rules: Rules,
    tools: Sequence[StrictTool],
    others: Sequence[int],
) -> Frame:
    """Each argument between tags of its own. `openers`: the one that a call has, then those of calls that
    lack it."""
    calls = each_call(rules, tools, lambda tool: tagged_arguments(rules, layout, tool.name, tool.schema))
    return between_text(rules, openers[0], calls, wrappers, others, openers[1:])


def separated(
    texts: tuple[str, str, str, str],
    wrappers: tuple[str, ...],
    rules: Rules,
    tools: Sequence[StrictTool],
    others: Sequence[int],
) -> Frame:
    """`texts`: the opener, what is before a name, between it and its arguments in JSON, and the closer."""
    opener, before, between, closer = texts
    calls = each_call(
        rules,
        tools,
        lambda tool: [
            *rules.literal(before),
            TerminalText(quoted(tool.name)),
            *rules.literal(between),
            rules.json(tool.schema),
            *rules.literal(closer),
        ],
    )
    return between_text(rules, opener, calls, wrappers, others)


def braces(
    texts: tuple[str, str, str], rules: Rules, tools: Sequence[StrictTool], others: Sequence[int]
) -> Frame:
    """Gemma's notation. `texts`: the opener, the closer, and the quote of strings."""
    opener, closer, quote = texts

    def write(tool: StrictTool) -> list[GrammarPiece]:
        writer = BracesWriter(rules, quote, (closer,), tool.schema)
        arguments = writer.value(tool.schema, frozenset({"object"}))
        return [TerminalText(quoted(f"call:{tool.name}")), arguments, *rules.literal(closer)]

    return between_text(rules, opener, each_call(rules, tools, write), (), others)
