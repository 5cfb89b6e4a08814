"""How families of models write tool calls between tags.

A family is one row of data, with a function that reads what stands between the tags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

Parameters = Mapping[str, "dict[str, Any] | None"]  # the schema of each tool's arguments, by the tool's name
# (text between opener and closer, parameters, whole) -> (name, arguments); None: it is no call. `whole`: the
# closer came. If it did not, only the arguments that are whole count.
CallReader = Callable[[str, Parameters, bool], "tuple[str, dict[str, Any]] | None"]
LITERALS = {"True": True, "False": False, "None": None}
NESTING = 64


@dataclass(frozen=True, slots=True)
class TagFormat:
    """How a family writes a call. `mentioned`: a text that occurs in the chat templates of the family.

    `wrappers`: tags around all calls, which are neither content nor part of a call. `inner`: special tokens
    inside a call, which the detokenizer has to show.
    """

    mentioned: str
    read: CallReader
    opener: str = "<tool_call>"
    closer: str = "</tool_call>"
    wrappers: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()


def value_of(text: str, schema: Any) -> Any:
    """The JSON value that a parameter's text stands for. A text is a string if its schema allows a string, or
    if it is no JSON."""
    kinds: Any = cast("dict[str, Any]", schema).get("type") if isinstance(schema, dict) else None
    allowed = cast("list[Any]", kinds) if isinstance(kinds, list) else [kinds]
    if "string" in allowed and not (text == "null" and "null" in allowed):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return LITERALS.get(text.strip(), text)


def _read_tags(
    name: re.Pattern[str], argument: re.Pattern[str], inside: str, tools: Parameters, whole: bool
) -> tuple[str, dict[str, Any]] | None:
    """A name, then one tag for each argument. Group `kind` of `argument` is `true` for a string and `false`
    for JSON; without it, the schema decides."""
    found = name.match(inside)
    if found is None or found[1].strip() not in tools:
        return None
    called = found[1].strip()
    properties = cast("dict[str, Any]", (tools[called] or {}).get("properties", {}))
    arguments: dict[str, Any] = {}
    for match in argument.finditer(inside):
        key, text = match["key"].strip(), match["value"]
        kind = match.groupdict().get("kind")
        schema = properties.get(key) if kind is None else {"type": "string" if kind == "true" else "object"}
        arguments[key] = value_of(text, schema)
    return called, arguments


def _read_json(inside: str, tools: Parameters, whole: bool) -> tuple[str, dict[str, Any]] | None:
    """DeepSeek's: a name and a JSON object, which may be in a code block."""
    parts = inside.split(SEPARATOR)
    if len(parts) != 2:
        return None
    name, text = parts
    if name.strip() == "function":
        name, _, text = text.partition("\n")
    text = re.sub(r"^\s*```(?:json)?\s*|\s*```\s*$", "", text)
    if name.strip() not in tools:
        return None
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        if whole:
            return None
        arguments = {}
    if not isinstance(arguments, dict):
        return None
    return name.strip(), cast("dict[str, Any]", arguments)


def _read_braces(
    quote: str, inside: str, tools: Parameters, whole: bool
) -> tuple[str, dict[str, Any]] | None:
    """Gemma's: `call:NAME{KEY:VALUE,...}` with strings between two `quote`."""
    found = re.match(r"\s*call:\s*([^{\s]+)\s*(?=\{|$)", inside)
    if found is None or found[1] not in tools:
        return None
    reader = _Braces(inside[found.end() :], quote)
    try:
        return found[1], reader.object()
    except ValueError:
        return None if whole else (found[1], reader.members)


