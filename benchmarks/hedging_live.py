"""Measures second attempts on real processes: several workers, one of which is slow now and then.

    python benchmarks/hedging_live.py [--requests 300] [--rounds 3] [--slow 10] [--scale 4]

Four workers with the null model (real servers and engines; a step takes a known time) stand behind two
gateways: one without second attempts, and one that may spend 5 % of the prompts' tokens on them. For 0.3 s in
every second the engine of one worker is stopped and continued by signals, so that it runs for one part in
`slow` of the time: too short for its step-time model, and so the router, to learn it. The same requests, with
`ttft_ms` = 150, go to both gateways in turns. `--scale` makes all these times longer, so that the processors
are no bottleneck. Prints the time to the first token of each, second attempts and
how many won, and the share of requests that were sent twice.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import httpx
from hedging import BURST_S, COST, PERIOD_S, TTFT_MS, WORKERS
from serving import serving as started

from stretto.gateway.app import Gateway
from stretto.gateway.settings import GatewayConfig
from stretto.http import serving
from stretto.statistics import quantile

WORDS = "order parcel Monday lamp chair refund address invoice colour window table garden".split()
RUN_S = 0.01  # how long a slow engine runs at once
SETTLE_S = 1.0
RATE = 20.0  # requests in a second at scale 1, which is about half of what the workers can carry


@asynccontextmanager
async def gateway_of(urls: list[str], share: float) -> AsyncGenerator[tuple[Gateway, httpx.AsyncClient]]:
    """A gateway in front of these workers, and a client of it."""
    gateway = Gateway(GatewayConfig(workers=tuple(urls), port=0, hedge_share=share), seed=0)
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serving.run(gateway.config, gateway, gateway, url.set_result))
    try:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=await url, timeout=60, limits=limits) as client:
            for _ in range(1200):
                if all(worker.view.usable for worker in gateway.registry.workers.values()):
                    break
                await asyncio.sleep(0.05)
            yield gateway, client
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def slow_down(engine: int, slow: float, scale: float) -> None:
    """In bursts, lets the process run for one part in `slow` of the time."""
    try:
        while True:
            until = time.monotonic() + BURST_S * scale
            while time.monotonic() < until:
                os.kill(engine, signal.SIGSTOP)
                await asyncio.sleep(RUN_S * scale * (slow - 1))
                os.kill(engine, signal.SIGCONT)
                await asyncio.sleep(RUN_S * scale)
            await asyncio.sleep((PERIOD_S - BURST_S) * scale)
    finally:
        os.kill(engine, signal.SIGCONT)


def body_of(number: int, rng: random.Random, ttft_ms: float) -> dict[str, Any]:
    """A request of 200 to 600 tokens that shares no beginning with others. A null token is a byte."""
    text = f"{number} "
    length = rng.randrange(200, 601)
    while len(text) < length:
        text += rng.choice(WORDS) + " "
    return {
        "messages": [{"role": "user", "content": text[:length]}],
        "stream": True,
        "max_tokens": rng.randrange(16, 49),
        "ignore_eos": True,
        "objective": {"ttft_ms": ttft_ms, "on_miss": "late"},
    }


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> float:
    """Milliseconds to the first token; inf if there is none."""
    began, first = time.perf_counter(), float("inf")
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and answer.status_code == 200:
                first = min(first, time.perf_counter() - began)
    return first * 1e3


async def load(
    client: httpx.AsyncClient, bodies: list[dict[str, Any]], rate: float, seed: int
) -> list[float]:
    """Send the requests at random times; returns their times to the first token."""
    rng, tasks = random.Random(seed), list[asyncio.Task[float]]()
    for body in bodies:
        tasks.append(asyncio.create_task(ask(client, body)))
        await asyncio.sleep(rng.expovariate(rate))
    return list(await asyncio.gather(*tasks))


async def compare(options: argparse.Namespace, urls: list[str]) -> None:
    """Send the load to both gateways in turns, and print what came of it."""
    async with httpx.AsyncClient() as client:
        engine = (await client.get(f"{urls[0]}/state")).json()["engine_pid"]
    ways, ttft_ms = {"without": 0.0, "with": 0.05}, TTFT_MS * options.scale
    times: dict[str, list[float]] = {name: [] for name in ways}
    sent = 0
    async with contextlib.AsyncExitStack() as stack:
        gateways = {
            name: await stack.enter_async_context(gateway_of(urls, share)) for name, share in ways.items()
        }
        await asyncio.sleep(SETTLE_S)
        slowing = asyncio.create_task(slow_down(engine, options.slow, options.scale))
        try:
            for number in range(options.rounds):
                rng = random.Random(number)
                bodies = [body_of(index, rng, ttft_ms) for index in range(options.requests)]
                sent += len(bodies)
                for name, (_, client) in gateways.items():
                    times[name] += await load(client, bodies, RATE / options.scale, number)
        finally:
            slowing.cancel()
            await asyncio.gather(slowing, return_exceptions=True)
        for name, (gateway, _) in gateways.items():
            relay, found = gateway.relay, sorted(times[name])
            on_time = sum(ttft <= ttft_ms for ttft in found) / len(found)
            print(
                f"{name:>8}: TTFT p50 {quantile(found, 0.5):.0f} ms, p99 {quantile(found, 0.99):.0f}, max "
                f"{found[-1]:.0f}; {on_time:.1%} on time; {relay.hedges} second attempts of {sent} requests, "
                f"{relay.hedges_won} won"
            )
    without, hedged = (quantile(sorted(times[name]), 0.99) for name in ways)
    extra = gateways["with"][0].relay.hedges / sent
    print(f"TTFT p99 with second attempts is {hedged / without:.2f} of that without; {extra:.1%} sent twice")


def main() -> None:
    """Start the workers and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow", type=float, default=10.0)
    parser.add_argument("--scale", type=float, default=4.0)
    options = parser.parse_args()
    cost = (COST.base, COST.per_decode, COST.per_prefill)
    model = "null=null:" + ":".join(f"{value * options.scale:g}" for value in cost)
    with ExitStack() as stack:
        urls = [stack.enter_context(started(model)) for _ in range(WORKERS)]
        asyncio.run(compare(options, urls))


if __name__ == "__main__":
    main()
