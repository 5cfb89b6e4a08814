"""The OpenAPI document describes all that it lists, and docs/reference.md shows it."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from stretto.protocol.descriptions import FIELDS, TYPES
from stretto.server import openapi
from tests.server.test_answers import SetAnswer

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


@pytest.mark.parametrize("path", openapi.EXAMPLES)
async def test_every_example_is_a_request_that_works(
    path: str, client: httpx.AsyncClient, set_answer: SetAnswer
) -> None:
    set_answer("Hello")
    answer = await client.post(path, json=openapi.EXAMPLES[path])
    # The fake engine computes no embeddings, and knows no answer that feedback could be for.
    vectors = ("/v1/embeddings", "/api/embed", "/api/embeddings", "/v1/score", "/v1/rerank")
    expected = {"/v1/feedback": 404} | dict.fromkeys(vectors, 500)
    assert answer.status_code == expected.get(path, 200), answer.text


async def test_the_reference_page_is_at_docs(client: httpx.AsyncClient) -> None:
    page = await client.get("/docs")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    for name in ("page/docs/docs.js", "page/docs/docs.css"):
        assert name in page.text
        assert (await client.get("/" + name)).status_code == 200
    assert (await client.get("/redoc")).headers["location"] == "docs"
    # The links of a page are relative, so it must not be in a folder of its own.
    for place in ("docs", "realtime"):
        moved = await client.get(f"/{place}/")
        assert moved.status_code == 307 and moved.headers["location"] == f"../{place}"
