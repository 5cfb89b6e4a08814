"""Brings a JSON schema into the part of JSON Schema that a grammar can enforce.

What a grammar cannot enforce is left out and named, so that the answer can say so. What means the same in
other words is rewritten. The keywords are those that llguidance does not implement.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import quote, unquote

from stretto.errors import InvalidGrammar

Schema = dict[str, Any]
# A grammar sees the text from left to right, so it cannot follow these.
RELAXED = frozenset(
    {"uniqueItems", "contains", "minContains", "maxContains", "not", "if", "then", "else"}
    | {"dependentRequired", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems"}
)
# Without these an answer may be wrong in a way that its reader does not expect.
ESSENTIAL = frozenset({"not", "if", "then", "else", "dependentRequired", "dependentSchemas", "contains"})
FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"}
)
UNKNOWN = object()
LONGEST_CHAIN = 32  # of references
IN_URI = "#/$~!&'()*+,;=:@?"  # beside letters, digits and `_.-`
ANNOTATIONS = frozenset(
    {"x-guidance", "$schema", "$comment", "contentEncoding", "contentMediaType", "contentSchema"}
)
# Inside one schema the dynamic ones mean the same.
REFERENCES = frozenset({"$ref", "$dynamicRef", "$recursiveRef"})
ANCHORS = frozenset({"$anchor", "$dynamicAnchor"})
NAMES_OF_PLACES = ANCHORS | {"$id", "$recursiveAnchor"}
# Under these keys lie schemas by a name of the user's choice, and here plain values.
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
VALUES = frozenset({"const", "enum", "default", "examples", "required"})
TYPES = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
# Look-arounds that pydantic (decimal numbers) and Zod (e-mail) put at the start of a pattern: a grammar has
# none, but these patterns say the same.
LOOK_AROUNDS = {
    r"(?!^[-+.]*$)": "[^-+.]",
    r"(?!\.)": r"^[^.]|^$",
    r"(?!.*\.\.)": r"^([^.]|\.[^.])*\.?$",
}
_REGEX_PART = re.compile(r"\\.|\(\?P?<[A-Za-z_]\w*>|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?<?[=!]|.", re.DOTALL)
# A limit that is farther from 0 cannot be followed. Those of 32-bit and 64-bit types exclude little.
FARTHEST = 1e18
MOST = {"maximum": 1, "exclusiveMaximum": 1, "minimum": -1, "exclusiveMinimum": -1}
_NOT_REGULAR = re.compile(r"\\[bB1-9k]")


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict | bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and float(value).is_integer() and value >= 0


def _list_of(allowed: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(allowed, cast("list[Any]", value)))


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_schema, cast(Schema, value).values()))


def _is_type(value: Any) -> bool:
    return isinstance(value, str) and value in TYPES


# What the value of a keyword must be, in words and as a test.
Shape = tuple[str, Callable[[Any], bool]]
SHAPES: dict[str, Shape] = {
    **dict.fromkeys(NAMED, ("an object of schemas", _is_named)),
    **dict.fromkeys(
        ("additionalProperties", "additionalItems", "propertyNames", "not", "if", "then", "else", "contains"),
        ("a schema", _is_schema),
    ),
    "items": ("a schema", lambda value: _is_schema(value) or _list_of(_is_schema)(value)),
    **dict.fromkeys(("anyOf", "oneOf", "allOf", "prefixItems"), ("a list of schemas", _list_of(_is_schema))),
    "type": ("a type, or a list of types", lambda value: _is_type(value) or _list_of(_is_type)(value)),
    "required": ("a list of names", _list_of(_is_text)),
    "enum": ("a list of values", lambda value: isinstance(value, list)),
    **dict.fromkeys(REFERENCES | {"format", "pattern"}, ("a text", _is_text)),
    **dict.fromkeys(
        (f"{end}{what}" for end in ("min", "max") for what in ("Length", "Items", "Properties")),
        ("a whole number of at least 0", _is_count),
    ),
    **dict.fromkeys(
        ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        ("a number", _is_number),
    ),
}


@dataclass(slots=True)
class EnforceableSchema:
    """A schema that a grammar can follow.

    `relaxed`: the paths of what it does not enforce. `essential`: those of them that `strict` must not lose.
    """

    schema: Schema
    relaxed: list[str] = field(default_factory=list[str])
    essential: list[str] = field(default_factory=list[str])


def enforceable(schema: Schema, path: str = "$") -> EnforceableSchema:
    """The enforceable part of a schema that is at `path` in the request. Raises InvalidGrammar for a keyword
    whose value has the wrong type."""
    found = EnforceableSchema({})
    document = _Document(schema)
    _find_anchors(schema, "#", document.anchors)
    found.schema = _part(schema, path, document, found)
    return found


def referred(reference: Any, root: Any) -> Any:
    """What a `$ref` refers to inside `root`, perhaps percent-encoded; UNKNOWN if there is no such place."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return UNKNOWN
    found = _at(reference, root)
    return _at(unquote(reference), root) if found is UNKNOWN else found


