"""Limits how much work of one kind runs at once and waits, for asyncio. Tenants take turns."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from stretto.errors import Overloaded
from stretto.queueing.round_robin import RoundRobin

LEAST_RETRY_S, MOST_RETRY_S = 1.0, 60.0


class Turns:
    """At most `places` pieces of work run at once, and `limit` wait, of one tenant half as many.

    Work waits for `patience_s` seconds at most. `kind` names the work in errors, as in `long prompts`.
    """

    def __init__(self, kind: str, *, places: int = 1, limit: int = 64, patience_s: float = 10.0) -> None:
        self._kind = kind
        self._free = places
        self._limit = limit
        self._patience_s = patience_s
        self._waiting: RoundRobin[asyncio.Future[None]] = RoundRobin()
        self._mean_s = 0.0

    @property
    def waiting(self) -> int:
        """How many pieces of work wait."""
        return len(self._waiting)

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncGenerator[None]:
        """The block runs in its turn. Raises Overloaded, which says after how many seconds to try again, when
        too much waits or it has waited too long."""
        await self._wait(tenant)
        started = time.monotonic()
        try:
            yield
        finally:
            self._mean_s += 0.2 * (time.monotonic() - started - self._mean_s)
            self._next()

    async def _wait(self, tenant: str) -> None:
        if self._free:
            self._free -= 1
            return
        if len(self._waiting) >= self._limit or self._waiting.owned(tenant) >= self._limit // 2:
            raise self._overloaded(f"{len(self._waiting)} {self._kind} are waiting")
        turn = asyncio.get_running_loop().create_future()
        self._waiting.push(tenant, turn)
        try:
            async with asyncio.timeout(self._patience_s):
                await turn
        except BaseException as error:
            if turn.cancelled():
                self._waiting.discard(lambda waiter: waiter.cancelled())
            else:
                self._next()  # its turn came in the instant in which the wait ended
            if isinstance(error, TimeoutError):
                waited = f"its turn among the {self._kind} did not come within {self._patience_s:g} s"
                raise self._overloaded(waited) from None
            raise

    def _next(self) -> None:
        """Gives the place of work that is over to the next one."""
        while self._waiting:
            turn = self._waiting.pop()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _overloaded(self, why: str) -> Overloaded:
        work_s = len(self._waiting) * self._mean_s
        return Overloaded(
            f"{why}; try again later", retry_after=min(MOST_RETRY_S, max(LEAST_RETRY_S, work_s))
        )
