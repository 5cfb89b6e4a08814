"""Strict reading of a document from outside into a frozen struct.

An error names the path of the field, and the nearest key or the allowed values. It knows no file format.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import msgspec
from msgspec import inspect

from stretto.errors import StartError

T = TypeVar("T")
AT = re.compile(r" - at `(\$[^`]*)`$")
STEP = re.compile(r"\.([\w-]+)|\[(\d+|\.\.\.)\]")
UNKNOWN = re.compile(r"unknown field `([^`]*)`")
INVALID = re.compile(r"Invalid (?:enum )?value '([^']*)'")


def convert(value: object, kind: type[T], where: str, *, lax: bool = False) -> T:
    """`value`, plain lists, dicts and scalars, as a `kind`. `lax`: text may stand for a number, because YAML
    reads `1e-4` as text.

    Raises StartError that starts with `where` and names the path, and for an unknown key or value the nearest
    known one.
    """
    try:
        return msgspec.convert(value, kind, strict=not lax)
    except msgspec.ValidationError as error:
        text = str(error)
        found = AT.search(text)
        path = found[1] if found else "$"
        problem = text[: found.start()] if found else text
        raise StartError(
            f"{where}: {path}: {problem}{_hint(problem, path, value, kind)}", param=path
        ) from None


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean X?`, or the known words when none is near."""
    near = difflib.get_close_matches(word, known, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"


def _hint(problem: str, path: str, value: object, kind: type) -> str:
    if unknown := UNKNOWN.search(problem):
        node = _node(path, value, kind)
        fields = node.fields if isinstance(node, inspect.StructType) else ()
        tag = [node.tag_field] if isinstance(node, inspect.StructType) and node.tag_field else []
        return nearest(unknown[1], [*tag, *(field.encode_name for field in fields)])
    if invalid := INVALID.search(problem):
        node = _node(path, value, kind)
        if isinstance(node, inspect.LiteralType):
            return nearest(invalid[1], [str(each) for each in node.values])
        owner = _node(path.rpartition(".")[0], value, kind)
        tags = [str(each.tag) for each in _structs(owner)]
        return nearest(invalid[1], tags) if tags else ""
    return ""


def _node(path: str, value: object, kind: type) -> inspect.Type | None:
    """The type at `path`. A union of structs is followed by the tag that `value` has there."""
    node: inspect.Type | None = inspect.type_info(kind)
    held: Any = value
    for name, index in STEP.findall(path):
        node = _member(node, held)
        if name:
            fields = node.fields if isinstance(node, inspect.StructType) else ()
            node = next((each.type for each in fields if each.encode_name == name), None)
            held = cast("dict[str, Any]", held).get(name) if isinstance(held, dict) else None
        else:
            node = _item(node)
            listed = cast("list[Any]", held) if isinstance(held, list) else []
            held = listed[int(index)] if index.isdecimal() else None
    return _member(node, held)


def _tag(held: object, name: str | None) -> object:
    return cast("dict[str, Any]", held).get(name or "") if isinstance(held, dict) else None


def _item(node: inspect.Type | None) -> inspect.Type | None:
    if isinstance(node, inspect.ListType | inspect.VarTupleType):
        return node.item_type
    return node.value_type if isinstance(node, inspect.DictType) else None


def _structs(node: inspect.Type | None) -> list[inspect.StructType]:
    types = node.types if isinstance(node, inspect.UnionType) else (node,)
    return [each for each in types if isinstance(each, inspect.StructType) and each.tag is not None]


def _member(node: inspect.Type | None, held: Any) -> inspect.Type | None:
    """The member of a union that `held` belongs to; other types as they are."""
    if isinstance(node, inspect.Metadata):
        node = node.type
    if not isinstance(node, inspect.UnionType):
        return node
    for each in node.types:
        if isinstance(each, inspect.StructType):
            if each.tag is None or (_tag(held, each.tag_field) == each.tag):
                return each
        elif isinstance(each, inspect.LiteralType):
            return each
    return node
