"""Second attempts: in virtual time, with one of several workers slowed ten times now and then; and over real
sockets, where the first and the second attempt race."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks import hedging
from stretto.errors import EngineDied
from stretto.gateway.app import Gateway
from stretto.types import Reason
from tests.gateway.cluster import ASK, CHAT, cluster, fake, text_of
from tests.server.fake_engine import FakeEngine

TOKENS = list(range(60, 66))


@asynccontextmanager
async def racing(
    checkpoint: Path, first: FakeEngine, second: FakeEngine
) -> AsyncGenerator[tuple[httpx.AsyncClient, Gateway]]:
    """A gateway that sends each request to `first`, and after 50 ms to `second` also."""
    async with cluster(checkpoint, first, second, route="round-robin") as (client, gateway):
        relay = gateway.relay
        names = list(relay.router.workers)

        def place(ask: Any, now: float, avoid: Any = ()) -> Any:
            able = [name for name in names if name not in avoid]
            return only(ask, now, set(names) - {able[0]}) if able else None

        only = relay.router.place
        relay.router.place = place
        relay.hedging.wait = lambda ask, placement: 0.05
        relay._second = lambda ask, exchange, placement: place(ask, 0.0, {placement.worker.name})
        yield client, gateway


async def ended(*engines: FakeEngine) -> None:
    """Waits until no engine works."""
    async with asyncio.timeout(30):
        while any(engine.open for engine in engines):
            await asyncio.sleep(0.02)


async def test_the_second_attempt_wins_and_the_first_is_cancelled(checkpoint: Path):
    slow, quick = fake(3600.0, *TOKENS), fake(*TOKENS)
    async with racing(checkpoint, slow, quick) as (client, gateway):
        answers = await asyncio.gather(*(client.post(CHAT, json=ASK) for _ in range(5)))
        assert len({text_of(answer) for answer in answers}) == 1
        assert (gateway.relay.hedges, gateway.relay.hedges_won) == (5, 5)
        await ended(slow, quick)
        assert {worker.view.active for worker in gateway.registry.workers.values()} == {0}
        assert {worker.breaker.state(time.monotonic()) for worker in gateway.registry.workers.values()} == {
            "closed"
        }


async def test_the_first_attempt_wins_and_the_second_is_cancelled(checkpoint: Path):
    first, never = fake(0.4, *TOKENS), fake(3600.0, *TOKENS)
    async with racing(checkpoint, first, never) as (client, gateway):
        text_of(await client.post(CHAT, json=ASK))
        assert (gateway.relay.hedges, gateway.relay.hedges_won) == (1, 0)
        assert len(never.requests) == 1
        await ended(first, never)
        assert {worker.view.active for worker in gateway.registry.workers.values()} == {0}


async def test_when_the_first_attempt_fails_the_second_goes_on_alone(checkpoint: Path):
    for failing in (fake(0.3, EngineDied("it ended")), fake(0.3, Reason.REFUSED)):
        other = fake(0.6, *TOKENS)
        async with racing(checkpoint, failing, other) as (client, gateway):
            text_of(await client.post(CHAT, json=ASK))
            assert (gateway.relay.hedges, gateway.relay.hedges_won) == (1, 1)
            assert len(other.requests) == 1  # not begun once more


async def test_a_client_that_leaves_ends_both_attempts(checkpoint: Path):
    first, second = fake(3600.0, *TOKENS), fake(3600.0, *TOKENS)
    async with racing(checkpoint, first, second) as (client, gateway):
        leaving = asyncio.create_task(client.post(CHAT, json=ASK))
        async with asyncio.timeout(30):
            while not (first.open and second.open):
                await asyncio.sleep(0.02)
        leaving.cancel()
        await asyncio.wait({leaving})
        await ended(first, second)
        async with asyncio.timeout(30):
            while gateway.server.running:
                await asyncio.sleep(0.02)
        assert {worker.view.active for worker in gateway.registry.workers.values()} == {0}


def test_second_attempts_halve_the_slowest_first_tokens_for_little_extra_work():
    without = hedging.run(800, load=0.5, slow=10.0, share=0.0)
    hedged = hedging.run(800, load=0.5, slow=10.0, share=0.05)
    assert hedged.ttft_p99_ms <= 0.5 * without.ttft_p99_ms
    assert hedged.tokens <= 1.05 * without.tokens
    assert hedged.on_time >= without.on_time and hedged.won > 0


def test_there_are_no_second_attempts_in_an_overload():
    calm = hedging.run(800, load=0.5, slow=10.0, share=1.0)
    overloaded = hedging.run(800, load=3.0, slow=10.0, share=1.0)
    assert calm.seconds >= 10
    assert overloaded.seconds <= calm.seconds / 2  # those before the overload shows
