"""Brings a JSON schema into the part of JSON Schema that a grammar can enforce.

What a grammar cannot enforce is left out and named, so that the answer can say so. What means the same in
other words is rewritten. The keywords are those that llguidance does not implement.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, cast

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
ANNOTATIONS = frozenset(
    {"x-guidance", "$schema", "$comment", "contentEncoding", "contentMediaType", "contentSchema"}
)
# Under these keys lie schemas by a name of the user's choice, and here plain values.
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
VALUES = frozenset({"const", "enum", "default", "examples", "required"})


@dataclass(slots=True)
class EnforceableSchema:
    """A schema that a grammar can follow.

    `relaxed`: the paths of what it does not enforce. `essential`: those of them that `strict` must not lose.
    """

    schema: Schema
    relaxed: list[str] = field(default_factory=list[str])
    essential: list[str] = field(default_factory=list[str])


def enforceable(schema: Schema, path: str = "$") -> EnforceableSchema:
    """The enforceable part of a schema that is at `path` in the request."""
    found = EnforceableSchema({})
    anchors: dict[str, str] = {}
    _find_anchors(schema, "#", anchors)
    found.schema = _part(schema, path, anchors, found)
    return found


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
    if isinstance(schema, dict):
        return {
            key: place + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else value
            if key in VALUES
            else moved(value, place)
            for key, value in cast(Schema, schema).items()
        }
    return schema


def _find_anchors(schema: Any, place: str, anchors: dict[str, str]) -> None:
    """Where each `$anchor` and `$id` is, as a reference to it."""
    if isinstance(schema, list):
        for at, item in enumerate(cast("list[Any]", schema)):
            _find_anchors(item, f"{place}/{at}", anchors)
    elif isinstance(schema, dict):
        for key, value in cast(Schema, schema).items():
            if key == "$anchor" and isinstance(value, str):
                anchors[f"#{value}"] = place
            elif key == "$id" and isinstance(value, str):
                anchors[value] = place
            elif key not in VALUES:
                _find_anchors(value, f"{place}/{key.replace('~', '~0').replace('/', '~1')}", anchors)


def _resolved(reference: str, anchors: dict[str, str]) -> str:
    """A reference without the `$id` of a schema that is inside this one."""
    id, _, inner = reference.partition("#")
    if reference in anchors or id not in anchors:
        return anchors.get(reference, reference)
    return anchors[id] + inner if inner[:1] in ("", "/") else anchors.get(f"#{inner}", reference)


def _part(schema: Any, path: str, anchors: dict[str, str], found: EnforceableSchema) -> Any:
    """The enforceable part of a schema, or of a list of schemas."""
    if isinstance(schema, list):
        parts = cast("list[Any]", schema)
        return [_part(item, f"{path}[{at}]", anchors, found) for at, item in enumerate(parts)]
    if not isinstance(schema, dict):
        return schema
    part: Schema = {}
    for key, value in cast(Schema, schema).items():
        where = f"{path}.{key}"
        if key in RELAXED:
            if value not in (False, {}):
                (found.essential if key in ESSENTIAL else found.relaxed).append(where)
        elif key in NAMED and isinstance(value, dict):
            named = cast(Schema, value).items()
            part[key] = {name: _part(each, f"{where}.{name}", anchors, found) for name, each in named}
        elif key == "$ref" and isinstance(value, str):
            part[key] = _resolved(value, anchors)
        elif key == "oneOf" and isinstance(value, list):
            branches = _part(value, where, anchors, found)
            if not _excludes(branches):
                found.relaxed.append(where)
            part["anyOf" if "anyOf" not in part else "oneOf"] = branches
        elif key in VALUES:
            part[key] = value
        elif key in ANNOTATIONS or key in ("$id", "$anchor", "propertyNames"):
            continue
        elif key != "format" or value in FORMATS:  # any other format is an annotation
            part[key] = _part(value, where, anchors, found)
    _name_properties(cast(Schema, schema).get("propertyNames"), part, path, found)
    _merge_const(part)
    return part


def _name_properties(names: Any, part: Schema, path: str, found: EnforceableSchema) -> None:
    """Says with other keywords which names of members are allowed."""
    rules: Schema = {**names} if isinstance(names, dict) else {}
    rules.pop("type", None)
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
        values = [schema.get("properties", {}).get(name, {}).get("const", UNKNOWN) for schema in schemas]
        if UNKNOWN not in values and len({json.dumps(value) for value in values}) == len(values):
            return True
    return False
