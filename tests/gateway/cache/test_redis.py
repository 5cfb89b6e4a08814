"""Kept answers in a Redis that gateways share: a real one, one that dies, and servers that are none."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from stretto.errors import StartError, Unavailable
from stretto.gateway.cache import redis_store
from stretto.gateway.cache.memory import Keeping
from stretto.gateway.cache.policy import CachePolicy
from stretto.gateway.cache.redis_store import RedisStore, connect
from stretto.gateway.cache.stats import CacheStats
from stretto.gateway.settings import GatewayConfig
from tests.gateway.cache.test_answers import CHAT, WHOLE, cached, settled
from tests.gateway.cluster import cluster, fake
from tests.gateway.redis_server import RedisServer, redis
from tests.server.fake_engine import FakeEngine, info

__all__ = ["redis"]

KEEPING = Keeping(60.0, 1 << 20)
GATEWAY = {"gateway_key": "secret", "caches": {"*": CachePolicy()}}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may need longer than 50 ms for a call of a Redis that is well."""
    monkeypatch.setattr(redis_store, "TIMEOUT_S", 5.0)


@asynccontextmanager
async def store_at(
    url: str, secret: bytes = b"s", clock: Callable[[], float] = time.monotonic
) -> AsyncGenerator[RedisStore]:
    store = RedisStore(connect(url), secret, CacheStats(), clock)
    try:
        yield store
    finally:
        await store.close()


@pytest.mark.usefixtures("patient")
async def test_gateways_with_one_secret_share_answers(redis: RedisServer):
    async with (
        store_at(redis.url) as one,
        store_at(redis.url) as two,
        store_at(redis.url, b"other") as third,
    ):
        assert await one.put(b"ann", b"k", b"answer", KEEPING)
        assert await two.get(b"ann", b"k") == b"answer"
        assert await two.get(b"bob", b"k") is None and await two.get(b"ann", b"l") is None
        assert await third.get(b"ann", b"k") is None
        assert not await one.put(b"ann", b"large", bytes(1 << 18), KEEPING)


@pytest.mark.usefixtures("patient")
async def test_answers_expire_and_are_erased_by_subject_and_tenant(redis: RedisServer):
    async with store_at(redis.url) as store:
        about = KEEPING._replace(subjects=(b"s", b"t"))
        for tenant in (b"ann", b"bob"):
            await store.put(tenant, b"1", b"x", about)
            await store.put(tenant, b"2", b"x", KEEPING._replace(subjects=(b"t",)))
            await store.put(tenant, b"3", b"x", KEEPING)
        assert await store.erase(b"ann", b"s") == 1
        assert await store.erase(b"ann", b"s") == 0
        assert (await store.look(b"ann", b"1", about.subjects)).value is None
        assert (await store.look(b"bob", b"1", about.subjects)).value == b"x"
        assert await store.erase(b"bob", None) == 3 and await store.get(b"bob", b"3") is None
        assert (await store.look(b"ann", b"2", (b"t",))).value == b"x"
        await store.put(b"ann", b"short", b"x", KEEPING._replace(ttl=0.05))
        await asyncio.sleep(0.2)
        assert await store.get(b"ann", b"short") is None


@pytest.mark.usefixtures("patient")
async def test_a_value_that_is_not_ours_is_no_answer(redis: RedisServer):
    client = connect(redis.url).client
    async with store_at(redis.url) as store:
        await store.put(b"ann", b"1", b"one", KEEPING)
        await store.put(b"ann", b"2", b"two", KEEPING)
        first, second = (redis_store._name(b"ann", key) for key in (b"1", b"2"))
        other = await client.get(second)
        assert isinstance(other, bytes)
        for garbage in (b"", b"x", b"\x00" * 64, other, other[:-1], b"y" * (1 << 20)):
            await client.set(first, garbage, px=60_000)
            assert await store.get(b"ann", b"1") is None, garbage[:20]
        await client.unlink(first)
        await client.sadd(first, b"of another type")
        assert await store.get(b"ann", b"1") is None
        assert await store.get(b"ann", b"2") == b"two", "a call that Redis refuses does not stop the others"
    await client.aclose()


@pytest.mark.usefixtures("patient")
async def test_a_redis_that_dies_is_done_without_and_comes_back(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
):
    clock = Clock()
    async with store_at(redis.url, clock=clock) as store:
        await store.put(b"ann", b"1", b"x", KEEPING)
        redis.kill()
        with caplog.at_level(logging.WARNING, "stretto"):
            for _ in range(5):
                assert await store.get(b"ann", b"1") is None
                assert not await store.put(b"ann", b"1", b"x", KEEPING)
                clock.now += 2.0
        assert store._stats.shared == "gone" and store._stats.shared_failures == 5
        assert len(caplog.records) == 1 and "the shared cache is gone" in caplog.text
        with pytest.raises(Unavailable, match="did not confirm the erasure"):
            await store.erase(b"ann", None)
        redis.start()
        clock.now += 2.0
        assert await store.put(b"ann", b"1", b"y", KEEPING) and await store.get(b"ann", b"1") == b"y"
        assert store._stats.shared == "ok" and "the shared cache is back" in caplog.text


@pytest.mark.parametrize(
    "reply", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$999999999\r\n", b"\x00" * 100]
)
async def test_what_hangs_or_is_no_redis_costs_one_short_wait(reply: bytes | None):
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        if reply is not None:
            writer.write(reply)
        await reader.read()  # until the client leaves
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    clock = Clock()
    async with store_at(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}", clock=clock) as store:
        began = time.monotonic()
        for _ in range(50):
            assert await store.get(b"ann", b"1") is None
        assert time.monotonic() - began < 2.0, "fifty waits of 50 ms would take longer"
        assert connections == 1 and store._stats.shared == "gone"
        clock.now += 2.0
        assert await store.get(b"ann", b"1") is None
        assert connections == 2
    server.close()


