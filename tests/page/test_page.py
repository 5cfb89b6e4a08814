from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.api.conftest import Served, app, checkpoint, config, engine, served, text
from tests.api.fake_engine import FakeEngine

__all__ = ["app", "checkpoint", "config", "engine", "served", "text"]
api = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture
async def page(served: Served) -> AsyncIterator[Any]:
    """The page in a browser. Anything in the console, a refusal of the CSP among them, fails the test."""
    complaints: list[str] = []
    async with api.async_playwright() as play:
        browser = await play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = await browser.new_page()
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        await page.goto(served.url)
        await page.wait_for_selector(".status.ready")
        await page.wait_for_selector("#model option", state="attached")
        yield page
        await browser.close()
    assert complaints == []


async def test_a_chat_streams_and_is_timed_by_keyboard_alone(page: Any) -> None:
    await page.keyboard.type("Hi")
    await page.keyboard.press("Enter")
    await page.wait_for_selector(".timing")
    assert await page.inner_text(".turn.assistant .text") == "Hello, world!"
    assert await page.locator(".strip .mark").count() > 1
    assert "tokens" in await page.get_attribute(".strip", "aria-label")
    await page.wait_for_selector("#live-note:has-text('ten seconds')")


async def test_objective_and_tier_are_in_the_request(page: Any) -> None:
    await page.fill("#ttft", "900")
    await page.fill("#itl", "80")
    await page.select_option("#tier", "priority")
    await page.fill("#input", "Hi")
    async with page.expect_request("**/v1/chat/completions") as sent:
        await page.click("#send")
    body = json.loads((await sent.value).post_data)
    assert body["objective"] == {"ttft_ms": 900, "itl_ms": 80}
    assert body["service_tier"] == "priority"
    await page.wait_for_selector(".timing")


async def test_stop_cancels(page: Any, engine: FakeEngine) -> None:
    engine.script = lambda request: [65, 30.0, 65]
    await page.fill("#input", "Hi")
    await page.click("#send")
    await page.wait_for_selector(".strip .mark", state="attached")
    await page.click("#send")
    await page.wait_for_selector("#send:has-text('Send')")
    await asyncio.sleep(0)
    assert (await page.inner_text(".turn.assistant .text")).endswith("…")


async def test_dark_and_phone(page: Any) -> None:
    light = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    await page.emulate_media(color_scheme="dark")
    assert await page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    await page.set_viewport_size({"width": 375, "height": 740})
    assert await page.evaluate("document.documentElement.scrollWidth") <= 375
