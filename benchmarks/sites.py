"""Compares an edge box and a far core, each alone and together, over networks with long round trips.

    python benchmarks/sites.py [--requests 60] [--rate 15] [--ttft-ms 100]

Both workers are null models on this machine. The edge serves a variant of quality 0.7 and the core one of
1.0; a proxy delays what goes to the core and back by 5, 40 and 150 ms in all. Every request asks for its
first token within `--ttft-ms`. Prints for each network the share that was on time, seen by the client, and
the mean quality of those answers: of the core alone, the edge alone, and a gateway in front of both.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import Any

import httpx
from delay_proxy import delayed
from msgspec import Struct, json
from serving import serving as started

from stretto.gateway.app import Gateway
from stretto.gateway.settings import GatewayConfig
from stretto.http import serving
from stretto.statistics import quantile

ROUND_TRIPS_MS = (5, 40, 150)
QUALITY = {"edge": 0.7, "core": 1.0}
STEP_MS = 5


class SeenReport(Struct, frozen=True):
    """The report of an answer, as far as it is read here."""

    site: str = ""


class SeenEvent(Struct, frozen=True):
    """An event of a stream, as far as it is read here."""

    stretto: SeenReport = SeenReport()


@asynccontextmanager
async def gateway_of(workers: tuple[str, ...]) -> AsyncGenerator[httpx.AsyncClient]:
    """A gateway in front of these workers, when all of them are usable."""
    gateway = Gateway(GatewayConfig(workers=workers, port=0), seed=0)
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serving.run(gateway.config, gateway, gateway, url.set_result))
    try:
        async with httpx.AsyncClient(base_url=await url, timeout=30) as client:
            for _ in range(1200):
                if all(worker.view.usable for worker in gateway.registry.workers.values()):
                    break
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.3)  # the round trip is measured a few times
            yield client
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def ask(client: httpx.AsyncClient, number: int, ttft_ms: float) -> tuple[float, str]:
    """The time to the first token in ms, and the site that answered."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"Question {number}"}],
        "stream": True,
        "max_tokens": 4,
        "objective": {"ttft_ms": ttft_ms},
    }
    began, first, site = time.perf_counter(), float("inf"), ""
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                first = min(first, time.perf_counter() - began)
                site = json.decode(line[6:], type=SeenEvent).stretto.site or site
    return first * 1e3, site


async def load(client: httpx.AsyncClient, count: int, rate: float, ttft_ms: float) -> str:
    """Send the requests at that rate; returns what they saw."""
    tasks: list[asyncio.Task[tuple[float, str]]] = []
    for number in range(count):
        tasks.append(asyncio.create_task(ask(client, number, ttft_ms)))
        await asyncio.sleep(1 / rate)
    seen = await asyncio.gather(*tasks)
    times = sorted(ttft for ttft, _ in seen)
    timely = [QUALITY[site] for ttft, site in seen if ttft <= ttft_ms]
    quality = f"{sum(timely) / len(timely):.2f}" if timely else "-"
    return (
        f"{len(timely) / count:7.1%} on time, quality {quality}; TTFT p50 {quantile(times, 0.5):.0f} ms, "
        f"p99 {quantile(times, 0.99):.0f}, max {times[-1]:.0f}"
    )


async def compare(options: argparse.Namespace, edge: str, core: str) -> None:
    """Run all networks and print a line for each way."""
    for round_trip_ms in ROUND_TRIPS_MS:
        async with AsyncExitStack() as stack:
            far = await stack.enter_async_context(delayed(core, round_trip_ms / 1e3))
            ways = {
                "core alone": (f"core={far}",),
                "edge alone": (f"edge={edge}",),
                "both": (f"edge={edge}", f"core={far}"),
            }
            for name, workers in ways.items():
                async with gateway_of(workers) as client:
                    seen = await load(client, options.requests, options.rate, options.ttft_ms)
                    print(f"round trip {round_trip_ms:3} ms, {name:10}: {seen}", flush=True)


def main() -> None:
    """Start the workers and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--rate", type=float, default=15.0)
    parser.add_argument("--ttft-ms", type=float, default=100.0)
    options = parser.parse_args()
    with ExitStack() as stack:
        urls: dict[str, str] = {}
        for site, quality in QUALITY.items():
            os.environ["STRETTO_QUALITY"] = str(quality)
            urls[site] = stack.enter_context(started(f"null=null:{STEP_MS}"))
        asyncio.run(compare(options, urls["edge"], urls["core"]))


if __name__ == "__main__":
    main()