def _at(reference: str, root: Any) -> Any:
    place: Any = root
    for step in reference[1:].strip("/").split("/") if len(reference) > 1 else ():
        name = step.replace("~1", "/").replace("~0", "~")
        try:
            place = cast("list[Any]", place)[int(name)] if isinstance(place, list) else place[name]
        except (KeyError, IndexError, ValueError, TypeError):
            return UNKNOWN
    return place


def object_schema(schema: Schema | None) -> Schema | None:
    """The schema of a function's parameters, which are always an object; None if it describes no object."""
    if not schema:
        return {"type": "object"}
    kind = schema.get("type", "object")
    kinds = cast("list[Any]", kind) if isinstance(kind, list) else [kind]
    return {**schema, "type": "object"} if "object" in kinds else None


def moved(schema: Any, place: str) -> Any:
    """The schema as a definition at `place` of another one: its references point there."""
    if isinstance(schema, list):
        return [moved(item, place) for item in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    found: Schema = {}
    for key, value in cast(Schema, schema).items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            found[key] = place + value[1:]
        elif key in NAMED and isinstance(value, dict):
            found[key] = {name: moved(each, place) for name, each in cast(Schema, value).items()}
        else:
            found[key] = value if key in VALUES else moved(value, place)
    return found


def _find_anchors(schema: Any, place: str, anchors: dict[str, str]) -> None:
    """Where each `$anchor` and `$id` is, as a reference to it."""
    if isinstance(schema, list):
        for at, item in enumerate(cast("list[Any]", schema)):
            _find_anchors(item, f"{place}/{at}", anchors)
    elif isinstance(schema, dict):
        for key, value in cast(Schema, schema).items():
            if key in ANCHORS and isinstance(value, str):
                anchors[f"#{value}"] = place
            elif key == "$id" and isinstance(value, str):
                anchors[value] = place
            elif key in NAMED and isinstance(value, dict):
                for name, each in cast(Schema, value).items():
                    _find_anchors(each, f"{place}/{key}/{_step(name)}", anchors)
            elif key not in VALUES:
                _find_anchors(value, f"{place}/{_step(key)}", anchors)


def _step(name: str) -> str:
    """A name as a step of a reference."""
    return name.replace("~", "~0").replace("/", "~1")


@dataclass(frozen=True, slots=True)
class _Document:
    """The whole schema of which others are parts. `anchors`: where each `$anchor` and `$id` in it is."""

    root: Schema
    anchors: dict[str, str] = field(default_factory=dict[str, str])

    def resolved(self, reference: str) -> str:
        """A reference without the `$id` of a schema that is inside this one, written as a URI."""
        anchors = self.anchors
        id, _, inner = reference.partition("#")
        if reference in anchors or id not in anchors:
            found = anchors.get(reference, reference)
        else:
            found = anchors[id] + inner if inner[:1] in ("", "/") else anchors.get(f"#{inner}", reference)
        if not found.startswith("#"):
            return found
        return quote(unquote(found) if _at(found, self.root) is UNKNOWN else found, safe=IN_URI)

    def followed(self, schema: Any) -> Any:
        """The schema that a chain of references leads to. What stands beside a reference is left out."""
        for _ in range(LONGEST_CHAIN):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            schema = referred(cast(Schema, schema)["$ref"], self.root)
        return cast(Any, schema)


def _part(schema: Any, path: str, document: _Document, found: EnforceableSchema) -> Any:
    """The enforceable part of a schema, or of a list of schemas."""
    if isinstance(schema, list):
        parts = cast("list[Any]", schema)
        return [_part(item, f"{path}[{at}]", document, found) for at, item in enumerate(parts)]
    if not isinstance(schema, dict):
        return schema
    part: Schema = {}
    whole = cast(Schema, schema)
    for key, value in whole.items():
        where = f"{path}.{key}"
        if value is None and key not in ("const", "default", "examples"):
            continue  # some clients write null for a keyword that they do not use
        if key in SHAPES and not SHAPES[key][1](value):
            raise InvalidGrammar(f"{where} must be {SHAPES[key][0]}", param=where)
        if key in RELAXED:
            if value not in (False, {}):
                (found.essential if key in ESSENTIAL else found.relaxed).append(where)
        elif key in NAMED:
            named = cast(Schema, value).items()
            part[key] = {name: _part(each, f"{where}.{name}", document, found) for name, each in named}
        elif key in REFERENCES:
            part["$ref"] = document.resolved(str(value))
        elif key == "oneOf":
            branches = _part(value, where, document, found)
            if not _excludes([document.followed(branch) for branch in branches]):
                found.relaxed.append(where)
            part["anyOf" if "anyOf" not in part else "oneOf"] = branches
        elif key in VALUES:
            part[key] = value
        elif key in MOST and (limit := cast(float, value)) * MOST[key] >= FARTHEST:
            if abs(limit) < sys.float_info.max:
                found.relaxed.append(where)
        elif key in ANNOTATIONS or key in NAMES_OF_PLACES or key in ("propertyNames", "pattern"):
            continue
        elif key != "format" or value in FORMATS:  # any other format is an annotation
            part[key] = _part(value, where, document, found)
    _name_properties(whole.get("propertyNames"), part, path, found)
    _match_pattern(whole.get("pattern"), part, path, found)
    _merge_const(part)
    return part


def _match_pattern(pattern: str | None, part: Schema, path: str, found: EnforceableSchema) -> None:
    """Writes a pattern without look-arounds. One that is lost matters, unless a format says the same."""
    if pattern is None:
        return
    plain, others, lost = _without_look_arounds(pattern)
    if plain != "^":
        part["pattern"] = plain
    if others:
        part["allOf"] = [*part.get("allOf", ()), *({"pattern": each} for each in others)]
    if lost:
        (found.relaxed if part.get("format") in FORMATS else found.essential).append(f"{path}.pattern")


def _without_look_arounds(pattern: str) -> tuple[str, list[str], bool]:
    """A pattern without look-arounds, the patterns that a text has to match beside it, and whether the text
    may be one that the pattern forbids."""
    parts = _REGEX_PART.findall(pattern)
    if any(_NOT_REGULAR.match(each) for each in parts):
        return "^", [], True
    kept, others, lost, at = "", list[str](), False, 0
    while at < len(parts):
        if not re.match(r"\(\?<?[=!]", parts[at]):
            kept += "(?:" if parts[at].startswith("(?") else parts[at]  # a name of a group says nothing
            at += 1
            continue
        end, depth = at + 1, 1
        while end < len(parts) and depth:
            depth += (parts[end][0] == "(") - (parts[end] == ")")
            end += 1
        look = "".join(parts[at:end])
        if kept == "^" and look in LOOK_AROUNDS:
            others.append(LOOK_AROUNDS[look])
        elif kept == "^" and parts[at] == "(?=":
            others.append(f"^(?:{look[3:-1]})")
        else:
            lost = True
        at = end
    if others and _has_branches(kept):  # then a look-around is not about the whole text
        return kept, [], True
    return kept, others, lost


def _has_branches(pattern: str) -> bool:
    """Whether there is a `|` outside brackets."""
    depth = 0
    for part in _REGEX_PART.findall(pattern):
        depth += (part[0] == "(") - (part == ")")
        if part == "|" and not depth:
            return True
    return False


def _name_properties(names: Any, part: Schema, path: str, found: EnforceableSchema) -> None:
    """Says with other keywords which names of members are allowed."""
    said = cast(Schema, names) if isinstance(names, dict) else {}
    rules = {key: value for key, value in said.items() if key != "type"}
    if not rules and names is not False:
        return  # a name is a string anyway
    others = part.get("additionalProperties", True)
    if set(rules) == {"pattern"} and "patternProperties" not in part:
        part["patternProperties"] = {rules["pattern"]: others}
        part["additionalProperties"] = False
    elif set(rules) <= {"enum", "const"} and rules:
        allowed = rules.get("enum", [rules.get("const")])
        part["properties"] = {name: others for name in allowed if isinstance(name, str)} | part.get(
            "properties", {}
        )
        part["additionalProperties"] = False
    else:
        found.relaxed.append(f"{path}.propertyNames")


def _merge_const(part: Schema) -> None:
    """A constant says all; a type or a reference beside it says nothing more."""
    if "const" in part:
        kept = {key: part[key] for key in ("const", "$defs", "definitions") if key in part}
        part.clear()
        part.update(kept)


def _excludes(branches: list[Any]) -> bool:
    """Whether no value satisfies two of these schemas, as far as types and constant members show."""
    if not all(isinstance(branch, dict) for branch in branches):
        return False
    schemas = cast("list[Schema]", branches)
    kinds = [schema.get("type") for schema in schemas]
    if len({json.dumps(kind) for kind in kinds}) == len(kinds) and all(isinstance(k, str) for k in kinds):
        return {"number", "integer"} - set(kinds) != set()
    shared = set(schemas[0].get("required", ())).intersection(*(s.get("required", ()) for s in schemas))
    for name in shared:
        values = [_listed(schema.get("properties", {}).get(name)) for schema in schemas]
        if all(values) and len(set[str]().union(*values)) == sum(map(len, values)):
            return True
    return False


def _listed(schema: Any) -> frozenset[str]:
    """The values that a schema lists, as JSON; none if it lists none."""
    if not isinstance(schema, dict):
        return frozenset()
    plain = cast(Schema, schema)
    values = [plain["const"]] if "const" in plain else cast("list[Any]", plain.get("enum", []))
    return frozenset(map(json.dumps, values))
