"""The part of a JSON schema that a grammar can enforce, with real compilations."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher, LLTokenizer

from stretto.engine.structured.grammar import compiled
from stretto.errors import InvalidGrammar
from stretto.text.schema import enforceable, moved, object_schema
from stretto.text.tools.strict.formats import StrictTool, hermes
from stretto.text.tools.strict.lark import Rules, without
from stretto.text.tools.strict.strings import searched
from stretto.types import CallGrammar, Grammar
from tests.text.test_strict_calls import DECIMAL, EMAIL

DESK = Path(__file__).parents[2] / "src" / "stretto" / "desk" / "tokenizer.json"
TOKENIZER = LLTokenizer(DESK.read_text())


def accepts(schema: Any, value: Any) -> bool:
    """Whether the grammar of the schema's enforceable part allows the value as a whole text."""
    matcher: LLMatcher = compiled(TOKENIZER, Grammar("json_schema", json.dumps(enforceable(schema).schema)))
    tokens = TOKENIZER.tokenize_str(json.dumps(value))
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


RANGE = ["$.minimum", "$.maximum"]
CASES: list[tuple[dict[str, Any], list[Any], list[Any], list[str]]] = [
    # schema, values it allows, values it forbids, paths that are relaxed
    ({"type": "object", "propertyNames": {"type": "string"}}, [{"a": 1}], [1], []),
    ({"type": "object", "propertyNames": {"pattern": "^a"}}, [{"ab": 1}], [{"b": 1}], []),
    (
        {
            "type": "object",
            "propertyNames": {"enum": ["x", "y"]},
            "additionalProperties": {"type": "integer"},
        },
        [{"x": 1}, {"x": 1, "y": 2}],
        [{"z": 1}, {"x": "1"}],
        [],
    ),
    (
        {"type": "array", "uniqueItems": True, "items": {"type": "integer"}},
        [[1, 1]],
        [["a"]],
        ["$.uniqueItems"],
    ),
    ({"type": "string", "format": "uri-reference"}, ["x"], [1], []),
    ({"type": "string", "format": "jwt"}, ["x"], [1], []),
    ({"type": "string", "format": "date"}, ["2026-11-29"], ["x"], []),
    ({"$schema": "s", "$id": "http://x/y", "$anchor": "a", "type": "integer"}, [1], ["a"], []),
    (
        {
            "type": "object",
            "properties": {"n": {"$ref": "#name"}},
            "$defs": {"N": {"$anchor": "name", "type": "integer"}},
        },
        [{"n": 1}],
        [{"n": "a"}],
        [],
    ),
    *(
        (
            {
                "$id": "http://x/y",
                "type": "object",
                "properties": {"n": {"$ref": f"http://x/y#{inner}"}},
                "$defs": {"N": {"$anchor": "name", "type": "integer"}},
            },
            [{"n": 1}],
            [{"n": "a"}],
            [],
        )
        for inner in ("/$defs/N", "name")
    ),
    ({"const": 1, "$ref": "#/$defs/X", "$defs": {"X": {"type": "integer"}}}, [1], [2], []),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "a"], [None], []),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, [1, 1.5], ["a"], ["$.oneOf"]),
    (
        {
            "oneOf": [
                {"type": "object", "properties": {"k": {"const": kind}}, "required": ["k"]}
                for kind in ("a", "b")
            ]
        },
        [{"k": "a"}],
        [{"k": "c"}],
        [],
    ),
    *(
        (
            {
                "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
                "discriminator": {
                    "propertyName": "k",
                    "mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"},
                },
                "$defs": {
                    name: {
                        "type": "object",
                        "properties": {"k": kind | {"type": "string", "title": "K"}},
                        "required": ["k"],
                    }
                    for name, kind in kinds.items()
                },
            },
            [{"k": "cat"}],
            [{"k": "cow"}],
            [],
        )
        for kinds in (
            {"Cat": {"const": "cat"}, "Dog": {"const": "dog"}},
            {"Cat": {"enum": ["cat", "kitten"]}, "Dog": {"enum": ["dog"]}},
        )
    ),
    (
        {"oneOf": [{"$ref": "#/$defs/A"}, {"type": "null"}], "$defs": {"A": {"type": "integer"}}},
        [1, None],
        ["a"],
        [],
    ),
    *(
        (
            {
                "properties": {"a": {"$ref": f"#/$defs/{ref}"}},
                "$defs": {"Größe[int] 5%": {"type": "integer"}},
            },
            [{"a": 1}],
            [{"a": "x"}],
            [],
        )
        for ref in ("Größe[int] 5%", "Gr%C3%B6%C3%9Fe%5Bint%5D%205%25")
    ),
    # pydantic's decimal numbers, Zod's e-mail, host names and durations
    ({"type": "string", "pattern": DECIMAL}, ["1.5", "-3"], ["", "-.", "x"], []),
    (
        {
            "type": "string",
            "format": "email",
            "pattern": EMAIL,
        },
        ["a.b@c.org"],
        [".a@c.org", "a..b@c.org", "a"],
        [],
    ),
    ({"type": "string", "pattern": r"^(?=.{1,5}$)(?=a)[a-z.]+$"}, ["ab.c"], ["abcdef", "b"], []),
    (
        {"type": "string", "format": "duration", "pattern": r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+D)?)$"},
        ["P1D", "P2W"],
        ["1D"],
        ["$.pattern"],
    ),
    ({"type": "string", "pattern": r"^(?<year>\d{4})\/\p{L}+$"}, ["2026/Mai"], ["26/Mai"], []),
    ({"type": "number", "minimum": -3.4028234663852886e38, "maximum": 3.4e38}, [-1.5, 0], ["a"], RANGE),
    ({"type": "number", "minimum": 0, "maximum": 1.7976931348623157e308}, [1.5], [-1], []),
    ({"type": "integer", "minimum": 0, "maximum": 18446744073709551615}, [2**60], [-1], ["$.maximum"]),
    ({"minLength": None, "type": "integer", "enum": None, "properties": None}, [1], ["a"], []),
    (
        {
            "properties": {"n": {"$dynamicRef": "#name"}},
            "$defs": {"N": {"$dynamicAnchor": "name", "type": "integer"}},
        },
        [{"n": 1}],
        [{"n": "a"}],
        [],
    ),
    ({"type": "object", "properties": {"not": {"type": "integer"}}}, [{"not": 1}], [{"not": "a"}], []),
    ({"enum": [{"uniqueItems": True}]}, [{"uniqueItems": True}], [1], []),
]


