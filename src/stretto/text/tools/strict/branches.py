"""A JSON schema without references and combinations: the plain schemas of which a value satisfies one.

A plain schema has the keywords of one object of JSON Schema, and no `$ref`, `anyOf`, `oneOf` or `allOf`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from stretto.text.schema import TYPES, UNKNOWN, Schema, referred

NOTES = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "x-guidance"}
)
SKIPPED = NOTES | {"$ref", "anyOf", "oneOf", "allOf", "$defs", "definitions", "$id", "$anchor", "$schema"}
DEPTH, MOST = 32, 64
MERGED: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("minLength", "minItems", "minProperties", "minimum", "exclusiveMinimum"), max),
    **dict.fromkeys(("maxLength", "maxItems", "maxProperties", "maximum", "exclusiveMaximum"), min),
}


class NotWritable(ValueError):
    """A schema that cannot be enforced in a way to write calls. The message names the part of it."""


def branches(schema: Any, root: Any, depth: int = 0) -> list[Schema]:
    """The plain schemas of `schema`, whose references are relative to `root`. Raises NotWritable."""
    if depth > DEPTH:
        raise NotWritable("references without an end")
    if schema is False:
        return []
    if not isinstance(schema, dict):
        return [{}]
    whole = cast(Schema, schema)
    found: list[Schema] = [{key: value for key, value in whole.items() if key not in SKIPPED}]
    groups: list[list[Schema]] = []
    if "$ref" in whole:
        target = referred(whole["$ref"], root)
        if target is UNKNOWN:
            raise NotWritable(f"$ref {whole['$ref']!r}, which is not there")
        groups.append(branches(target, root, depth + 1))
    groups += [branches(each, root, depth + 1) for each in whole.get("allOf", ())]
    for name in ("anyOf", "oneOf"):
        if name in whole:
            groups.append([plain for each in whole[name] for plain in branches(each, root, depth + 1)])
    for group in groups:
        found = [both for one in found for other in group if (both := _both(one, other)) is not None]
        if len(found) > MOST:
            raise NotWritable(f"more than {MOST} combinations of its parts")
    return found


def types_of(plain: Schema) -> frozenset[str]:
    """The types that values of a plain schema may have. `number` includes `integer`."""
    listed: Any = plain.get("type")
    named = (
        TYPES
        if listed is None
        else frozenset(cast("list[str]", [listed] if isinstance(listed, str) else listed))
    )
    values = values_of(plain)
    return named if values is None else frozenset(map(type_of, values))


def values_of(plain: Schema) -> list[Any] | None:
    """The values that a plain schema lists; None if it lists none."""
    if "const" in plain and "enum" not in plain:
        return [plain["const"]]
    listed = cast("list[Any] | None", plain.get("enum"))
    if listed is None:
        return None
    kinds: Any = plain.get("type")
    named = [kinds] if isinstance(kinds, str) else cast("list[str] | None", kinds)
    return [
        value
        for value in listed
        if (named is None or type_of(value) in named or (type_of(value) == "integer" and "number" in named))
        and ("const" not in plain or value == plain["const"])
    ]


def type_of(value: Any) -> str:
    """The JSON type of a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    kinds: tuple[tuple[type, str], ...] = (
        (str, "string"),
        (int, "integer"),
        (float, "number"),
        (dict, "object"),
        (list, "array"),
    )
    return next(name for kind, name in kinds if isinstance(value, kind))


def _both(one: Schema, other: Schema) -> Schema | None:
    """The plain schema of what satisfies both; None if nothing does. Raises NotWritable."""
    found = dict(one)
    closed = [each for each in (one, other) if each.get("additionalProperties") is False]
    if (
        closed
        and one.get("properties", {}).keys() != other.get("properties", {}).keys()
        and all("properties" in each for each in (one, other))
    ):
        raise NotWritable("allOf of objects with different properties")
    for key, value in other.items():
        mine = found.get(key, value)
        if key == "type":
            shared = _shared_types(mine, value)
            if not shared:
                return None
            found[key] = shared
        elif key == "properties":
            extra = cast(Schema, value)
            found[key] = cast(Schema, mine) | {
                name: {"allOf": [mine[name], each]} if name in mine and mine[name] != each else each
                for name, each in extra.items()
            }
        elif key == "required":
            found[key] = list(dict.fromkeys([*mine, *value]))
        elif key == "enum":
            found[key] = [each for each in mine if each in value]
        elif key == "pattern" and mine != value:
            found[key] = [*patterns_of(one), *patterns_of(other)]
        elif key in MERGED:
            found[key] = MERGED[key](mine, value)
        elif mine != value:
            raise NotWritable(f"{key} in several parts of an allOf")
        else:
            found[key] = value
    return found


def patterns_of(plain: Schema) -> list[str]:
    """The patterns that strings must match. Several stand in a plain schema that was merged of others."""
    found: Any = plain.get("pattern", [])
    return [found] if isinstance(found, str) else found


def _shared_types(one: Any, other: Any) -> list[str]:
    first, second = ([each] if isinstance(each, str) else cast("list[str]", each) for each in (one, other))
    wide = {*second, *(("integer",) if "number" in second else ())}
    found = [name for name in first if name in wide]
    if "number" in first and "integer" in second and "integer" not in found:
        found.append("integer")
    return found
