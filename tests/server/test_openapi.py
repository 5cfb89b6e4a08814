"""The OpenAPI document describes all that it lists, and docs/reference.md shows it."""

from __future__ import annotations

from pathlib import Path

from stretto.protocol.descriptions import FIELDS, TYPES
from stretto.server import openapi

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"
SCHEMAS = openapi.document()["components"]["schemas"]
NAMED = {
    (name, field): value
    for name, each in SCHEMAS.items()
    for field, value in each.get("properties", {}).items()
}


def test_every_property_has_a_description() -> None:
    missing = [f"{name}.{field}" for (name, field), value in NAMED.items() if not value.get("description")]
    assert len(NAMED) > 300
    assert not missing, "describe them in src/stretto/protocol/descriptions.py"


def test_every_type_has_a_description() -> None:
    missing = [name for name, each in SCHEMAS.items() if "properties" in each and not each.get("description")]
    assert not missing, "write a docstring, or an entry in src/stretto/protocol/descriptions.py"


def test_every_description_belongs_to_a_field() -> None:
    known = {field for _, field in NAMED} | {f"{name}.{field}" for name, field in NAMED}
    assert not FIELDS.keys() - known
    assert not TYPES.keys() - SCHEMAS.keys()


def test_the_reference_page_is_current() -> None:
    assert PAGE.read_text().endswith(openapi.reference()), "the page says how to write it again"