@pytest.mark.parametrize(("schema", "good", "bad", "relaxed"), CASES)
def test_a_schema_keeps_what_a_grammar_can_enforce(
    schema: dict[str, Any], good: list[Any], bad: list[Any], relaxed: list[str]
):
    before = json.dumps(schema)
    assert all(accepts(schema, value) for value in good)
    assert not any(accepts(schema, value) for value in bad)
    assert enforceable(schema).relaxed == relaxed
    assert json.dumps(schema) == before


def test_what_strict_must_not_lose_is_named():
    schema = {
        "type": "object",
        "properties": {"a": {"not": {"type": "string"}, "if": {}, "uniqueItems": True}},
    }
    found = enforceable(schema, "$.s")
    assert found.essential == ["$.s.properties.a.not"]
    assert found.relaxed == ["$.s.properties.a.uniqueItems"]


@pytest.mark.parametrize(
    "pattern", [r"^(?!admin)\w+$", r"\bword\b", r"(a)\1", r"a(?=b)", r"^(?=a)b|c", r"^(?<!x)a"]
)
def test_a_pattern_that_no_grammar_follows_matters(pattern: str):
    schema = {"type": "string", "pattern": pattern}
    assert enforceable(schema).essential == ["$.pattern"]
    assert accepts(schema, "word") or accepts(schema, "ab") or accepts(schema, "c")


WRONG: dict[str, list[Any]] = {
    "format": [["date"], {}, 1],
    "pattern": [1, ["a"]],
    "required": [True, "a", [1]],
    "enum": ["a", {}],
    "type": ["text", [1], {}],
    "properties": [[], "a", {"a": 1}],
    "$defs": [[]],
    "items": ["string", [1]],
    "anyOf": [{}, [1], True],
    "oneOf": [5],
    "allOf": [False],
    "additionalProperties": ["a", []],
    "propertyNames": ["a"],
    "minItems": ["1", -1, 1.5, {}],
    "maxProperties": ["#", []],
    "minimum": ["0"],
    "$ref": [1],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in WRONG for value in WRONG[key]])
