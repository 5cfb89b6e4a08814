"""What several gateways gave out together, in the Redis that they share.

Twice a second a gateway writes what it gave out of each budget that it was asked for, and reads what all gave
out; no request waits for that. Rates are divided by the gateways that are there. While Redis is away each
gateway counts alone, from what it last heard, and says so.
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
ALIVE_S = 5  # a gateway that was not heard of for so long is gone
REST_S = 60.0  # a budget that nobody asked for so long is not looked up, until somebody does
KEPT_S = 86_400  # a budget's total is kept for so long after its window
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
    """What this gateway gave out of one budget in one window."""

    name: str
    meter: BudgetMeter
    spent: float
    window: CalendarWindow | None


class SharedSpending:
    """The totals of all gateways with the same `gateway_key`. `gateways`: how many are there."""

    def __init__(self, url: str, gateway_key: str) -> None:
        """Raises StartError for a wrong URL, or without the package."""
        self.gateways = 1
        self.error = ""  # why the last exchange failed
        self._client = cast(BatchClient, connect(url).client)
        self._prefix = f"stretto:limits:{sha256(b'limits ' + gateway_key.encode()).hexdigest()[:16]}"
        self._me = token_hex(8)

    async def exchange(self, asked: dict[str, BudgetMeter], wall: float) -> bool:
        """Tells what these meters gave out, tells them what others did, and removes those that rest.

        `wall`: seconds since 1970. Returns False when Redis is away.
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
            self.error = "Redis is away, so this gateway counts limits alone"
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
        """Leaves the gateways that are there."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._client.zrem(f"{self._prefix}:gateways", self._me)
                await self._client.aclose()
        except Exception as error:
            log.debug("leaving Redis failed: %s", type(error).__name__)

    async def _totals(self, parts: list[Part]) -> list[float]:
        """Sets what this gateway gave out, and sums up what all did. To do it twice does no harm."""
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