class _Braces:
    """Reads one object in Gemma's notation. `members`: those of the outermost object that are whole."""

    def __init__(self, text: str, quote: str) -> None:
        self._text = text
        self._quote = quote
        self._at = 0
        self.members: dict[str, Any] = {}

    def object(self, depth: int = 0) -> dict[str, Any]:
        """Raises ValueError for text that ends too early or is nested too deeply."""
        members: dict[str, Any] = {} if depth else self.members
        self._expect("{")
        while not self._take("}"):
            key = self._string() if self._text.startswith(self._quote, self._at) else self._until(":")
            self._expect(":")
            members[key.strip().strip('"')] = self._value(depth + 1)
            if not self._take(","):
                self._expect("}")
                break
        return members

    def _value(self, depth: int) -> Any:
        self._blanks()
        if depth > NESTING:
            raise ValueError("nested too deeply")
        if self._text.startswith(self._quote, self._at):
            return self._string()
        if self._text.startswith("{", self._at):
            return self.object(depth)
        if self._text.startswith('"', self._at):
            value, self._at = json.JSONDecoder().raw_decode(self._text, self._at)
            return value
        if self._take("["):
            items: list[Any] = []
            while not self._take("]"):
                items.append(self._value(depth + 1))
                if not self._take(","):
                    self._expect("]")
                    break
            return items
        return value_of(self._until(",", "}", "]").strip(), None)

    def _string(self) -> str:
        start = self._at + len(self._quote)
        end = self._text.find(self._quote, start)
        if end < 0:
            raise ValueError("a string without an end")
        self._at = end + len(self._quote)
        return self._text[start:end]

    def _until(self, *ends: str) -> str:
        start = self._at
        while self._at < len(self._text) and self._text[self._at] not in ends:
            self._at += 1
        if self._at == len(self._text):
            raise ValueError("the text ends inside a value")
        return self._text[start : self._at]

    def _blanks(self) -> None:
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1

    def _take(self, character: str) -> bool:
        self._blanks()
        if not self._text.startswith(character, self._at):
            return False
        self._at += 1
        return True

    def _expect(self, character: str) -> None:
        if not self._take(character):
            raise ValueError(f"{character!r} expected")


SEPARATOR = "<｜tool▁sep｜>"
# <tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>
QWEN_CODER = TagFormat(
    "<function=",
    partial(
        _read_tags,
        re.compile(r"\s*<function=([^>\n]+)>"),
        re.compile(r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>", re.DOTALL),
    ),
)
# <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>
GLM = TagFormat(
    "<arg_key>",
    partial(
        _read_tags,
        re.compile(r"\s*([\w.-]+)\s*(?=<arg_key>|$)"),
        re.compile(r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>", re.DOTALL),
    ),
)
# V3, R1: <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME, then JSON in a code block, <｜tool▁call▁end｜>
# V3.1: <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>JSON<｜tool▁call▁end｜>
DEEPSEEK = TagFormat(
    "<｜tool▁call▁begin｜>",
    _read_json,
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    (SEPARATOR,),
)
# V3.2: <｜DSML｜invoke name="NAME"><｜DSML｜parameter name="KEY" string="true">VALUE</｜DSML｜parameter>...
DEEPSEEK_DSML = TagFormat(
    "<｜DSML｜",
    partial(
        _read_tags,
        re.compile(r'\s*name="([^"\n]+)"\s*>'),
        re.compile(
            r'<｜DSML｜parameter name="(?P<key>[^"\n]+)"(?: string="(?P<kind>true|false)")?>'
            r"(?P<value>.*?)</｜DSML｜parameter>",
            re.DOTALL,
        ),
    ),
    "<｜DSML｜invoke",
    "</｜DSML｜invoke>",
    (
        "<｜DSML｜function_calls>",
        "</｜DSML｜function_calls>",
        "<｜DSML｜tool_calls>",
        "</｜DSML｜tool_calls>",
    ),
    ("｜DSML｜",),
)
# <start_function_call>call:NAME{KEY:<escape>VALUE<escape>}<end_function_call>
FUNCTION_GEMMA = TagFormat(
    "<start_function_call>",
    partial(_read_braces, "<escape>"),
    "<start_function_call>",
    "<end_function_call>",
    inner=("<escape>",),
)
# Gemma 4: <|tool_call>call:NAME{KEY:<|"|>VALUE<|"|>}<tool_call|>
GEMMA = TagFormat(
    "<|tool_call>", partial(_read_braces, '<|"|>'), "<|tool_call>", "<tool_call|>", inner=('<|"|>',)
)
TAG_FORMATS = (QWEN_CODER, GLM, DEEPSEEK_DSML, DEEPSEEK, FUNCTION_GEMMA, GEMMA)
TAGS = frozenset(
    tag for form in TAG_FORMATS for tag in (form.opener, form.closer, *form.wrappers, *form.inner)
)