def test_a_keyword_with_a_wrong_value_is_refused_by_its_path(key: str, value: Any):
    schema = {"type": "object", "properties": {"a": {"anyOf": [{}, {key: value}]}}}
    with pytest.raises(InvalidGrammar) as refused:
        enforceable(schema, "$.s")
    assert refused.value.param == f"$.s.properties.a.anyOf[1].{key}"


def test_parameters_are_always_an_object():
    assert object_schema(None) == object_schema({}) == {"type": "object"}
    assert object_schema({"properties": {}}) == {"properties": {}, "type": "object"}
    assert object_schema({"type": ["object", "null"]}) == {"type": "object"}
    assert object_schema({"type": "string"}) is None


def test_references_follow_a_schema_that_moves():
    schema = {"properties": {"a": {"$ref": "#/$defs/A"}}, "const": {"$ref": "#/x"}, "$defs": {"A": {}}}
    assert moved(schema, "#/$defs/t")["properties"]["a"]["$ref"] == "#/$defs/t/$defs/A"
    assert moved(schema, "#/$defs/t")["const"] == {"$ref": "#/x"}


@pytest.mark.parametrize("name", ["default", "enum", "required", "examples", "const", "$ref"])
def test_a_property_may_be_called_like_a_keyword(name: str):
    schema = {"properties": {name: {"$ref": "#there"}}, "$defs": {name: {"$anchor": "there"}}}
    found = enforceable(schema).schema
    assert found["properties"][name] == {"$ref": f"#/$defs/{name}"}
    assert moved(found, "#/$defs/t")["properties"][name] == {"$ref": f"#/$defs/t/$defs/{name}"}


def test_a_strict_call_is_constrained_where_it_begins_and_text_is_free():
    begin, end = '<tool_call>\n{"name": "f", "arguments": ', "}\n</tool_call>"
    schema: dict[str, Any] = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    rules = Rules({})
    tool = StrictTool("f", schema | {"additionalProperties": False}, "$.tools[0].function.parameters")
    source = CallGrammar(rules.source(*hermes(rules, [tool], [])), rules.marks, rules.calls)
    matcher = compiled(TOKENIZER, Grammar("tool_calls", msgspec.json.encode(source).decode()))
    for text, allowed in {
        "Any text {at} all.": True,
        f'Sure. {begin}{{"n": 7}}{end} Done. {begin}{{"n":7}}{end}': True,
        f'{begin}{{"n": "seven"}}{end}': False,
        f'{begin}{{"m": 1, "n": 7}}{end}': False,
        '<tool_call>\n{"name": "g"': False,
    }.items():
        copy = matcher.deep_copy()
        tokens = TOKENIZER.tokenize_str(text)
        assert (copy.try_consume_tokens(tokens) == len(tokens)) is allowed, text


@pytest.mark.parametrize("stops", [["<ab>"], ["<ab>", "<ac"], ["<a", "<ab"], ["<a>", "</a>"]])
def test_a_regex_without_stops_matches_all_other_texts(stops: list[str]):
    plain, whole = re.compile(without(stops)), re.compile(without(stops, whole=True))
    for text in ("".join(each) for size in range(7) for each in product("<ab>/c", repeat=size)):
        has = any(stop in text for stop in stops)
        begins = any(text.endswith(stop[:end]) for stop in stops for end in range(1, len(stop)))
        assert (plain.fullmatch(text) is None) is has, text
        assert (whole.fullmatch(text) is None) is (has or begins), text


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("^a$", ["a"], ["ab", "ba"]),
        ("a", ["a", "bab"], ["b"]),
        ("^a|b$", ["ax", "xb"], ["xa", "bx"]),
        (r"^\d[\dx]$", ["1x", "22"], ["x1"]),
        (r"a\$", ["a$b"], ["a"]),
        ("^(a|b)/$", ["a/", "b/"], ["a"]),
        (r"^\u0041$", ["A"], ["B"]),
    ],
)
def test_a_pattern_is_searched_as_json_schema_means_it(pattern: str, matches: list[str], others: list[str]):
    regex = re.compile(searched(pattern))
    assert all(regex.fullmatch(text) for text in matches) and not any(map(regex.fullmatch, others))
