"""The page in a browser: a chat, its objective and timing, the live view, and the look."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from msgspec import structs

from stretto.config import ServeConfig
from stretto.http import serving as lifecycle
from stretto.server.app import App
from stretto.types import Finish, Reason, StepStats, TokenEvent
from tests.page.conftest import send
from tests.server.conftest import Served
from tests.server.fake_engine import FakeEngine


async def test_a_chat_by_keyboard_streams_and_shows_its_timing(page: Any) -> None:
    await page.keyboard.type("Hi")
    await page.keyboard.press("Enter")
    await page.wait_for_selector(".facts")
    assert await page.inner_text(".turn.assistant .text") == "Hello, world!"
    assert await page.evaluate("document.activeElement.id") == "input"
    assert await page.locator(".timing-graph").count() == 0, "the graph is folded"
    await page.click(".timing summary")
    await page.wait_for_selector(".timing-graph .mark:nth-of-type(2)", state="attached")
    assert await page.inner_text(".timing .legend") == "tokens received\ndeadlines\na late token"
    assert "tokens" in await page.get_attribute(".timing-graph", "aria-label")
    assert await page.inner_text(".facts .good dd") == "On time"
    assert await page.inner_text("#said") == "The answer is complete."


async def test_the_request_carries_the_chosen_objective_and_tier(page: Any) -> None:
    await page.select_option("#tier", "priority")
    assert await page.get_attribute("#itl", "placeholder") == "150 ms", "the tier's own, from the live stream"
    await page.fill("#ttft", "900")
    await page.fill("#itl", "80")
    await page.select_option("#miss", "late")
    await page.fill("#input", "Hi")
    async with page.expect_request("**/v1/chat/completions") as sent:
        await page.click("#send")
    body = json.loads((await sent.value).post_data)
    assert body["objective"] == {"ttft_ms": 900, "itl_ms": 80, "on_miss": "late"}
    assert body["service_tier"] == "priority"
    await page.wait_for_selector(".facts")


async def test_late_tokens_are_marked_in_the_timing_graph(page: Any, engine: FakeEngine) -> None:
    engine.script = lambda request: [65, 0.6, 66]
    await page.fill("#ttft", "500")
    await page.fill("#itl", "20")
    await send(page)
    await page.wait_for_selector(".facts .bad")
    await page.click(".timing summary")
    await page.wait_for_selector(".timing-graph .mark.late", state="attached")
    assert await page.inner_text("#said") == "The answer is complete, and late."


@pytest.mark.parametrize("how", ["click", "escape"])
async def test_stopping_an_answer_cancels_it_in_the_engine(page: Any, engine: FakeEngine, how: str) -> None:
    engine.script = lambda request: [65, 30.0, 65]
    await send(page)
    await page.wait_for_selector(".turn.assistant:not(.awaited) .text p")
    await (page.click("#send") if how == "click" else page.keyboard.press("Escape"))
    await page.wait_for_selector("#send:has-text('Send')")
    shown = await page.inner_text(".turn.assistant .facts")
    assert "stopped" in shown and "TTFT" in shown and "tokens" in shown
    for _ in range(100):
        if not engine.open:
            break
        await asyncio.sleep(0.02)
    assert not engine.open, "the work ended in the engine too"


async def test_a_refusal_offers_a_retry_after_the_given_time(
    page: Any, engine: FakeEngine, complaints: list[str]
) -> None:
    say = engine.script
    refused = Finish(Reason.REFUSED, 3, 0, 0, 0.0, retry_after=1.0)
    engine.script = lambda request: [TokenEvent(0, finish=refused)]
    await send(page)
    await page.wait_for_selector(".failed button:has-text('Try again in 1 s')")
    assert "cannot be met now" in await page.inner_text(".problem")
    engine.script = say
    await page.click(".failed button:enabled")
    await page.wait_for_selector(".facts")
    assert await page.locator(".turn").count() == 2, "the answer took the refusal's place"
    assert len(complaints) == 1 and "503" in complaints.pop()


async def test_the_live_view_draws_the_steps_of_the_server(page: Any, engine: FakeEngine) -> None:
    loaded = await page.evaluate("performance.getEntriesByType('resource').map((each) => each.name).join()")
    assert "plotly.min.js" not in loaded, "the first paint does not wait for it"
    await page.focus("#tab-play")
    await page.keyboard.press("ArrowRight")
    await page.wait_for_selector("#idle:has-text('No requests yet')")
    await page.focus("#tab-live")
    await page.keyboard.press("ArrowLeft")
    await send(page)
    await page.wait_for_selector(".facts")
    stats = StepStats("tiny", 0.0, 12.0, 3, 40, 9, 4, 2, 60, 64, predicted_ms=9.0, proposed=4, accepted=3)
    engine.publish(stats)
    await page.click("#tab-live")
    await page.wait_for_selector("#tier-default .share:has-text('100 %')")
    await page.wait_for_selector("#graph-model .plot svg")
    await page.wait_for_selector("#graph-error .words:text-is('25 %, median')")
    assert await page.locator("#graphs .plot svg.main-svg").count() >= 9
    await page.set_viewport_size({"width": 390, "height": 844})
    assert await page.evaluate("document.documentElement.scrollWidth") <= 390


async def test_the_live_view_begins_with_the_servers_history(page: Any, served: Served) -> None:
    async with (
        httpx.AsyncClient(base_url=served.url) as client,
        client.stream("GET", "/live") as response,
    ):
        event = await anext(line async for line in response.aiter_lines() if line.startswith("data: "))
    now = json.loads(event.removeprefix("data: "))
    now["ended"] = 1
    now["history"] = [{"ago_s": ago, "live": now | {"tokens_s": 7.0}} for ago in (120.0, 60.0)]
    headers = {"content-type": "text/event-stream"}

    async def fulfil(route: Any) -> None:
        await route.fulfill(status=200, headers=headers, body=f"data: {json.dumps(now)}\n\n")

    await page.route("**/live", fulfil)
    await page.goto(f"{served.url}/#live")
    await page.reload()
    await page.wait_for_selector("#graphs .plot svg.main-svg")
    oldest = "Math.min(...[...document.querySelectorAll('#graphs .plot')].flatMap((plot) => (plot.data ?? [])"
    oldest += ".flatMap((trace) => (trace.x ?? []).filter((x) => x instanceof Date).map((x) => +x))))"
    assert await page.evaluate(f"Date.now() - {oldest}") > 100_000, "milliseconds before now"


async def test_the_page_reconnects_when_the_server_restarts(
    page: Any, served: Served, config: ServeConfig, app: App, engine: FakeEngine, complaints: list[str]
) -> None:
    app.server.gate.close()
    served.task.cancel()
    await asyncio.gather(served.task, return_exceptions=True)
    await page.wait_for_selector(".status.down:has-text('not reachable')")
    app.server.gate.draining = False
    again = asyncio.create_task(lifecycle.run(structs.replace(config, port=served.port), app, engine))
    await page.wait_for_selector(".status.ready")
    await send(page)
    await page.wait_for_selector(".facts")
    await page.goto("about:blank")
    again.cancel()
    await asyncio.gather(again, return_exceptions=True)
    assert all("Failed to load resource" in message or "net::" in message for message in complaints)
    complaints.clear()


async def test_the_theme_is_kept_and_the_page_fits_a_phone(page: Any) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light = await page.evaluate(paper)
    await page.emulate_media(color_scheme="dark")
    dark = await page.evaluate(paper)
    assert dark != light
    await page.click("#theme")
    assert await page.evaluate(paper) == light, "the choice wins over the system's"
    await page.reload()
    assert await page.evaluate(paper) == light, "and is kept"
    await page.click("#theme")
    assert await page.evaluate(paper) == dark
    await page.set_viewport_size({"width": 390, "height": 844})
    assert await page.evaluate("document.documentElement.scrollWidth") <= 390


async def test_plotly_is_served_compressed_and_cacheable(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.url) as client:
        got = await client.get("/page/plotly.min.js")
        again = await client.get("/page/plotly.min.js", headers={"if-none-match": got.headers["etag"]})
        assert got.headers["content-encoding"] == "gzip" and "max-age" in got.headers["cache-control"]
        assert int(got.headers["content-length"]) < len(got.content) / 2
        assert (again.status_code, again.content) == (304, b"")
        for missing in ("..%2Fassets.py", "nothing.js", "index.html.gz"):
            assert (await client.get(f"/page/{missing}")).status_code == 404
