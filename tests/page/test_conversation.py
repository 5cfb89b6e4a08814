"""The page keeps conversations, and shows answers of every kind."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import structs

from stretto.config import ServeConfig
from tests.page.conftest import send
from tests.server.conftest import Served
from tests.server.fake_engine import FakeEngine

SetAnswer = Callable[[str], list[int]]
PHONE = {"width": 390, "height": 844}
MARKDOWN = """# Title

A **bold** [link](https://example.org) and a [trap](javascript:alert(1)).

| a | b |
|---|--:|
| 1 | 2 |

```python
x = 1
```

<img src=x onerror=alert(1)> <script>alert(2)</script> ![image](https://example.org/x.png)
"""


async def ask(page: Any, text: str = "Hi") -> None:
    """Send a message and wait for the end of its answer."""
    await send(page, text)
    await page.wait_for_selector("#send:has-text('Send')")


async def answers(page: Any, *deltas: dict[str, Any], reason: str = "stop") -> None:
    """Let the page receive these deltas instead of the server's."""
    choices = [{"delta": delta} for delta in deltas] + [{"delta": {}, "finish_reason": reason}]
    events = [{"choices": [choice | {"index": 0}]} for choice in choices]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"

    async def fulfil(route: Any) -> None:
        await route.fulfill(status=200, headers={"content-type": "text/event-stream"}, body=body)

    await page.route("**/v1/chat/completions", fulfil)


async def test_markdown_is_rendered_and_nothing_in_it_runs(page: Any, set_answer: SetAnswer) -> None:
    set_answer(MARKDOWN)
    await ask(page)
    text = page.locator(".turn.assistant .text")
    assert await text.locator("h1").inner_text() == "Title"
    assert await text.locator("td.to-right").inner_text() == "2"
    assert await text.locator("pre code").inner_text() == "x = 1\n"
    assert await text.locator("a").all_inner_texts() == ["link", "image"], "no javascript: link"
    assert await text.locator("a").first.get_attribute("rel") == "noopener noreferrer"
    assert await text.locator("img, script, [style], [onerror]").count() == 0
    assert await text.locator(".code button:has-text('Copy')").count() == 1


async def test_a_reload_keeps_conversations_settings_and_key(page: Any) -> None:
    await page.fill("#system", "Be brief.")
    await page.fill("#key", "secret")
    await page.press("#key", "Tab")
    await ask(page, "First question")
    await page.click("#clear")
    await ask(page, "Second question")
    await page.reload()
    await page.wait_for_selector(".turn")
    assert await page.inner_text(".turn.user .text") == "Second question"
    assert (await page.input_value("#system"), await page.input_value("#key")) == ("Be brief.", "secret")
    await page.click("#conversations button:has-text('First')")
    assert await page.inner_text(".turn.user .text") == "First question"
    assert await page.inner_text(".turn.assistant .text") == "Hello, world!"
    await page.click("[aria-label='Delete First question']")
    assert await page.locator("#conversations li").count() == 1
    assert await page.inner_text(".turn.user .text") == "Second question"
    assert "secret" not in await page.evaluate("JSON.stringify(localStorage)")


async def test_two_tabs_keep_each_others_conversations(page: Any, served: Served) -> None:
    other = await page.context.new_page()
    await other.goto(served.url)
    await other.wait_for_selector(".status.ready")
    await ask(page, "In the first tab")
    await other.wait_for_selector("#conversations button:has-text('In the first tab')")
    await ask(other, "In the second tab")
    await other.reload()
    await other.wait_for_selector("#conversations button:has-text('In the first tab')")
    assert await other.locator("#conversations li").count() == 2


async def test_a_message_can_be_edited_and_an_answer_made_again(
    page: Any, engine: FakeEngine, set_answer: SetAnswer
) -> None:
    await ask(page, "One")
    await ask(page, "Two")
    set_answer("Another")
    await page.click(".turn.assistant:last-of-type button:has-text('Regenerate')")
    await page.wait_for_selector(".turn.assistant:last-of-type .text:has-text('Another')")
    await page.click(".turn.user button:has-text('Edit') >> nth=0")
    assert await page.input_value("#input") == "One"
    async with page.expect_request("**/v1/chat/completions") as sent:
        await send(page, "Uno")
    assert [each["content"] for each in json.loads((await sent.value).post_data)["messages"]] == ["Uno"]
    await page.wait_for_selector(".turn.assistant .facts")
    assert await page.locator(".turn").count() == 2


async def test_a_conversation_is_exported_as_markdown(page: Any) -> None:
    await ask(page, "Export me")
    async with page.expect_download() as started:
        await page.click("#export")
    file = Path(await (await started.value).path())
    assert file.read_text() == "# Export me\n\n## You\n\nExport me\n\n## tiny\n\nHello, world!\n"


async def test_a_cut_answer_says_so_and_is_continued_where_it_ended(page: Any, engine: FakeEngine) -> None:
    await page.fill("#tokens", "5")
    await ask(page)
    assert "reached the most tokens" in await page.inner_text(".turn.assistant .aside")
    before = await page.inner_text(".turn.assistant .text")
    await page.fill("#tokens", "")
    asked = engine.requests[-1].prompt
    await page.click("button:has-text('Continue')")
    await page.wait_for_selector(".turn.assistant .text:has-text('world')")
    again = engine.requests[-1].prompt
    assert again[: len(asked)] == asked and len(again) == len(asked) + 5, "the answer so far is in the prompt"
    assert (await page.inner_text(".turn.assistant .text")).startswith(before)


async def test_reasoning_and_tool_calls_are_folded(page: Any) -> None:
    call = {"index": 0, "id": "c", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    await answers(page, {"reasoning_content": "Hm."}, {"tool_calls": [call]}, reason="tool_calls")
    await ask(page)
    assert await page.locator("details[open]").count() == 0
    assert await page.inner_text(".thought summary") == "Reasoning"
    assert await page.inner_text(".call summary") == "Calls weather"
    await page.click(".call summary")
    assert json.loads(await page.inner_text(".call pre")) == {"city": "Rome"}


async def test_a_full_context_is_counted_said_and_trimmed(
    page: Any, engine: FakeEngine, complaints: list[str]
) -> None:
    await ask(page, "x" * 200)
    assert " of 512 tokens of context" in await page.inner_text("#count")
    await ask(page, "y" * 60)
    await send(page, "z" * 250)
    await page.wait_for_selector(".problem")
    assert "longer than the 512 tokens that this model can read" in await page.inner_text(".problem")
    assert await page.locator("button:has-text('Try again')").count() == 0
    await page.click("button:has-text('Leave out the oldest messages')")
    await page.wait_for_selector(".turn.assistant:last-of-type .facts")
    assert await page.locator(".turn.unsent").count() == 2
    assert len(complaints) == 1 and "400" in complaints.pop()


async def test_an_example_is_asked_with_a_click(page: Any) -> None:
    assert 4 <= await page.locator(".example").count() <= 6
    await page.click(".example >> nth=1")
    await page.wait_for_selector(".facts")


async def test_the_newest_answer_is_in_view_on_a_phone_and_settings_are_in_a_drawer(
    page: Any, set_answer: SetAnswer
) -> None:
    await page.set_viewport_size(PHONE)
    set_answer("A long answer. " * 15)
    for text in ("One", "Two", "Three"):
        await ask(page, text)
    last = await page.locator(".turn.assistant:last-of-type .actions").bounding_box()
    form = await page.locator("#form").bounding_box()
    assert last["y"] + last["height"] <= form["y"] + 1 <= PHONE["height"]
    assert not await page.is_visible("#model")
    await page.click("#menu")
    assert await page.is_visible("#model") and await page.is_visible("#clear")
    await page.keyboard.press("Escape")
    assert not await page.is_visible("#model")


async def test_a_long_answer_is_read_as_fast_as_it_comes(
    page: Any, served: Served, engine: FakeEngine
) -> None:
    """The page's clock, against that of a client that draws nothing. 10 s is far below the old 89 s."""
    model = structs.replace(engine.models["tiny"], context=8192)
    engine.models["tiny"] = model
    engine.script = lambda request: [65 + index % 20 for index in range(4000)]
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    started = time.perf_counter()
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        await client.post("/v1/chat/completions", json=body)
    plain = time.perf_counter() - started
    started = time.perf_counter()
    await send(page)
    await page.wait_for_selector(".facts", timeout=60_000)
    drawn = time.perf_counter() - started
    assert drawn < 3 * plain + 3, f"curl took {plain:.1f} s, the page {drawn:.1f} s"
    await page.click(".timing summary")
    assert await page.locator(".timing-graph .mark").count() <= 301


async def test_controls_have_names_and_the_links_are_in_view(page: Any, served: Served, tab: Any) -> None:
    await page.set_viewport_size({"width": 1280, "height": 800})
    assert await page.get_by_label("Temperature").get_attribute("id") == "temperature"
    for name in ("API", "Metrics", "State"):
        box = await page.get_by_role("link", name=name, exact=True).bounding_box()
        assert box["y"] + box["height"] <= 800
    await page.goto(f"{served.url}/#live")
    await page.reload()
    await page.wait_for_selector("#live-note:has-text('Medians')")
    frame = "getComputedStyle(document.getElementById('live')).outlineStyle"
    assert await page.evaluate(f"{frame}") == "none"


class TestLocked:
    @pytest.fixture
    def config(self) -> ServeConfig:
        return ServeConfig(port=0, max_waiting=32, drain_s=0.3, api_keys={"right": "someone"})

    async def test_a_locked_server_asks_for_its_key(
        self, served: Served, tab: Any, complaints: list[str]
    ) -> None:
        await tab.goto(served.url)
        await tab.wait_for_selector(".status:has-text('needs a key')")
        assert await tab.evaluate("document.activeElement.id") == "key"
        await tab.keyboard.type("right")
        await tab.keyboard.press("Tab")
        await tab.wait_for_selector(".status.ready")
        await ask(tab)
        assert all("401" in message for message in complaints)
        complaints.clear()
