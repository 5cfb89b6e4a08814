"""Arguments in Gemma's notation: `{key:value,...}`, with strings between two quotes that are a token."""

from __future__ import annotations

import json
import re
from typing import Any, cast

from stretto.text.schema import Schema
from stretto.text.tools.strict.branches import NotWritable, branches, types_of, values_of
from stretto.text.tools.strict.lark import GrammarPiece, RuleName, Rules, TerminalText, quoted
from stretto.text.tools.strict.members import Member, members_of
from stretto.text.tools.strict.strings import string_terminal

NUMERIC = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})


class BracesWriter:
    """Writes the values of one tool's arguments. References are relative to `root`."""

    def __init__(self, rules: Rules, quote: str, stops: tuple[str, ...], root: Schema) -> None:
        """`quote` begins and ends a string, and neither it nor `stops` may be in one."""
        self._rules = rules
        self._quote = quote
        self._stops = (quote, *stops)
        self._root = root
        self._known: dict[str, RuleName] = {}

    def value(self, schema: Any, types: frozenset[str] | None = None) -> RuleName:
        """A value that satisfies a schema and has one of `types`. Raises NotWritable."""
        key = json.dumps([schema, sorted(types or ())], sort_keys=True)
        if key not in self._known:
            self._known[key] = rule = self._rules.reserve()
            plains = branches(schema, self._root)
            alternatives = [each for plain in plains for each in self._plain(plain, types)]
            if not alternatives:
                raise NotWritable("a value that nothing satisfies, or whose text would end the call")
            self._rules.define(rule, *alternatives)
        return self._known[key]

    def _plain(self, plain: Schema, types: frozenset[str] | None) -> list[list[GrammarPiece]]:
        listed = values_of(plain)
        if listed is not None:
            return [self._listed(value) for value in listed if self._fits(value)]
        found: list[list[GrammarPiece]] = []
        kinds = types_of(plain) if types is None else types_of(plain) & types
        for kind in sorted(kinds):
            if kind == "string":
                text = string_terminal(self._rules, plain, self._stops)
                found.append([*self._quoted(), text, *self._quoted()])
            elif kind == "object":
                found.append(self._object(plain))
            elif kind == "array":
                found.append(self._array(plain))
            elif kind != "integer" or "number" not in kinds:
                limits = {name: plain[name] for name in NUMERIC & plain.keys()}
                found.append([self._rules.json({"type": kind, **limits})])
        return found

    def _quoted(self) -> list[GrammarPiece]:
        return self._rules.literal(self._quote)

    def _fits(self, value: Any) -> bool:
        text = json.dumps(value, ensure_ascii=False)
        return not any(stop in text or json.dumps(stop)[1:-1] in text for stop in self._stops)

    def _listed(self, value: Any) -> list[GrammarPiece]:
        if isinstance(value, str):
            return [*self._quoted(), TerminalText(quoted(value)), *self._quoted()]
        if isinstance(value, list):
            items = [self._listed(each) for each in cast("list[Any]", value)]
            return [TerminalText('"["'), *_separated(items), TerminalText('"]"')]
        if isinstance(value, dict):
            members = [
                [*self._key(key), TerminalText('":"'), *self._listed(each)]
                for key, each in cast("dict[str, Any]", value).items()
            ]
            return [TerminalText('"{"'), *_separated(members), TerminalText('"}"')]
        return [TerminalText(quoted(json.dumps(value)))]

    def _key(self, key: str) -> list[GrammarPiece]:
        if re.fullmatch(r"[a-zA-Z_][\w.-]*", key, re.ASCII):
            return [TerminalText(quoted(key))]
        if not self._fits(key) or key != key.strip().strip('"'):
            raise NotWritable(f"the name {key[:40]!r} of a parameter")
        return [*self._quoted(), TerminalText(quoted(key)), *self._quoted()]

    def _object(self, plain: Schema) -> list[GrammarPiece]:
        members = members_of(plain)
        inside: list[GrammarPiece] = []
        if members.further is not None:
            key = self._rules.terminal("/[a-zA-Z_][a-zA-Z0-9_]{0,63}/")
            member: list[GrammarPiece] = [key, TerminalText('":"'), self.value(members.further)]
            more = self._rules.repeated([TerminalText('","'), *member], "*")
            inside = [self._rules.repeated([*member, more], "?")]
        elif members.listed:
            inside = [self._rest(members.listed, first=True)]
        return [TerminalText('"{"'), *inside, TerminalText('"}"')]

    def _rest(self, members: tuple[Member, ...], *, first: bool) -> RuleName:
        """These members, of which some may be left out. `first`: no member is before them."""
        member, *rest = members
        comma: list[GrammarPiece] = [] if first else [TerminalText('","')]
        here = [*comma, *self._key(member.key), TerminalText('":"'), self.value(member.schema)]
        if rest:
            here.append(self._rest(tuple(rest), first=False))
        if member.required:
            return self._rules.rule(here)
        without: list[GrammarPiece] = [self._rest(tuple(rest), first=first)] if rest else []
        return self._rules.rule(here, without)

    def _array(self, plain: Schema) -> list[GrammarPiece]:
        least, most = int(plain.get("minItems", 0)), plain.get("maxItems")
        fixed = cast("list[Any]", plain.get("prefixItems", []))
        if fixed:
            if not least <= len(fixed) <= (len(fixed) if most is None else most):
                raise NotWritable("prefixItems with another number of items")
            return [
                TerminalText('"["'),
                *_separated([[self.value(each)] for each in fixed]),
                TerminalText('"]"'),
            ]
        if most == 0 or plain.get("items") is False:
            return [TerminalText('"[]"')]
        item = self.value(plain.get("items", True))
        more = "" if most is None else str(most - 1)
        repeated = self._rules.repeated([TerminalText('","'), item], f"{{{max(0, least - 1)},{more}}}")
        alternatives: list[list[GrammarPiece]] = [[item, repeated]]
        if not least:
            alternatives.append([])
        return [TerminalText('"["'), self._rules.rule(*alternatives), TerminalText('"]"')]


def _separated(items: list[list[GrammarPiece]]) -> list[GrammarPiece]:
    found: list[GrammarPiece] = []
    for item in items:
        found += [TerminalText('","'), *item] if found else item
    return found
