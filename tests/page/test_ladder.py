"""The page on a ladder: which variant spoke and why, thumbs, the deadline slider, and the frontier."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import httpx
import pytest

from tests.page.conftest import send

QUESTION = "What do I have to pay in total?\n- mouse at 18.81 EUR\n- lamp at 30.40 EUR"
VARIANTS = ["full", "int8", "pruned-int8", "small-int8", "tiny-int8"]
ANSWER = ".turn.assistant:last-child"
PHONE = {"width": 390, "height": 844}


@pytest.fixture
async def desk(tab: Any, desk_url: str) -> Any:
    """The page of the bundled ladder."""
    await tab.goto(desk_url)
    await tab.wait_for_selector(".status.ready")
    await tab.wait_for_selector("#deadline-row:not([hidden])")
    return tab


async def ask(page: Any, count: int) -> str:
    """Ask the question as the conversation's turn `count`, from 1; returns the variant that answered."""
    await send(page, QUESTION)
    await page.locator(".turn.assistant .facts").nth(count - 1).wait_for()
    return await page.inner_text(f"{ANSWER} .variant dd")


async def slide(page: Any, key: str) -> None:
    """Move the slider to an end by keyboard."""
    await page.focus("#deadline")
    await page.keyboard.press(key)


def overlap(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether two boxes cover each other by more than a pixel."""
    return all(
        min(one[start] + one[size], other[start] + other[size]) - max(one[start], other[start]) > 1
        for start, size in (("x", "width"), ("y", "height"))
    )


@pytest.mark.slow
async def test_the_slider_changes_which_variant_answers(desk: Any) -> None:
    assert await desk.inner_text("#deadline-value") == "no limit"
    best = await ask(desk, 1)
    assert best in ("desk:full", "desk:int8")
    assert await desk.inner_text(f"{ANSWER} .reason dd") != ""
    await slide(desk, "Home")
    assert await desk.input_value("#total") == "10"
    assert await desk.get_attribute("#deadline", "aria-valuetext") == "10 ms for the whole answer"
    lighter = await ask(desk, 2)
    assert lighter not in ("desk:full", "desk:int8")
    await desk.select_option("#model", "desk:int8")
    assert not await desk.is_visible("#deadline"), "a request that names a variant gets that one"
    await desk.select_option("#model", "desk")
    await slide(desk, "End")
    assert await desk.input_value("#total") == "", "no limit"
    await desk.fill("#total", "160")
    assert await desk.inner_text("#deadline-value") == "160 ms", "the slider follows the field"
    await slide(desk, "Home")
    await desk.reload()
    await desk.wait_for_selector("#deadline-row:not([hidden])")
    assert await desk.inner_text("#deadline-value") == "10 ms", "and is kept"


@pytest.mark.slow
async def test_thumbs_reach_the_server_and_the_panel(desk: Any, desk_url: str) -> None:
    variant = await ask(desk, 1)
    async with httpx.AsyncClient(base_url=desk_url) as client:
        before = (await client.get("/v1/feedback")).json()["models"].get("desk", {}).get(variant, {})
        await desk.click(f"{ANSWER} [aria-label='Thumbs down']")
        await desk.wait_for_selector(f"{ANSWER} [aria-label='Thumbs down'][aria-pressed=true]")
        await desk.click(f"{ANSWER} [aria-label='Thumbs up']")
        await desk.wait_for_selector(f"{ANSWER} [aria-label='Thumbs up'][aria-pressed=true]")
        assert await desk.get_attribute(f"{ANSWER} [aria-label='Thumbs down']", "aria-pressed") == "false"
        after = (await client.get("/v1/feedback")).json()["models"]["desk"][variant]
    assert after["rewards"] == before.get("rewards", 0) + 1, "the second replaces the first"
    assert "next choices" in await desk.inner_text(f"{ANSWER} .thumbs .aside")
    await desk.reload()
    await desk.wait_for_selector(f"{ANSWER} [aria-label='Thumbs up'][aria-pressed=true]")
    await desk.click("#tab-live")
    short = variant.removeprefix("desk:")
    row = desk.locator("#ladder-rows tr", has=desk.get_by_role("rowheader", name=short, exact=True))
    await row.locator(f"text=good, of {after['rewards']}").wait_for()
    assert "Learnt" in await desk.inner_text("#ladder-learnt")
    assert await row.locator("td").last.inner_text() != "\N{EN DASH}"
    assert "lower bound" in await row.locator("td").last.get_attribute("title")
    assert ", learnt " in await desk.get_attribute(".frontier", "aria-label")


@pytest.mark.slow
async def test_the_panel_shows_what_feedback_has_taught(desk: Any) -> None:
    rated = {"rewards": 9, "mean_reward": 0.5, "mean_expected": 0.9}
    variants = {
        "desk:int8": rated | {"correction": -0.3, "correction_low": -0.36},
        "desk:tiny-int8": rated | {"correction": 0.01, "correction_low": 0.0},
        "desk:full": rated | {"correction": 0.0, "correction_low": 0.0},
        "desk:small-int8": rated | {"correction": None, "correction_low": None},
    }
    summary = {"object": "feedback.summary", "waiting": 2, "models": {"desk": variants}}
    await desk.route("**/v1/feedback", lambda route: route.fulfill(json=summary))
    await desk.click("#tab-live")
    await desk.wait_for_selector("#ladder-rows tr")
    cells = desk.locator("#ladder-rows td:last-child")
    shown = dict(zip(VARIANTS, await cells.all_inner_texts(), strict=True))
    assert shown == {
        "full": "\N{PLUS-MINUS SIGN}0 points",
        "int8": "\N{MINUS SIGN}30 points",
        "pruned-int8": "\N{EN DASH}",
        "small-int8": "\N{EN DASH}",
        "tiny-int8": "+1 point",
    }
    assert "\N{MINUS SIGN}36 points" in await cells.nth(1).get_attribute("title")
    assert await desk.locator(".frontier .learnt").count() == 2, "a change of nothing has no ring"


@pytest.mark.slow
async def test_an_answer_that_was_erased_takes_no_thumbs(
    desk: Any, desk_url: str, complaints: list[str]
) -> None:
    await ask(desk, 1)
    async with httpx.AsyncClient(base_url=desk_url) as client:
        await client.delete("/v1/feedback")
    await desk.click(f"{ANSWER} [aria-label='Thumbs up']")
    await desk.wait_for_selector(f"{ANSWER} .thumbs:has-text('no longer waits')")
    assert await desk.is_disabled(f"{ANSWER} [aria-label='Thumbs up']")
    assert await desk.get_attribute(f"{ANSWER} [aria-label='Thumbs up']", "aria-pressed") == "false"
    assert len(complaints) == 1 and "404" in complaints.pop()


@pytest.mark.slow
async def test_the_panel_shows_frontier_and_shares(desk: Any) -> None:
    await ask(desk, 1)
    await desk.click("#tab-live")
    await desk.wait_for_selector("#ladder-rows tr")
    assert await desk.locator("#ladder-rows th").all_inner_texts() == VARIANTS
    assert await desk.locator(".frontier .dot").count() == len(VARIANTS)
    label = await desk.get_attribute(".frontier", "aria-label")
    assert all(f"{name} " in label for name in VARIANTS)
    boxes = [await text.bounding_box() for text in await desk.locator(".frontier .label").all()]
    assert len(boxes) == len(VARIANTS) and not any(
        overlap(one, other) for one, other in combinations(boxes, 2)
    ), "all labels can be read"
    shares = await desk.locator("#ladder-rows td:nth-child(4) span").all_inner_texts()
    assert sum(int(share.split("(")[1].rstrip(")").replace(",", "")) for share in shares) >= 1
    await desk.set_viewport_size(PHONE)
    assert await desk.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    await desk.click("#tab-play")
    await desk.wait_for_selector("#deadline")
    assert await desk.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


async def test_a_model_that_is_no_ladder_has_none_of_it(page: Any) -> None:
    await send(page)
    await page.wait_for_selector(".facts")
    assert await page.locator(".thumb, .facts .reason").count() == 0
    assert not await page.is_visible("#deadline")
    await page.click("#tab-live")
    await page.wait_for_selector("#tier-default .share:has-text('100 %')")
    assert not await page.is_visible("#ladder")
