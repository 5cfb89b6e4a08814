"""The use of limits that several gateways share, in Redis.

Twice a second a gateway writes how much of each budget it has spent, and reads how much all have spent. No
request waits for that. Rates are divided by the number of running gateways. While Redis cannot be reached,
each gateway counts alone, from the totals that it read last, and reports it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from hashlib import sha256
from math import inf
from secrets import token_hex
from typing import NamedTuple, Protocol, cast

from stretto.gateway.accounts.limits import BudgetMeter, CalendarWindow
from stretto.gateway.cache.redis_store import connect

log = logging.getLogger(__name__)
TIMEOUT_S = 1.0  # of one exchange
ALIVE_S = 5  # a gateway that has not written for this long counts as gone
REST_S = 60.0  # a budget that no request has used for this long is not exchanged
KEPT_S = 86_400  # how long a budget's total is kept after its window
EVER = CalendarWindow(-inf, inf)
FOREVER_S = 10 * 366 * 86_400
# Redis' own clock decides who is there, because those of machines differ.
PRESENT = """
local now = tonumber(redis.call('TIME')[1])
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[2]))
redis.call('EXPIRE', KEYS[1], 60)
return redis.call('ZCARD', KEYS[1])
"""


class CommandBatch(Protocol):
    """Commands of Redis that are sent together."""

    def hset(self, name: str, key: str, value: str) -> object: ...
    def hvals(self, name: str) -> object: ...
    def expireat(self, name: str, when: int) -> object: ...
    def execute(self) -> Awaitable[list[object]]: ...


class BatchClient(Protocol):
    """What is used of redis.asyncio.Redis."""

    def pipeline(self, transaction: bool) -> CommandBatch: ...
    def eval(self, script: str, numkeys: int, *args: str) -> Awaitable[object]: ...
    def zrem(self, name: str, member: str) -> Awaitable[object]: ...
    def aclose(self) -> Awaitable[object]: ...


class Part(NamedTuple):
    """What this gateway has spent of one budget in one window."""

    name: str
    meter: BudgetMeter
    spent: float
    window: CalendarWindow | None


class SharedSpending:
    """The totals of all gateways with the same `gateway_key`. `gateways`: how many are running."""

    def __init__(self, url: str, gateway_key: str) -> None:
        """Raises StartError for a wrong URL, or without the package."""
        self.gateways = 1
        self.error = ""  # why the last exchange failed
        self._client = cast(BatchClient, connect(url).client)
        self._prefix = f"stretto:limits:{sha256(b'limits ' + gateway_key.encode()).hexdigest()[:16]}"
        self._me = token_hex(8)

    async def exchange(self, asked: dict[str, BudgetMeter], wall: float) -> bool:
        """Writes what these meters have spent, sets what others have, and drops those that rest.

        `wall`: seconds since 1970. Returns False when Redis cannot be reached.
        """
        parts = [
            Part(name, meter, meter.spent, meter.window)
            for name, meter in asked.items()
            if meter.window is not None
        ]
        try:
            async with asyncio.timeout(TIMEOUT_S):
                present = await self._client.eval(
                    PRESENT, 1, f"{self._prefix}:gateways", self._me, str(ALIVE_S)
                )
                totals = await self._totals(parts)
        except Exception as error:  # of the client's own kinds, of the network, and the timeout
            if not self.error:
                log.warning("limits are not shared with other gateways: %s", type(error).__name__)
            self.error = "Redis is away or full, so this gateway counts limits alone"
            return False
        self.error = ""
        self.gateways = max(1, int(cast(int, present)))
        for part, total in zip(parts, totals, strict=True):
            if part.meter.window == part.window:
                part.meter.elsewhere = max(0.0, total - part.spent)
                if part.meter.spent == part.spent and wall - part.meter.seen > REST_S:
                    asked.pop(part.name, None)
        return True

    async def close(self) -> None:
        """Removes this gateway from the running ones."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._client.zrem(f"{self._prefix}:gateways", self._me)
                await self._client.aclose()
        except Exception as error:
            log.debug("leaving Redis failed: %s", type(error).__name__)

    async def _totals(self, parts: list[Part]) -> list[float]:
        """Writes what this gateway has spent, and adds up what all have. It may be repeated."""
        if not parts:
            return []
        batch = self._client.pipeline(transaction=False)
        for part in parts:
            start, end = part.window or EVER
            key = f"{self._prefix}:{part.name}:{'ever' if start == -inf else int(start)}"
            batch.hset(key, self._me, repr(part.spent))
            batch.expireat(key, int(part.meter.seen + FOREVER_S if end == inf else end + KEPT_S))
            batch.hvals(key)
        answers = await batch.execute()
        return [sum(map(float, cast("list[bytes]", values))) for values in answers[2::3]]
