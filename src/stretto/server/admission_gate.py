"""The admission gate: whether a request may start now, and how many may wait for their first token."""

from __future__ import annotations

import time
from collections.abc import Callable

from stretto.errors import Draining, Overloaded, Unavailable

START_S = 2.0
LONGEST_WAIT_S = 60.0


class AdmissionGate:
    """Limits the sequences that wait for their first token. A request asks once, through `reserve`.

    `limit`: sequences that may wait at once; `drain_s`: seconds that a shutdown may take; `unavailable`: the
    error while the engine takes no requests, else None; `clock`: monotonic seconds.
    """

    def __init__(
        self,
        limit: int,
        drain_s: float = 0.0,
        unavailable: Callable[[], Unavailable | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.waiting = 0
        self.draining = False
        self._limit = limit
        self._drain_s = drain_s
        self._unavailable = unavailable
        self._clock = clock
        self._last_first_token = 0.0
        self._interval = 0.0

    def close(self) -> None:
        """Refuses every request from now on: the server is shutting down."""
        self.draining = True

    def ensure_open(self) -> None:
        """Raises Draining during a shutdown, and Unavailable or EngineStalled while the engine takes no
        requests, with the reason."""
        if self.draining:
            raise Draining("the server is shutting down; ask another one", retry_after=self._drain_s)
        problem = self._unavailable()
        if problem is not None:
            raise problem

    def reserve(self, count: int) -> Slot:
        """Admits `count` sequences. Use the slot in a `with` block: it gives back what is left of it.

        Raises Draining, Unavailable, or Overloaded if too many sequences wait. Overloaded says after how many
        seconds half of them will have started, at the present rate of first tokens.
        """
        self.ensure_open()
        if self.waiting + count > self._limit:
            wait = min(LONGEST_WAIT_S, max(1.0, self.waiting / 2 * self._interval))
            raise Overloaded(
                f"{self.waiting} sequences are waiting and {self._limit} may wait; try again later",
                retry_after=wait,
            )
        if self.waiting == 0:
            self._last_first_token = self._clock()
        self.waiting += count
        return Slot(self, count)

    def leave(self, count: int) -> None:
        """For `Slot`: `count` sequences no longer wait, and produced nothing."""
        self.waiting -= count

    def first_token(self) -> None:
        """For `Slot`: one sequence no longer waits. Updates the rate of first tokens."""
        self.waiting -= 1
        now = self._clock()
        interval, self._last_first_token = now - self._last_first_token, now
        self._interval += 0.1 * (interval - self._interval)


class Slot:
    """The places of one request in the gate, until each of its sequences has its first token."""

    __slots__ = ("_count", "_gate")

    def __init__(self, gate: AdmissionGate, count: int) -> None:
        self._gate = gate
        self._count = count

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, *_: object) -> None:
        self._gate.leave(self._count)
        self._count = 0

    def first_token(self) -> None:
        """Gives back the place of one sequence, which has its first token now."""
        self._count -= 1
        self._gate.first_token()
