"""The members of an object that a call writes, in the order of its schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from stretto.text.schema import Schema
from stretto.text.tools.strict.branches import NotWritable


@dataclass(frozen=True, slots=True)
class Member:
    """One member: its key, the schema of its value, and whether it must be there."""

    key: str
    schema: Any
    required: bool


@dataclass(frozen=True, slots=True)
class Members:
    """The members of an object. `further`: the schema of any number of others; None: there are no others.

    A schema that lists members and allows others gets no others: their keys would have to differ.
    """

    listed: tuple[Member, ...]
    further: Any = None


def members_of(plain: Schema) -> Members:
    """The members that satisfy a plain schema of an object. Raises NotWritable."""
    if plain.get("patternProperties"):
        raise NotWritable("patternProperties")
    properties = cast("dict[str, Any]", plain.get("properties", {}))
    others: Any = plain.get("additionalProperties", True)
    needed = cast("list[str]", plain.get("required", []))
    if others is False and not properties.keys() >= set(needed):
        raise NotWritable("required members that additionalProperties forbids")
    schemas = properties | {key: others for key in needed if key not in properties}
    listed = tuple(Member(key, each, key in needed) for key, each in schemas.items() if each is not False)
    further = None if listed or others is False or plain.get("maxProperties") == 0 else others
    if plain.get("minProperties", 0) > len(needed):
        raise NotWritable("minProperties")
    most = plain.get("maxProperties")
    if most and (most < len(listed) or further is not None):
        raise NotWritable("maxProperties")
    return Members(listed, further)
