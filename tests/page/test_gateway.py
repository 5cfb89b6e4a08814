"""The live page of a gateway in a browser."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from stretto.gateway.accounts import issue
from stretto.gateway.accounts.keys import KeyFile
from stretto.gateway.app import Gateway
from stretto.gateway.operations.live import VIEWERS
from tests.gateway.cluster import ASK, CHAT, cluster, fake
from tests.gateway.conftest import checkpoint

__all__ = ["checkpoint"]
SHOTS = os.environ.get("SCREENSHOTS")
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """The keys of an operator and of two tenants, and the path of their file."""
    file = KeyFile(tmp_path / "keys.json")
    now = datetime.now(UTC)
    limits = ("tokens=100000/month", "requests=600/minute")
    made = {
        "operator": issue.create(file, now, tenant="ops", scopes=("admin",)).key,
        "acme": issue.create(file, now, tenant="acme", limits=limits).key,
        "bob": issue.create(file, now, tenant="bob").key,
    }
    return made | {"file": str(file.path)}


@asynccontextmanager
async def loaded(
    checkpoint: Path, keys: dict[str, str], **extra: Any
) -> AsyncGenerator[tuple[httpx.AsyncClient, Gateway]]:
    """A gateway with three workers, one of them drained, after some requests."""
    engines = fake(10, 0.01, 11), fake(10, 11, 12), fake(10)
    settings = {"gateway_key": "g", "keys_file": keys["file"], "route": "round-robin"} | extra
    async with cluster(checkpoint, *engines, **settings) as (client, gateway):
        workers = list(gateway.registry.workers.values())
        for worker, site in zip(workers, ("core", "core", "edge"), strict=True):
            worker.view.site = site
        for number in range(9):
            key = keys["acme" if number % 3 else "bob"]
            await client.post(CHAT, json=ASK, headers={"x-api-key": key})
        await client.post(CHAT, json=ASK | {"model": "none"}, headers={"x-api-key": keys["bob"]})
        workers[2].hold(on=True)
        await asyncio.sleep(0.1)
        yield client, gateway


@asynccontextmanager
async def opened(tab: Any, client: httpx.AsyncClient, key: str, complaints: list[str]) -> AsyncGenerator[Any]:
    """The page with a key. It is left before the gateway ends: a browser complains of a cut stream."""
    await tab.goto(str(client.base_url))
    await tab.wait_for_selector("#status-text:has-text('needs a key')")
    await tab.fill("#key", key)
    await tab.press("#key", "Enter")
    await tab.wait_for_selector(".status.ready")
    yield tab
    await tab.goto("about:blank")
    # The browser reports the first answer, which asks for a key.
    complaints[:] = [each for each in complaints if "401" not in each]


async def test_an_operator_sees_workers_by_site_tenants_and_counts(
    tab: Any, checkpoint: Path, keys: dict[str, str], complaints: list[str]
) -> None:
    async with loaded(checkpoint, keys) as (client, _):
        async with opened(tab, client, keys["operator"], complaints) as page:
            assert await page.locator("#workers .site").all_inner_texts() == ["core", "edge"]
            assert await page.locator("#workers .state").all_inner_texts() == ["usable", "usable", "draining"]
            assert "2 of 3 take requests. Chosen by round-robin." in await page.inner_text("#routing")
            tenants = await page.locator("#tenants tbody tr").all_inner_texts()
            assert [each.split("\t")[0] for each in tenants] == ["acme", "bob"]
            assert [each.split("\t")[2] for each in tenants] == ["6", "4"]
            assert "Failovers\n0" in await page.inner_text("#relay")
            assert await page.locator("#graphs .tile").count() == 5
            await page.wait_for_selector(".tile path[d*=L]", state="attached")


async def test_a_worker_is_drained_and_undrained_from_the_page(
    tab: Any, checkpoint: Path, keys: dict[str, str], complaints: list[str]
) -> None:
    async with loaded(checkpoint, keys) as (client, gateway):
        async with opened(tab, client, keys["operator"], complaints) as page:
            worker = next(iter(gateway.registry.workers.values()))
            await page.click(f"button[aria-label='Drain {worker.name}']")
            await page.wait_for_selector(f"button[aria-label='Undrain {worker.name}']")
            assert worker.held
            await page.focus(f"button[aria-label='Undrain {worker.name}']")
            await page.keyboard.press("Enter")
            await page.wait_for_selector(f"button[aria-label='Drain {worker.name}']")
            assert not worker.held
            focused = await page.evaluate("document.activeElement.dataset.worker")
            assert focused == worker.name, "the focus stays on the worker when the table is drawn again"


async def test_a_tenant_sees_itself_alone_and_its_limits(
    tab: Any, checkpoint: Path, keys: dict[str, str], complaints: list[str]
) -> None:
    async with loaded(checkpoint, keys) as (client, _):
        async with opened(tab, client, keys["acme"], complaints) as page:
            rows = await page.locator("#tenants tbody tr").all_inner_texts()
            assert len(rows) == 1 and rows[0].startswith("acme")
            assert await page.locator("#workers button").count() == 0
            limits = await page.locator(".limit").all_inner_texts()
            assert "tokens=100000/month" in limits[0] and "renewed in" in limits[0]
            assert "bob" not in await page.inner_text("body")


async def test_links_are_fetched_with_the_key(
    tab: Any, checkpoint: Path, keys: dict[str, str], complaints: list[str]
) -> None:
    async with loaded(checkpoint, keys) as (client, _):
        async with opened(tab, client, keys["operator"], complaints) as page:
            async with page.expect_download() as saved:
                await page.click("text=Usage (CSV)")
            download = await saved.value
            assert download.suggested_filename == "usage.csv"
            text = Path(await download.path()).read_text()
            assert text.startswith("day,tenant,model,") and ",acme,tiny," in text


async def test_problems_of_the_key_file_are_shown_to_operators(
    tab: Any, checkpoint: Path, keys: dict[str, str], complaints: list[str]
) -> None:
    async with loaded(checkpoint, keys) as (client, _):
        async with opened(tab, client, keys["operator"], complaints) as page:
            assert await page.is_hidden("#problems")
            Path(keys["file"]).write_text("{")
            await page.wait_for_selector("#problems:has-text('is no key file')")


async def test_texts_of_workers_and_tenants_are_never_markup(
    tab: Any, checkpoint: Path, keys: dict[str, str], complaints: list[str]
) -> None:
    async with loaded(checkpoint, keys, api_keys={"k": "<img src=x onerror=alert(1)>"}) as (client, gateway):
        worker = next(iter(gateway.registry.workers.values()))
        worker.view.site = "<b>site</b>"
        await client.post(CHAT, json=ASK, headers={"x-api-key": "k"})
        async with opened(tab, client, keys["operator"], complaints) as page:
            await page.wait_for_selector("#tenants td:has-text('<img src=x')")
            assert await page.locator("#tenants img, #workers b").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
async def test_the_page_fits_every_screen(
    tab: Any, checkpoint: Path, keys: dict[str, str], complaints: list[str], scheme: str, size: str
) -> None:
    width, height = SIZES[size]
    await tab.set_viewport_size({"width": width, "height": height})
    await tab.emulate_media(color_scheme=scheme)
    async with loaded(checkpoint, keys) as (client, _):
        async with opened(tab, client, keys["operator"], complaints) as page:
            for number in range(120 if SHOTS else 1):
                await client.post(
                    CHAT, json=ASK, headers={"x-api-key": keys["acme" if number % 4 else "bob"]}
                )
                await asyncio.sleep(0.01 * (number % 12))
            wide = await page.evaluate(
                "['html', '#gateway'].map((name) => document.querySelector(name))"
                ".map((e) => e.scrollWidth - e.clientWidth)"
            )
            assert max(wide) <= 0, "nothing is cut off, and nothing scrolls sideways"
            small = await page.evaluate(
                "[...document.querySelectorAll('button, input')]"
                ".filter((e) => e.offsetParent && e.offsetHeight < 24).map((e) => e.outerHTML)"
            )
            assert small == []
            if SHOTS:
                await page.screenshot(path=f"{SHOTS}/gateway-{size}-{scheme}.png")


async def test_the_stream_ends_at_once_when_the_gateway_closes(
    checkpoint: Path, keys: dict[str, str]
) -> None:
    async with loaded(checkpoint, keys) as (client, gateway):
        async with client.stream("GET", "/live", headers={"x-api-key": keys["bob"]}) as answer:
            lines = answer.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            gateway.server.close()
            assert len([line async for line in lines if line]) <= 1


async def test_the_stream_ends_with_the_key_and_watchers_are_few(
    checkpoint: Path, keys: dict[str, str]
) -> None:
    async with loaded(checkpoint, keys) as (client, _):
        acme = {"x-api-key": keys["acme"]}
        assert (await client.get("/live")).status_code == 401
        async with client.stream("GET", "/live", headers=acme) as answer:
            lines = answer.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            file = KeyFile(Path(keys["file"]))
            name = next(each.id for each in file.read().keys if each.tenant == "acme")
            issue.revoke(file, name, datetime.now(UTC))
            assert len([line async for line in lines]) < 20, "it ends by itself"
        watchers = [client.stream("GET", "/live", headers={"x-api-key": keys["bob"]}) for _ in range(VIEWERS)]
        for each in watchers:
            assert (await each.__aenter__()).status_code == 200
        refused = await client.get("/live", headers={"x-api-key": keys["bob"]})
        assert refused.status_code == 503 and "watch already" in refused.text
        for each in watchers:
            await each.__aexit__(None, None, None)
        assert (await client.get("/page/secrets.json")).status_code == 404
