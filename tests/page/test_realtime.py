"""The page that sends what is typed as it is typed."""

from __future__ import annotations

from typing import Any

import pytest

from stretto.text.tokenizer import TextModel
from stretto.types import Finish, Reason, Request, TokenEvent
from tests.server.conftest import Served
from tests.server.fake_engine import FakeEngine

WORDS = "the quick brown fox jumps over the lazy dog and then it rests under a tree for the whole afternoon "


@pytest.fixture
async def typing(served: Served, tab: Any, engine: FakeEngine, text: TextModel) -> Any:
    """The page, with a session that is open."""
    hello = text.encode("Hello, world!")

    def script(request: Request) -> list[Any]:
        if not request.spare_time:
            return list(hello)
        end = Finish(Reason.LENGTH, len(request.prompt), 0, len(request.prompt) - 16, 0.1)
        return [TokenEvent(request.id, finish=end)]

    engine.script = script
    await tab.goto(f"{served.url}/realtime")
    await tab.wait_for_selector(".status.ready")
    return tab


async def test_what_is_typed_is_read_and_answered(typing: Any, engine: FakeEngine, text: TextModel) -> None:
    assert await typing.inner_text("#status-text") == "tiny"
    await typing.locator("#input").press_sequentially(WORDS)
    await typing.wait_for_selector("#read:has-text('tokens of the prompt are read')")
    reads = [request for request in engine.requests if request.spare_time]
    assert reads
    await typing.wait_for_function("parseInt(document.getElementById('meter').style.width) >= 30")
    await typing.fill("#input", "Short 🙂 instead: " + WORDS * 2)
    await typing.press("#input", "Enter")
    await typing.wait_for_selector(".turn.assistant .facts:has-text('tokens were read before')")
    assert await typing.inner_text(".turn.assistant .text") == "Hello, world!"
    assert await typing.inner_text(".turn.user .text") == "Short 🙂 instead: " + WORDS * 2
    assert "first token" in await typing.inner_text(".turn.assistant .facts")
    assert await typing.input_value("#input") == ""
    answer = next(request for request in engine.requests if not request.spare_time)
    prompt = text.decode(list(answer.prompt))
    assert "Short 🙂 instead: the quick" in prompt and prompt.count("quick") == 2, (
        "the edit replaced the text"
    )


async def test_a_newer_message_interrupts_and_escape_stops(typing: Any, engine: FakeEngine) -> None:
    quick = engine.script
    engine.script = lambda request: quick(request) if request.spare_time else [65, 66, 3600.0]
    await typing.fill("#input", "first")
    await typing.press("#input", "Enter")
    await typing.wait_for_selector(".turn.assistant .text:not(:empty)")
    await typing.fill("#input", "second")
    await typing.press("#input", "Enter")
    await typing.wait_for_selector(".turn.assistant .facts:has-text('interrupted')")
    await typing.locator(".turn.assistant .text:not(:empty)").nth(1).wait_for()
    await typing.press("#input", "Escape")
    await typing.locator(".facts:has-text('interrupted')").nth(1).wait_for()
    assert await typing.locator(".turn").count() == 4


async def test_it_connects_again_and_keeps_what_was_typed(typing: Any, app: Any, engine: FakeEngine) -> None:
    await typing.fill("#input", WORDS)
    await typing.evaluate(
        """() => {
          const proto = WebSocket.prototype, send = proto.send;
          proto.send = function () { proto.send = send; this.close(); };
        }"""
    )
    await typing.fill("#input", WORDS + "more")
    await typing.wait_for_selector(".status.down")
    assert await typing.is_disabled("#send")
    await typing.wait_for_selector(".status.ready")
    assert await typing.input_value("#input") == WORDS + "more"


async def test_it_fits_a_phone(typing: Any) -> None:
    await typing.set_viewport_size({"width": 390, "height": 844})
    await typing.fill("#input", WORDS)
    assert await typing.evaluate("document.documentElement.scrollWidth") <= 390
    assert await typing.is_visible("#send") and await typing.is_visible("#read")
