"""Arguments between tags: strings as they are, all other values as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stretto.text.schema import Schema, moved
from stretto.text.tools.strict.branches import (
    TYPES,
    NotWritable,
    branches,
    type_of,
    types_of,
    values_of,
)
from stretto.text.tools.strict.lark import GrammarPiece, RuleName, Rules, TerminalText, quoted
from stretto.text.tools.strict.members import members_of
from stretto.text.tools.strict.strings import JSON_TEXTS, NUMBER, string_terminal

SCALARS = {"null": "null", "boolean": "true|false", "integer": "-?(0|[1-9][0-9]{0,17})", "number": NUMBER}
LIMITS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
Written = tuple[bool, list[GrammarPiece]]  # whether it is a string, and its text


@dataclass(frozen=True, slots=True)
class TagLayout:
    """The texts around names, keys and values. `{name}` and `{key}` stand for those.

    `typed`: what a tag says of a value that is a string, and of one that is JSON; it replaces `{kind}`.
    `stops`: what no string may contain. `key`: a regex of the keys that can be written.
    """

    begin: str
    before: str
    after: str
    end: str
    stops: tuple[str, ...]
    key: str
    typed: tuple[str, str] | None = None


def tagged_arguments(rules: Rules, layout: TagLayout, name: str, schema: Schema) -> list[GrammarPiece]:
    """One call of the tool `name`, from after its opener to the end of its closer. Raises NotWritable."""
    alternatives: list[list[GrammarPiece]] = []
    for plain in branches(schema, schema):
        if "object" not in types_of(plain):
            continue
        if values_of(plain) is not None:
            raise NotWritable("enum or const of whole arguments")
        alternatives.append(_arguments(rules, layout, plain, schema))
    if not alternatives:
        raise NotWritable("arguments that nothing satisfies")
    begin, end = rules.literal(layout.begin.replace("{name}", name)), rules.literal(layout.end)
    return [*begin, rules.rule(*alternatives), *end]


def _arguments(rules: Rules, layout: TagLayout, plain: Schema, root: Schema) -> list[GrammarPiece]:
    found: list[GrammarPiece] = []
    members = members_of(plain)
    for member in members.listed:
        if re.fullmatch(layout.key, member.key) is None:
            raise NotWritable(f"the name {member.key[:40]!r} of a parameter")
        key: list[GrammarPiece] = [TerminalText(quoted(member.key))]
        rule = _member(rules, layout, key, member.schema, root)
        found.append(rule if member.required else rules.repeated([rule], "?"))
    if members.further is not None:
        any_key: list[GrammarPiece] = [rules.terminal("/[a-zA-Z_][a-zA-Z0-9_]{0,63}/")]
        found.append(rules.repeated([_member(rules, layout, any_key, members.further, root)], "*"))
    return found


def _member(rules: Rules, layout: TagLayout, key: list[GrammarPiece], schema: Any, root: Schema) -> RuleName:
    before, _, between = layout.before.partition("{key}")
    alternatives: list[list[GrammarPiece]] = []
    for is_string, value in _values(rules, layout, schema, root):
        kind = "" if layout.typed is None else layout.typed[not is_string]
        head = [*rules.literal(before), *key, *rules.literal(between.replace("{kind}", kind))]
        alternatives.append([*head, *value, *rules.literal(layout.after)])
    return rules.rule(*alternatives)


def _values(rules: Rules, layout: TagLayout, schema: Any, root: Schema) -> list[Written]:
    """All ways to write a value. Without `typed`, a text is JSON if it is JSON of an allowed type, so no
    string may look like that."""
    plains = branches(schema, root)
    types = frozenset[str]().union(*map(types_of, plains))
    if types >= TYPES and all(not plain for plain in plains):
        return [(True, [string_terminal(rules, {}, layout.stops)])]  # whatever it is, it is allowed
    others = types - {"string"}
    if "string" not in types:
        return [(False, [_json(rules, schema, root, others)])] if others else _nothing()
    apart = layout.typed is not None
    found: list[Written] = []
    for plain in plains:
        if "string" not in types_of(plain):
            continue
        found += _strings(rules, layout, plain, frozenset() if apart else others)
    if apart and others:
        found.append((False, [_json(rules, schema, root, others)]))
    elif others:
        found += [(False, [each]) for each in _beside_strings(rules, plains)]
        if nested := others & {"object", "array"}:
            found.append((False, [_json(rules, schema, root, nested)]))
    return found or _nothing()


def _nothing() -> list[Written]:
    raise NotWritable("a value that nothing satisfies, or whose text would end the call")


def _strings(rules: Rules, layout: TagLayout, plain: Schema, others: frozenset[str]) -> list[Written]:
    listed = values_of(plain)
    if listed is None:
        return [(True, [string_terminal(rules, plain, layout.stops, others)])]
    looks = re.compile("|".join(JSON_TEXTS[each] for each in sorted(others)) or "(?!)")
    return [
        (True, [TerminalText(quoted(each))])
        for each in listed
        if isinstance(each, str)
        and not any(stop in each for stop in layout.stops)
        and not looks.fullmatch(each)
    ]


def _beside_strings(rules: Rules, plains: Sequence[Schema]) -> list[GrammarPiece]:
    """Numbers, booleans and null as terminals: beside strings, these end where the tag begins. A number with
    limits is left out."""
    found: list[GrammarPiece] = []
    for plain in plains:
        listed = values_of(plain)
        if listed is not None:
            found += [TerminalText(quoted(json.dumps(each))) for each in listed if type_of(each) in SCALARS]
            continue
        kinds = types_of(plain) & SCALARS.keys()
        if LIMITS & plain.keys():
            kinds -= {"integer", "number"}
        found += [rules.terminal(f"/{SCALARS[kind]}/") for kind in sorted(kinds)]
    return found


def _json(rules: Rules, schema: Any, root: Schema, types: frozenset[str]) -> RuleName:
    """JSON of these types that satisfies a schema, whose references are relative to `root`."""
    place = "#/$defs/root"
    whole = {"allOf": [{"type": sorted(types)}, moved(schema, place)], "$defs": {"root": moved(root, place)}}
    return rules.json(whole)
