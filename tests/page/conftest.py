"""A browser on a served page."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.server.conftest import Served, app, checkpoint, config, engine, served, set_answer, text

__all__ = ["app", "checkpoint", "config", "engine", "served", "set_answer", "text"]
CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture
def complaints() -> list[str]:
    """The warnings and errors in the browser's console."""
    return []


@pytest.fixture
async def tab(complaints: list[str]) -> AsyncIterator[Any]:
    """An empty tab. Any console message, such as a CSP violation, fails the test."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    api = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
    async with api.async_playwright() as play:
        browser = await play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = await (await browser.new_context()).new_page()
        page.on(
            "console", lambda message: complaints.append(message.text) if message.type == "error" else None
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page
        await browser.close()
    assert complaints == []


@pytest.fixture
async def page(served: Served, tab: Any) -> Any:
    """The page, when the server is ready and its models are known. It closes before the server does."""
    await tab.goto(served.url)
    await tab.wait_for_selector(".status.ready")
    await tab.wait_for_selector("#model option", state="attached")
    return tab


async def send(page: Any, text: str = "Hi") -> None:
    """Type a message and send it."""
    await page.fill("#input", text)
    await page.press("#input", "Enter")
