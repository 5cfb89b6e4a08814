"""How families of models write tool calls between tags.

A family is one row of data, with a function that reads what stands between the tags.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from stretto.text.tools.strict.branches import TYPES, NotWritable, branches, type_of, types_of
from stretto.text.tools.strict.formats import StrictFormat, braces, separated, tagged
from stretto.text.tools.strict.tags import TagLayout

Parameters = Mapping[str, "dict[str, Any] | None"]  # the schema of each tool's arguments, by the tool's name
LITERALS = {"True": True, "False": False, "None": None}
NESTING = 64
ENDS_TRIED = 16  # of a value or a call, when the text that ends it occurs inside it too
LONGEST_INTEGER = 300  # digits


ReadCall = tuple[str, dict[str, Any]]
# (text between opener and closer, parameters, whole) -> (name, arguments); None: it is no call. `whole`: the
# closer came. If it did not, only the arguments that are whole count. Raises UnfinishedCall if a closer came
# before the call was whole.
CallReader = Callable[[str, Parameters, bool], ReadCall | None]


class UnfinishedCall(ValueError):
    """The text is the beginning of a call. `call`: what it is if it does not go on; None: no call."""

    def __init__(self, call: ReadCall | None = None) -> None:
        super().__init__("the call goes on")
        self.call = call


@dataclass(frozen=True, slots=True)
class TagFormat:
    """How a family writes a call. `mentioned`: texts that occur in the chat templates of the family.

    `wrappers`: tags around all calls, which are neither content nor part of a call. `inner`: special tokens
    inside a call, which the detokenizer has to show. `strict` writes the grammar of strict calls. `bare`: how
    a call begins and ends whose opener the model left out.
    """

    mentioned: tuple[str, ...]
    read: CallReader
    strict: StrictFormat
    opener: str = "<tool_call>"
    closer: str = "</tool_call>"
    wrappers: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    bare: tuple[str, str] | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        """The texts of a call that may be special tokens."""
        return (self.opener, self.closer, *self.inner)


@dataclass(frozen=True, slots=True)
class TagReader:
    """The texts of a call with tags. `key` is found before a value and `after` follows it.

    Group `kind` of `key` is `true` for a string and `false` for JSON; without it, the schema decides. `trim`:
    a line break on each side of a value is no part of it.
    """

    name: re.Pattern[str]
    key: re.Pattern[str]
    after: str
    trim: bool = False


def value_of(text: str, types: frozenset[str]) -> Any:
    """The value that a parameter's text stands for: JSON of an allowed type, else a string."""
    try:
        value: Any = loads(text)
    except (ValueError, RecursionError):
        return text if "string" in types else LITERALS.get(text.strip(), text)
    kind = type_of(value)
    if "string" not in types or types >= TYPES or (kind != "string" and kind in types):
        return value
    return value if kind == "integer" and "number" in types else text


def loads(text: str) -> Any:
    """A JSON value whose numbers Python and JSON can write again. Raises ValueError, RecursionError."""
    return json.loads(text, parse_constant=_no_constant, parse_float=_float, parse_int=_integer)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _float(text: str) -> float:
    most = sys.float_info.max
    return min(most, max(-most, float(text)))


def _integer(text: str) -> int | float:
    return int(text) if len(text) <= LONGEST_INTEGER else _float(text)


def parameter_types(schema: dict[str, Any] | None, key: str) -> frozenset[str]:
    """The types that a tool's schema allows for one parameter."""
    try:
        plains = branches(schema or {}, schema)
        allowed = [each.get("properties", {}).get(key, each.get("additionalProperties")) for each in plains]
        values = [plain for each in allowed if each is not False for plain in branches(each, schema)]
        return frozenset[str]().union(*map(types_of, values)) or TYPES
    except (NotWritable, AttributeError, TypeError):  # a schema that is none says nothing
        return TYPES


def _read_tags(
    reader: TagReader, inside: str, tools: Parameters, whole: bool
) -> tuple[str, dict[str, Any]] | None:
    """A name, then one tag for each argument."""
    found = reader.name.match(inside)
    if found is None or found[1].strip() not in tools:
        return None
    called = found[1].strip()
    arguments: dict[str, Any] = {}
    at, broken = found.end(), False
    while (head := reader.key.search(inside, at)) is not None:
        key, kind = head["key"].strip(), head.groupdict().get("kind")
        types = parameter_types(tools[called], key)
        if kind is not None:
            types = frozenset({"string"}) if kind == "true" else TYPES - {"string"}
        end, json_ended = _end_of_value(inside, head.end(), reader, types)
        broken = broken or not json_ended
        if end < 0:
            break
        arguments[key] = value_of(_trimmed(inside[head.end() : end], reader), types)
        at = end + len(reader.after)
    if broken and whole:
        raise UnfinishedCall((called, arguments))
    return called, arguments


def _end_of_value(inside: str, start: int, reader: TagReader, types: frozenset[str]) -> tuple[int, bool]:
    """Where a value ends, -1 if it does not, and whether that is sure. JSON may contain the text that ends
    it, in a string."""
    first = end = inside.find(reader.after, start)
    if "string" in types:
        return first, first >= 0
    for _ in range(ENDS_TRIED):
        if end < 0:
            break
        try:
            loads(inside[start:end])
        except (ValueError, RecursionError):
            end = inside.find(reader.after, end + 1)
        else:
            return end, True
    return first, inside[start:first].strip() in LITERALS