@pytest.mark.usefixtures("patient")
async def test_two_gateways_share_answers_and_serve_without_redis(checkpoint: Path, redis: RedisServer):
    engine = fake(10, 11)
    async with cluster(checkpoint, engine, redis=redis.url, **GATEWAY) as (client, gateway):
        assert (await client.get("/health")).json()["shared_cache"] == "ok"
        assert cached(await client.post(CHAT, json=WHOLE)) is None
        await settled(gateway)
        async with store_at(redis.url, gateway.answers._store._secret) as other:  # type: ignore[attr-defined]
            (name,) = [name async for name in other._redis.scan_iter(b"stretto:answer:*", 10)]
            tenant, key = (bytes.fromhex(part.decode()) for part in name.split(b":")[2:])
            assert await other.get(tenant, key) is not None
        assert cached(await client.post(CHAT, json=WHOLE)) == "exact"
        assert "stretto_gateway_shared_gone 0.0" in gateway.monitor.metrics.text().decode()
        redis.kill()
        for _ in range(2):
            assert cached(await client.post(CHAT, json=WHOLE)) is None
            await settled(gateway)
        assert "stretto_gateway_shared_gone 1.0" in gateway.monitor.metrics.text().decode()
        assert (await client.get("/health")).json()["shared_cache"] == "gone"
        assert len(engine.requests) == 3
        assert (await client.delete("/v1/cache")).status_code == 503


def test_wrong_settings_of_redis_are_named(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(StartError, match="redis needs gateway_key"):
        GatewayConfig(redis="redis://127.0.0.1")
    with pytest.raises(StartError, match="no URL of a Redis"):
        connect("http://127.0.0.1")
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(StartError, match=r"pip install stretto\[redis\]"):
        connect("redis://127.0.0.1")


@pytest.mark.usefixtures("patient")
async def test_an_erasure_leaves_a_tombstone_for_answers_that_were_begun_before(redis: RedisServer):
    """Of one subject, of another one, of the whole tenant; and a value that the index has lost."""
    async with store_at(redis.url) as one, store_at(redis.url) as other:
        for about, key in (((b"s",), b"1"), ((b"s", b"t"), b"2"), ((b"u",), b"3"), ((), b"4")):
            begun = await other.look(b"ann", key, about)
            keeping = KEEPING._replace(subjects=about, fence=begun.fence)
            await one.erase(b"ann", b"s")
            assert await other.put(b"ann", key, b"old", keeping) is (b"s" not in about)
            fresh = (await other.look(b"ann", key, about)).fence
            assert await other.put(b"ann", key, b"new", keeping._replace(fence=fresh))
            assert (await one.look(b"ann", key, about)).value == b"new"
        begun = await other.look(b"ann", b"5", ())
        assert await one.erase(b"ann", None) == 2
        assert not await other.put(b"ann", b"5", b"old", KEEPING._replace(fence=begun.fence))
        bob = await other.look(b"bob", b"5", (b"s",))
        assert await other.put(b"bob", b"5", b"his", KEEPING._replace(subjects=(b"s",), fence=bob.fence))
        await one._redis.unlink(redis_store._about(b"bob", b"s"))
        assert await one.erase(b"bob", b"s") == 0
        assert (await other.look(b"bob", b"5", (b"s",))).value is None


@pytest.mark.usefixtures("patient")
async def test_an_answer_in_flight_at_another_gateway_is_not_kept_after_an_erasure(
    checkpoint: Path, redis: RedisServer
):
    """One gateway erases a subject while another one waits for an answer about it, and for another answer."""
    gate = asyncio.Event()
    engine = FakeEngine(lambda request: [10, 1.0, 11], {"tiny": info(vocab=600)})
    engine.pause = lambda seconds: gate.wait()
    about, same = WHOLE | {"user": "eve"}, WHOLE | {"user": "sam"}
    async with (
        cluster(checkpoint, engine, redis=redis.url, **GATEWAY) as (client, gateway),
        cluster(checkpoint, fake(10), redis=redis.url, **GATEWAY) as (eraser, _),
    ):
        asked = [asyncio.create_task(client.post(CHAT, json=body)) for body in (about, about, same)]
        async with asyncio.timeout(20):
            while len(engine.requests) < 2:
                await asyncio.sleep(0.01)
        assert (await eraser.delete("/v1/cache?subject=eve")).status_code == 200
        gate.set()
        assert [cached(await each) for each in asked] == [None] * 3
        await settled(gateway)
        assert cached(await client.post(CHAT, json=same)) == "exact"
        assert cached(await eraser.post(CHAT, json=about)) is None


@pytest.mark.usefixtures("patient")
async def test_a_redis_whose_memory_is_full_is_done_without(checkpoint: Path, redis: RedisServer):
    """It refuses to keep, and reading goes on."""
    engine = fake(10, 11)
    async with cluster(checkpoint, engine, redis=redis.url, **GATEWAY) as (client, gateway):
        assert cached(await client.post(CHAT, json=WHOLE)) is None
        await settled(gateway)
        store = gateway.answers._store
        assert isinstance(store, RedisStore)
        for limit in ("maxmemory", "maxmemory-policy"):
            value = {"maxmemory": "1", "maxmemory-policy": "noeviction"}[limit]
            await store._redis.config_set(limit, value)  # type: ignore[attr-defined]
        other = WHOLE | {"seed": 7}
        for _ in range(2):
            assert cached(await client.post(CHAT, json=other)) is None
            await settled(gateway)
        assert cached(await client.post(CHAT, json=WHOLE)) == "exact"
        assert gateway.answers.stats.shared == "ok" and gateway.answers.stats.shared_failures == 2
