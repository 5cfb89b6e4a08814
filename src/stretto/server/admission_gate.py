"""The admission gate: how many sequences may wait for their first token before more are refused."""

from __future__ import annotations

import time
from collections.abc import Callable

from stretto.errors import Overloaded


class Gate:
    """The bound on sequences that wait for their first token, and how long one more would wait."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.waiting = 0
        self._limit = limit
        self._clock = clock
        self._last = 0.0
        self._interval = 0.0

    def check(self, count: int) -> None:
        """Raises Overloaded, with the seconds after which half the queue will have gone."""
        if self.waiting + count > self._limit:
            wait = min(60.0, max(1.0, self.waiting / 2 * self._interval))
            raise Overloaded(
                f"{self.waiting} requests wait already, of {self._limit} at most; try again later",
                retry_after=wait,
            )

    def enter(self) -> None:
        if self.waiting == 0:
            self._last = self._clock()
        self.waiting += 1

    def leave(self, *, served: bool) -> None:
        """One waits no more; `served` when its first token came."""
        self.waiting -= 1
        if served:
            now = self._clock()
            interval, self._last = now - self._last, now
            self._interval += 0.1 * (interval - self._interval)