def _trimmed(text: str, reader: TagReader) -> str:
    return text.removeprefix("\n").removesuffix("\n") if reader.trim else text


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
        arguments = loads(text or "{}")
    except (ValueError, RecursionError):
        if whole:
            raise UnfinishedCall() from None
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
        if whole:
            raise UnfinishedCall() from None
        return found[1], reader.members


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
        return value_of(self._until(",", "}", "]").strip(), TYPES)

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
    ("<function=",),
    partial(
        _read_tags,
        TagReader(
            re.compile(r"\s*<function=([^>\n]+)>"),
            re.compile(r"<parameter=(?P<key>[^>\n]+)>"),
            "</parameter>",
            trim=True,
        ),
    ),
    partial(
        tagged,
        TagLayout(
            "\n<function={name}>\n",
            "<parameter={key}>\n",
            "\n</parameter>\n",
            "</function>\n</tool_call>",
            ("</parameter>", "</tool_call>"),
            r"[^\s>]([^>\n]*[^\s>])?",
        ),
        ("<tool_call>", "<function="),
        (),
    ),
    bare=("<function=", "</function>"),
)
# <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>
GLM = TagFormat(
    ("<arg_key>",),
    partial(
        _read_tags,
        TagReader(
            re.compile(r"\s*([\w.:-]+)\s*(?=<arg_key>|$)"),
            re.compile(r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>", re.DOTALL),
            "</arg_value>",
        ),
    ),
    partial(
        tagged,
        TagLayout(
            "{name}\n",
            "<arg_key>{key}</arg_key>\n<arg_value>",
            "</arg_value>\n",
            "</tool_call>",
            ("</arg_value>", "</tool_call>"),
            r"[^\s<]([^<]*[^\s<])?",
        ),
        ("<tool_call>",),
        (),
    ),
)
CALLS = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
# V3.1: <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>JSON<｜tool▁call▁end｜>
DEEPSEEK = TagFormat(
    (CALL_BEGIN,),
    _read_json,
    partial(separated, (CALL_BEGIN, "", SEPARATOR, CALL_END), CALLS),
    CALL_BEGIN,
    CALL_END,
    CALLS,
    (SEPARATOR,),
)
# V3, R1: <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME, then JSON in a code block, <｜tool▁call▁end｜>
DEEPSEEK_V3 = replace(
    DEEPSEEK,
    mentioned=(CALL_BEGIN, "```json"),
    strict=partial(separated, (CALL_BEGIN, f"function{SEPARATOR}", "\n```json\n", f"\n```{CALL_END}"), CALLS),
)
DSML_WRAPPERS = (
    "<｜DSML｜function_calls>",
    "</｜DSML｜function_calls>",
    "<｜DSML｜tool_calls>",
    "</｜DSML｜tool_calls>",
)
# V3.2: <｜DSML｜invoke name="NAME"><｜DSML｜parameter name="KEY" string="true">VALUE</｜DSML｜parameter>...
DEEPSEEK_DSML = TagFormat(
    ("<｜DSML｜",),
    partial(
        _read_tags,
        TagReader(
            re.compile(r'\s*name="([^"\n]+)"\s*>'),
            re.compile(r'<｜DSML｜parameter name="(?P<key>[^"\n]+)"(?: string="(?P<kind>true|false)")?>'),
            "</｜DSML｜parameter>",
        ),
    ),
    partial(
        tagged,
        TagLayout(
            ' name="{name}">\n',
            '<｜DSML｜parameter name="{key}" string="{kind}">',
            "</｜DSML｜parameter>\n",
            "</｜DSML｜invoke>",
            ("</｜DSML｜parameter>", "</｜DSML｜invoke>"),
            r'[^\s"]([^"\n]*[^\s"])?',
            ("true", "false"),
        ),
        ("<｜DSML｜invoke",),
        DSML_WRAPPERS,
    ),
    "<｜DSML｜invoke",
    "</｜DSML｜invoke>",
    DSML_WRAPPERS,
    ("｜DSML｜",),
)
ESCAPE, QUOTE = "<escape>", '<|"|>'
# <start_function_call>call:NAME{KEY:<escape>VALUE<escape>}<end_function_call>
FUNCTION_GEMMA = TagFormat(
    ("<start_function_call>",),
    partial(_read_braces, ESCAPE),
    partial(braces, ("<start_function_call>", "<end_function_call>", ESCAPE)),
    "<start_function_call>",
    "<end_function_call>",
    inner=(ESCAPE,),
)
# Gemma 4: <|tool_call>call:NAME{KEY:<|"|>VALUE<|"|>}<tool_call|>
GEMMA = TagFormat(
    ("<|tool_call>",),
    partial(_read_braces, QUOTE),
    partial(braces, ("<|tool_call>", "<tool_call|>", QUOTE)),
    "<|tool_call>",
    "<tool_call|>",
    inner=(QUOTE,),
)
TAG_FORMATS = (QWEN_CODER, GLM, DEEPSEEK_DSML, DEEPSEEK_V3, DEEPSEEK, FUNCTION_GEMMA, GEMMA)
TAGS = frozenset(
    tag for form in TAG_FORMATS for tag in (form.opener, form.closer, *form.wrappers, *form.inner)
)
