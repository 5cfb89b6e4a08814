"""Kept answers in a Redis that several gateways share. It needs the extra `redis`.

Each value carries an HMAC over its key and its bytes, so that a value that is not ours, or not of this key,
is no answer. An erasure leaves a tombstone: answers that any gateway began before it are neither kept nor
served. While Redis is gone or slow, gateways answer without it; now and then a call tries it again.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import import_module
from secrets import token_bytes
from typing import NamedTuple, Protocol, TypeVar, cast

from stretto.errors import StartError, Unavailable
from stretto.gateway.cache.memory import Keeping, StoredAnswer
from stretto.gateway.cache.stats import CacheStats

log = logging.getLogger(__name__)
T = TypeVar("T")
TIMEOUT_S = 0.05  # of a call for an answer: a worker is not much slower
ERASE_S = 10.0
PAUSE_S = 1.0  # without calls after one that failed
MAC_BYTES = 16
MARK_BYTES = 8  # of a tombstone
TOMBSTONE_S = 31 * 86_400  # longer than any answer is kept, or takes
ANSWER, ABOUT, ERASED = b"stretto:answer:", b"stretto:about:", b"stretto:erased:"
# Keeps a value unless something was erased meanwhile. The index comes first: a value that is not in it could
# not be erased. KEYS: the value's name, ARGV[4] tombstones, indexes. ARGV: value, milliseconds, fence.
KEEP = """
local last = 1 + tonumber(ARGV[4])
local fence = ''
for i = 2, last do fence = fence .. (redis.call('GET', KEYS[i]) or string.rep('\\0', 8)) end
if fence ~= ARGV[3] then return 0 end
for i = last + 1, #KEYS do
  redis.call('SADD', KEYS[i], KEYS[1])
  redis.call('PEXPIRE', KEYS[i], ARGV[2], 'NX')
  redis.call('PEXPIRE', KEYS[i], ARGV[2], 'GT')
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""


class RedisClient(Protocol):
    """What is used of redis.asyncio.Redis."""

    def mget(self, keys: Sequence[bytes]) -> Awaitable[object]: ...
    def set(self, name: bytes, value: bytes, *, px: int) -> Awaitable[object]: ...
    def eval(self, script: str, numkeys: int, *args: bytes) -> Awaitable[object]: ...
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

    async def look(self, tenant: bytes, key: bytes, subjects: Sequence[bytes]) -> StoredAnswer:
        """The value of a key, if it is whole and nothing of its subjects was erased since it was begun."""
        name = _name(tenant, key)
        raw = await self._try(lambda: self._redis.mget([name, *_tombstones(tenant, subjects)]))
        if not isinstance(raw, list):
            return StoredAnswer(None, None)
        stored, *marks = cast("list[bytes | None]", raw)
        fence = b"".join((mark or b"").ljust(MARK_BYTES, b"\0") for mark in marks)
        if stored is None or len(stored) < MAC_BYTES + len(fence):
            return StoredAnswer(None, fence)
        mac, body = stored[:MAC_BYTES], stored[MAC_BYTES:]
        valid = hmac.compare_digest(mac, self._mac(name, body)) and body.startswith(fence)
        return StoredAnswer(body[len(fence) :] if valid else None, fence)

    async def get(self, tenant: bytes, key: bytes) -> bytes | None:
        """The value of a key that is about nobody; None when there is none, or no Redis."""
        return (await self.look(tenant, key, ())).value

    async def put(self, tenant: bytes, key: bytes, value: bytes, keeping: Keeping) -> bool:
        """Keeps a value; False for one that is too large, after an erasure, or without Redis."""
        if len(value) > keeping.budget // 8:
            return False
        name, ttl_ms = _name(tenant, key), max(1, int(keeping.ttl * 1e3))
        tombstones = _tombstones(tenant, keeping.subjects)
        fence = keeping.fence or bytes(MARK_BYTES * len(tombstones))
        body = fence + value
        keys = [name, *tombstones, *(_about(tenant, subject) for subject in keeping.subjects)]
        values = (self._mac(name, body) + body, b"%d" % ttl_ms, fence, b"%d" % len(tombstones))
        return bool(await self._try(lambda: self._redis.eval(KEEP, len(keys), *keys, *values)))

    async def erase(self, tenant: bytes, subject: bytes | None) -> int:
        """Deletes a tenant's answers about a subject, or all. Raises Unavailable if it is not confirmed."""
        try:
            async with asyncio.timeout(ERASE_S):
                mark = _tombstone(tenant, b"" if subject is None else subject)
                await self._redis.set(mark, token_bytes(MARK_BYTES), px=TOMBSTONE_S * 1000)
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
                "the shared cache is gone, and answers come without it: %s",
                str(error) or type(error).__name__,
            )

    def _mac(self, name: bytes, value: bytes) -> bytes:
        return hmac.digest(self._secret, name + b"\0" + value, "sha256")[:MAC_BYTES]


def _name(tenant: bytes, key: bytes) -> bytes:
    return ANSWER + tenant.hex().encode() + b":" + key.hex().encode()


def _tombstone(tenant: bytes, subject: bytes) -> bytes:
    return ERASED + tenant.hex().encode() + b":" + subject.hex().encode()


def _tombstones(tenant: bytes, subjects: Sequence[bytes]) -> list[bytes]:
    """Those of the whole tenant and of each subject."""
    return [_tombstone(tenant, subject) for subject in (b"", *subjects)]


def _about(tenant: bytes, subject: bytes) -> bytes:
    return ABOUT + tenant.hex().encode() + b":" + subject.hex().encode()
