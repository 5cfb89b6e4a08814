"""Strict calls in every format, sampled at random under their grammar: the parser reads what came, and it
satisfies the schemas.

The sampler is no friend: it also tries to write the texts that end values and calls, wherever the grammar
lets it.
"""

from __future__ import annotations

import json
import random
import re
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from llguidance import LLTokenizer, TokenizerWrapper

from stretto.engine.structured.grammar import Grammars, Matcher
from stretto.engine.structured.sandbox_worker import ByteVocabulary, error_of
from stretto.protocol.openai import ChatRequest
from stretto.text.messages import calls
from stretto.text.output import AnswerParser
from stretto.text.tokenizer import TextModel
from stretto.text.tools import markers
from tests.server.checkpoint import CHATML, byte_level, write

# What a template mentions -> how a call begins in that format.
FORMATS = {
    "<tool_call>": '<tool_call>\n{"name": "',
    "[TOOL_CALLS]": "[TOOL_CALLS]",
    "<|python_tag|>": '{"name": "',
    "<function=": "<tool_call>\n<function=",
    "<arg_key>": "<tool_call>",
    "<｜tool▁call▁begin｜>": "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁begin｜> ```json": "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    "<｜DSML｜": "<｜DSML｜invoke",
    "<start_function_call>": "<start_function_call>call:",
    "<|tool_call>": "<|tool_call>call:",
    "<|channel|><|message|>": "<|channel|>commentary to=functions.",
}
SPECIAL = (
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|python_tag|>",
    "<tool_call>",
    "</tool_call>",
    "<|channel|>",
    "<|message|>",
)
SPECIAL += (
    "<|constrain|>",
    "<|call|>",
    "<|return|>",
    "<|end|>",
    "<|start|>",
    "<escape>",
    "<start_function_call>",
)
SPECIAL += (
    "<end_function_call>",
    "<|tool_call>",
    "<tool_call|>",
    '<|"|>',
    "｜DSML｜",
    "<｜tool▁sep｜>",
    "<other>",
)
SPECIAL += tuple(f"<｜tool▁call{each}｜>" for each in ("▁begin", "▁end", "s▁begin", "s▁end"))
PLACE = {
    "type": "object",
    "properties": {"street": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["street"],
    "additionalProperties": False,
}
# As pydantic and Zod write them.
DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"
EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
TOOLS: list[dict[str, Any]] = [
    {
        "name": "book",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
                "mixed": {"type": ["string", "number", "boolean"]},
                "level": {"enum": ["low", "high", 3, None, "</parameter>", "<escape>"]},
                "code": {"type": "string", "pattern": "^[A-Z]{2}(?P<number>[0-9]+)$"},
                "amount": {"anyOf": [{"type": "number"}, {"type": "string", "pattern": DECIMAL}]},
                "mail": {"type": "string", "format": "email", "pattern": EMAIL, "maxLength": 12},
                "on": {"type": "string", "format": "date"},
                "short": {"type": "string", "minLength": 1, "maxLength": 3},
                "place": {"$ref": "#/$defs/place"},
                "way": {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "string", "minLength": 2}]},
                "grid": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 3},
                "any": {},
            },
            "required": ["city", "days", "code", "place"],
            "additionalProperties": False,
            "$defs": {"place": PLACE},
        },
    },
    {
        "name": "act",
        "strict": True,
        "parameters": {
            "anyOf": [
                {"properties": {"kind": {"const": "a"}, "n": {"type": "number"}}, "required": ["kind", "n"]},
                {"properties": {"kind": {"const": "b"}, "t": {"type": "boolean"}}, "required": ["kind", "t"]},
            ]
        },
    },
    {"name": "free", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
    {
        "name": "ping.v2",
        "strict": True,
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
]
SCHEMAS = {tool["name"]: tool["parameters"] if tool.get("strict") else {"type": "object"} for tool in TOOLS}
# What a hostile model would try to write.
TRIES = [
    "</parameter>",
    "\n</parameter>\n",
    "</function>",
    "</tool_call>",
    "</arg_value>",
    "<arg_key>",
    "<escape>",
]
TRIES += [
    "<end_function_call>",
    '<|"|>',
    "<tool_call|>",
    "<｜tool▁call▁end｜>",
    "\n```",
    "</｜DSML｜parameter>",
    "}",
]
TRIES += [
    "</｜DSML｜invoke>",
    "<|end|>",
    "<|call|>",
    "<|start|>assistant",
    '"',
    "]",
    "null",
    "12",
    "true",
    "{",
    "[",
    ",",
]
TRIES += [
    "12\n</parameter>",
    "null</arg_value>",
    '{"',
    "-1.5",
    "<other>",
    "<",
    "functions.act",
    "; {",
    '"}',
    "\\ud83d",
]


def model(folder: Path, mentioned: str, special: bool) -> TextModel:
    template = CHATML.replace("<tool_call>", "").replace("</tool_call>", "")
    template += "{% if tools %}{% set example = '" + mentioned + "' %}{% endif %}"
    extra = tuple(each for each in SPECIAL if special and each not in ("<|end|>", "<|start|>"))
    return TextModel(write(folder, byte_level(extra=extra), template, eos="<|stop|>"))


def request(tools: list[dict[str, Any]]) -> ChatRequest:
    wrapped = [{"type": "function", "function": tool} for tool in tools]
    return msgspec.convert({"messages": [{"role": "user", "content": "a"}], "tools": wrapped}, ChatRequest)


def kind_of(value: Any) -> str:
    kinds = {
        type(None): "null",
        bool: "boolean",
        int: "integer",
        float: "number",
        str: "string",
        list: "array",
    }
    return kinds.get(type(value), "object")


def satisfies(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a value satisfies a schema, as JSON Schema means the keywords that stand above."""
    if "$ref" in schema:
        return satisfies(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    kinds = schema.get("type", kind_of(value))
    kind = "number" if kind_of(value) == "integer" and "number" in kinds else kind_of(value)
    found = kind in ([kinds] if isinstance(kinds, str) else kinds)
    found &= value in schema.get("enum", [value]) and value == schema.get("const", value)
    found &= "anyOf" not in schema or any(satisfies(value, each, root) for each in schema["anyOf"])
    if isinstance(value, str):
        found &= schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 1e9)
        found &= re.search(schema.get("pattern", ""), value) is not None
        found &= schema.get("format") != "date" or bool(
            date.fromisoformat("2000" + value[4:])  # a grammar does not know leap years
        )
    if isinstance(value, int | float):
        found &= schema.get("minimum", -1e999) <= value <= schema.get("maximum", 1e999)
    if isinstance(value, list):
        items: list[Any] = value
        found &= schema.get("minItems", 0) <= len(items) <= schema.get("maxItems", 1e9)
        found &= all(satisfies(each, schema.get("items", {}), root) for each in items)
    if isinstance(value, dict):
        members: dict[str, Any] = value
        properties = schema.get("properties", {})
        found &= members.keys() >= set(schema.get("required", ()))
        found &= schema.get("additionalProperties", True) or members.keys() <= properties.keys()
        found &= all(satisfies(each, properties.get(key, {}), root) for key, each in members.items())
    return bool(found)


class Sampler:
    """Draws tokens that a grammar allows."""

    def __init__(self, text: TextModel, matcher: Matcher, seed: int) -> None:
        self._text = text
        self._matcher = matcher
        self._random = random.Random(seed)
        self._stop = text.tokenizer.token_to_id("<|stop|>")
        self.tokens: list[int] = []

    def force(self, text: str) -> bool:
        """Write a text, or as much of it as the grammar allows."""
        for token in self._text.encode(text, special=False):
            if token not in self._allowed():
                return False
            self._push(token)
        return True

    def answer(self, steps: int) -> bool:
        """Draw tokens at random; then end the answer. Returns False if no end was found."""
        for step in range(steps * 8):
            allowed = self._allowed()
            assert allowed, self._matcher.error
            if self._stop in allowed and (len(allowed) == 1 or step >= steps):
                return True
            before = len(self.tokens)
            if len(allowed) > 1 and self._random.random() < (0.4 if step < steps else 0.9):
                self.force(self._random.choice(TRIES))
            if len(self.tokens) == before and (step < steps or len(allowed) < 40):
                self._push(self._random.choice([token for token in allowed if token != self._stop]))
        return False

    def _push(self, token: int) -> None:
        assert self._matcher.accept(token)
        self.tokens.append(token)

    def _allowed(self) -> list[int]:
        bits = np.zeros(self._matcher.words, dtype=np.int32)
        self._matcher.mask_into(bits)
        return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()


def read(text: TextModel, tokens: list[int], parser: AnswerParser) -> tuple[str, list[tuple[str, str]]]:
    """The content, and the name and arguments of each call."""
    detokenizer = text.detokenizer(show=markers.VISIBLE)
    deltas = [delta for token in tokens for delta in parser.push(detokenizer.push(token))]
    deltas += parser.push(detokenizer.flush()) + parser.flush()
    content, found = "", dict[int, tuple[str, str]]()
    for delta in deltas:
        content += delta.content if isinstance(delta.content, str) else ""
        for call in delta.tool_calls or ():
            name, arguments = found.get(call.index, ("", ""))
            part = call.function
            found[call.index] = (name or str(part.name), arguments + (part.arguments or ""))
    assert not parser.abandoned
    return content, list(found.values())


@pytest.mark.parametrize("special", [False, True], ids=["spelled", "special"])
@pytest.mark.parametrize("mentioned", FORMATS)
def test_what_is_sampled_is_read_and_satisfies_the_schema(mentioned: str, special: bool, tmp_path: Path):
    if mentioned.startswith("<|channel|>") and not special:
        return  # it is refused
    text = model(tmp_path, mentioned, special)
    found = calls(request(TOOLS), text)
    assert found.grammar is not None and found.parser is not None
    vocab = text.tokenizer.get_vocab_size()
    grammars = Grammars(tmp_path, frozenset({text.tokenizer.token_to_id("<|stop|>")}), vocab)
    ended = 0
    names: set[str] = set()
    for seed in range(24):
        tool = TOOLS[seed % len(TOOLS)]["name"]
        sampler = Sampler(text, grammars.compile(found.grammar), seed)
        assert sampler.force(FORMATS[mentioned])
        sampler.force(tool)
        if not sampler.answer(120):
            continue
        ended += 1
        _, called = read(text, sampler.tokens, AnswerParser(None, found.parser()))
        raw = text.decode(sampler.tokens, special=True)
        assert called, raw
        for name, arguments in called:
            names.add(name)
            assert satisfies(json.loads(arguments), SCHEMAS[name], SCHEMAS[name]), (name, arguments)
    assert ended >= 8 and len(names) == len(TOOLS), (ended, names)


@pytest.mark.parametrize("mentioned", FORMATS)
def test_the_sandbox_compiles_calls_in_every_format_and_refuses_bad_schemas(mentioned: str, tmp_path: Path):
    bytes_only = LLTokenizer(TokenizerWrapper(ByteVocabulary()))
    text = model(tmp_path, mentioned, True)
    grammar = calls(request(TOOLS), text).grammar
    assert grammar is not None and error_of(bytes_only, grammar) is None
    parameters = {"type": "object", "properties": {"a": {"type": "string", "pattern": r"a^c"}}}
    grammar = calls(request([{"name": "f", "strict": True, "parameters": parameters}]), text).grammar
    assert grammar is not None
    assert "look-around" in str(error_of(bytes_only, grammar))
    if mentioned == "<tool_call>":  # a format whose arguments the grammar library reads
        parameters = {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}}
        grammar = calls(request([{"name": "f", "strict": True, "parameters": parameters}]), text).grammar
        assert grammar is not None
        said = "the schema of a tool does not compile: Pointer '/$defs/b' does not exist"
        assert error_of(bytes_only, grammar) == said


def test_tokens_beside_the_calls_stay_free(tmp_path: Path):
    text = model(tmp_path, "<tool_call>", False)
    vocab = text.tokenizer.get_vocab_size()
    grammars = Grammars(tmp_path, frozenset({text.tokenizer.token_to_id("<|stop|>")}), vocab)
    grammar = calls(request(TOOLS), text).grammar
    assert grammar is not None
    # `<think>` and `<tool_call>` are tokens of their own, though no special ones, in models of this family.
    assert text.holds("<think>") and text.special_id("<think>") is None
    sampler = Sampler(text, grammars.compile(grammar), 0)
    assert sampler.force('<think>\nhm\n</think>\n\nSo: <tool_call>\n{"name": "ping.v2", "arguments": {}}')
    assert sampler.force("\n</tool_call>") and not sampler.force("<tool_call>{")


@pytest.mark.parametrize("special", [False, True])
def test_a_strict_call_has_its_opener(special: bool, tmp_path: Path):
    """A reader takes a call without one too, so the grammar must not let it be written."""
    text = model(tmp_path, "<function=", special)
    found = calls(request(TOOLS), text)
    assert found.grammar is not None
    grammars = Grammars(
        tmp_path, frozenset({text.tokenizer.token_to_id("<|stop|>")}), text.tokenizer.get_vocab_size()
    )
    assert Sampler(text, grammars.compile(found.grammar), 0).force(
        "Sure: a <functional> <tool_call>\n<function=book>"
    )
    assert not Sampler(text, grammars.compile(found.grammar), 0).force("Sure: <function=book>")
