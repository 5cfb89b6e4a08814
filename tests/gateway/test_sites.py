"""An edge box with a small variant, and a core behind a network with a long round trip."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx

from benchmarks.delay_proxy import delayed
from stretto.config import ServeConfig
from stretto.engine.client import EngineClient
from stretto.engine.scheduler.admission import Snapshot
from stretto.http import serving
from stretto.server.app import build
from tests.gateway.cluster import ASK, CHAT, in_front, running, until
from tests.gateway.test_router import snapshot
from tests.server.fake_engine import FakeEngine, info

TTFT_MS = 300.0


@dataclass
class ReportingEngine(FakeEngine):
    """A fake engine with a snapshot, from which a gateway predicts."""

    def snapshots(self) -> dict[str, Snapshot]:
        return {"tiny": snapshot(time.monotonic())}


@asynccontextmanager
async def worker(checkpoint: Path, quality: float) -> AsyncGenerator[str]:
    engine = ReportingEngine(lambda _: [10, 11], {"tiny": info(vocab=600)})
    config = ServeConfig(port=0, drain_s=0.3, quality=quality)
    app = build(config, cast(EngineClient, engine), {"tiny": checkpoint})
    async with running(serving.run, config, app, engine) as url:
        yield url


async def report(client: httpx.AsyncClient, **objective: float) -> dict[str, Any]:
    body = ASK | {"stream": False, "objective": objective or None}
    answer = await client.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["stretto"]


async def test_the_best_site_that_is_near_enough_answers_and_an_edge_alone_says_so(checkpoint: Path):
    for round_trip_s, site, why in ((0.01, "core", None), (0.45, "edge", "deadline")):
        async with AsyncExitStack() as stack:
            core, edge = [await stack.enter_async_context(worker(checkpoint, each)) for each in (1.0, 0.7)]
            network = AsyncExitStack()
            far = await network.enter_async_context(delayed(core, round_trip_s))
            client, gateway = await stack.enter_async_context(in_front(f"edge={edge}", f"core={far}"))
            found = await report(client, ttft_ms=TTFT_MS)
            assert (found["site"], found.get("degraded")) == (site, why)
            assert (await report(client))["site"] == "core"  # time is no matter
            (core_view,) = (
                each.view for each in gateway.registry.workers.values() if each.view.site == "core"
            )
            assert core_view.round_trip >= round_trip_s
            await network.aclose()  # the core can no longer be reached
            await until(lambda view=core_view: not view.usable)
            found = await report(client, ttft_ms=TTFT_MS)
            assert (found["site"], found["degraded"]) == ("edge", "unreachable")


async def test_connections_to_a_far_site_are_open_before_they_are_needed(checkpoint: Path):
    async with (
        worker(checkpoint, 1.0) as core,
        delayed(core, 0.05) as far,
        in_front(far) as (_, gateway),
    ):
        (pool,) = (each.pool for each in gateway.registry.workers.values())
        await until(lambda: pool.idle >= 2)
