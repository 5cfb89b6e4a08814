"""The reference page: every route, the fields of its request, and a form that sends one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from stretto.server import openapi
from tests.server.conftest import Served
from tests.server.test_answers import SetAnswer

ROUTES = [f"{method}{path}" for path, methods in openapi.document()["paths"].items() for method in methods]


@pytest.fixture
async def docs(served: Served, tab: Any) -> Any:
    await tab.goto(f"{served.url}/docs")
    await tab.wait_for_selector(".route")
    return tab


async def test_every_route_is_listed_once(docs: Any) -> None:
    shown = await docs.eval_on_selector_all(".route", "found => found.map((each) => each.id)")
    links = await docs.eval_on_selector_all(
        "#routes a", "found => found.map((each) => decodeURIComponent(each.hash.slice(1)))"
    )
    assert sorted(shown) == sorted(links) == sorted(ROUTES)
    await docs.fill("#find", "temperature")
    found = await docs.eval_on_selector_all("#routes a:not([hidden])", "found => found.map((e) => e.hash)")
    assert "#post/v1/chat/completions" in found and "#get/metrics" not in found


async def test_types_open_within_types(docs: Any) -> None:
    chat = docs.locator("[id='post/v1/chat/completions']")
    await chat.locator("summary:has-text('ChatRequest')").first.click()
    tools = chat.locator("li:has(> code:text-is('tools'))").first
    await tools.locator("summary:text-is('Tool')").click()
    await tools.locator("summary:text-is('Function')").first.click()
    async with asyncio.timeout(20):  # it opens after the click
        while "With strict" not in await tools.inner_text():
            await asyncio.sleep(0.05)


async def test_a_request_is_sent_from_the_page(docs: Any, set_answer: SetAnswer) -> None:
    set_answer("Hello, world!")
    chat = docs.locator("[id='post/v1/chat/completions']")
    await chat.locator("summary:has-text('Send it from here')").click()
    await chat.locator("textarea").fill('{"messages": [{"role": "user", "content": "Hi"}]}')
    await chat.locator("button:text-is('Send')").click()
    await docs.wait_for_selector(".answer:has-text('Hello, world!')")
    assert (await chat.locator(".answer").inner_text()).startswith("200")
    models = docs.locator("[id='get/v1/models/{name}']")
    await models.locator("summary:has-text('Send it from here')").click()
    await models.locator("input").fill("v1/models/tiny")
    await models.locator("button:text-is('Send')").click()
    await docs.wait_for_selector("[id='get/v1/models/{name}'] .answer:has-text('max_model_len')")


async def test_it_fits_a_phone_with_every_type_open(docs: Any) -> None:
    await docs.set_viewport_size({"width": 390, "height": 844})
    for _ in range(3):  # types within types
        await docs.evaluate(
            "document.querySelectorAll('.route details').forEach((each) => (each.open = true))"
        )
    assert await docs.locator(".route details[open] details[open]").count() > 0
    assert await docs.evaluate("document.documentElement.scrollWidth") <= 390
