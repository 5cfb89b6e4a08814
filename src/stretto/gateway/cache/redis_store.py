"""Kept answers in a Redis that several gateways share. It needs the extra `redis`.

Each value carries an HMAC over its key and its bytes, so that a value that is not ours, or not of this key,
is no answer. While Redis is gone or slow, gateways answer without it; now and then a call tries it again.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import import_module
from typing import NamedTuple, Protocol, TypeVar, cast

from stretto.errors import StartError, Unavailable
from stretto.gateway.cache.memory import Keeping
from stretto.gateway.cache.stats import CacheStats

log = logging.getLogger(__name__)
T = TypeVar("T")
TIMEOUT_S = 0.05  # of a call for an answer: a worker is not much slower
ERASE_S = 10.0
PAUSE_S = 1.0  # without calls after one that failed
MAC_BYTES = 16
ANSWER, ABOUT = b"stretto:answer:", b"stretto:about:"


class RedisClient(Protocol):
    """What is used of redis.asyncio.Redis."""

    def get(self, name: bytes) -> Awaitable[object]: ...
    def set(self, name: bytes, value: bytes, *, px: int) -> Awaitable[object]: ...
    def sadd(self, name: bytes, *values: bytes) -> Awaitable[object]: ...
    def pexpire(self, name: bytes, time: int, *, gt: bool = False, nx: bool = False) -> Awaitable[object]: ...
    def smembers(self, name: bytes) -> Awaitable[object]: ...
    def unlink(self, *names: bytes) -> Awaitable[object]: ...
    def scan_iter(self, match: bytes, count: int) -> AsyncIterator[bytes]: ...
    def aclose(self) -> Awaitable[object]: ...


class Connected(NamedTuple):
    """A client, and the errors that a Redis which is well answers to a call that it refuses."""

    client: RedisClient
    refused: type[Exception]


def connect(url: str) -> Connected:
    """A client of the Redis at that URL. Connects at the first call. Raises StartError for a wrong URL, or
    without the package."""
    try:
        redis, errors = import_module("redis.asyncio"), import_module("redis.exceptions")
    except ImportError:
        raise StartError("redis needs the package redis: pip install stretto[redis]") from None
    try:
        client = redis.Redis.from_url(
            url, socket_timeout=ERASE_S, socket_connect_timeout=TIMEOUT_S, max_connections=64
        )
    except ValueError as error:
        raise StartError(f"redis: {url!r} is no URL of a Redis: {error}") from None
    return Connected(cast(RedisClient, client), errors.ResponseError)


class RedisStore:
    """The answers of all tenants, in Redis. Its own `maxmemory` and policy bound the memory; the budget of a
    tenant only bounds the size of one answer."""

    def __init__(
        self,
        connected: Connected,
        secret: bytes,
        stats: CacheStats,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis, self._refused = connected
        self._secret = secret
        self._stats = stats
        self._clock = clock
        self._again = 0.0  # when the next call may try
        stats.shared = "ok"

    async def get(self, tenant: bytes, key: bytes) -> bytes | None:
        """The value of a key; None when there is none, or none that is whole, or no Redis."""
        name = _name(tenant, key)
        raw = await self._try(lambda: self._redis.get(name))
        if not isinstance(raw, bytes) or len(raw) < MAC_BYTES:
            return None
        mac, value = raw[:MAC_BYTES], raw[MAC_BYTES:]
        return value if hmac.compare_digest(mac, self._mac(name, value)) else None

    async def put(self, tenant: bytes, key: bytes, value: bytes, keeping: Keeping) -> bool:
        """Keeps a value; False for one that is too large, or without Redis."""
        if len(value) > keeping.budget // 8:
            return False
        name, ttl_ms = _name(tenant, key), max(1, int(keeping.ttl * 1e3))

        async def store() -> bool:
            # The index first: a value that is not in it could not be erased.
            for subject in keeping.subjects:
                about = _about(tenant, subject)
                await self._redis.sadd(about, name)
                await self._redis.pexpire(about, ttl_ms, nx=True)
                await self._redis.pexpire(about, ttl_ms, gt=True)
            return bool(await self._redis.set(name, self._mac(name, value) + value, px=ttl_ms))

        return bool(await self._try(store))

    async def erase(self, tenant: bytes, subject: bytes | None) -> int:
        """Deletes a tenant's answers about a subject, or all. Raises Unavailable if it is not confirmed."""
        try:
            async with asyncio.timeout(ERASE_S):
                if subject is not None:
                    about = _about(tenant, subject)
                    found = await self._redis.smembers(about)
                    names = [name for name in cast("set[object]", found) if isinstance(name, bytes)]
                    erased = await self._unlink(names)
                    await self._redis.unlink(about)
                    return erased
                erased = 0
                for prefix, counts in ((ANSWER, True), (ABOUT, False)):
                    names = [
                        name
                        async for name in self._redis.scan_iter(prefix + tenant.hex().encode() + b":*", 500)
                    ]
                    gone = await self._unlink(names)
                    erased += gone if counts else 0
                return erased
        except Exception as error:
            self._failed(error)
            raise Unavailable(
                "Redis did not confirm the erasure; send the request again", retry_after=PAUSE_S
            ) from None

    async def close(self) -> None:
        """Closes the connections. The answers stay for the other gateways."""
        await self._redis.aclose()

    async def _unlink(self, names: Sequence[bytes]) -> int:
        erased = 0
        for start in range(0, len(names), 500):
            erased += cast(int, await self._redis.unlink(*names[start : start + 500]))
        return erased

    async def _try(self, call: Callable[[], Awaitable[T]]) -> T | None:
        """The result of a call; None when it fails or takes too long, or right after such a one."""
        now = self._clock()
        if now < self._again:
            return None
        if self._stats.shared == "gone":
            self._again = now + PAUSE_S  # this call alone tries
        try:
            async with asyncio.timeout(TIMEOUT_S):
                result = await call()
        except self._refused as error:  # as when its memory is full
            self._stats.shared_failures += 1
            log.debug("the shared cache refused a call: %s", error)
            return None
        except Exception as error:  # whatever it sends or breaks, the answer comes from a worker
            self._failed(error)
            return None
        if self._stats.shared == "gone":
            log.warning("the shared cache is back")
            self._stats.shared, self._again = "ok", 0.0
        return result

    def _failed(self, error: Exception) -> None:
        self._stats.shared_failures += 1
        self._again = self._clock() + PAUSE_S
        if self._stats.shared != "gone":
            self._stats.shared = "gone"
            log.warning(
                "the shared cache is gone, and answers come without it: %s", error or type(error).__name__
            )

    def _mac(self, name: bytes, value: bytes) -> bytes:
        return hmac.digest(self._secret, name + b"\0" + value, "sha256")[:MAC_BYTES]


def _name(tenant: bytes, key: bytes) -> bytes:
    return ANSWER + tenant.hex().encode() + b":" + key.hex().encode()


def _about(tenant: bytes, subject: bytes) -> bytes:
    return ABOUT + tenant.hex().encode() + b":" + subject.hex().encode()
