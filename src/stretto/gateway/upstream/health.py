"""Whether a worker may get requests: a circuit breaker with slow start. Pure; the clock is an argument.

The states are those of Nygard's circuit breaker (Release It!, 2007): closed, open, half open.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

FAILURES = 3  # in a row open the breaker
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0
SLOW_START_S = 5.0
LEAST_WEIGHT = 0.1
BreakerState = Literal["closed", "open", "half-open"]


@dataclass(slots=True)
class Breaker:
    """Opens after FAILURES in a row, or at once when the worker is lost. Then it lets one request through
    after a pause, which doubles with each failure. A success closes it, and the load rises over SLOW_START_S.
    """

    failures: int = 0
    pause: float = 0.0
    opened: float = -inf
    closed: float = -inf  # when it closed again
    trying: bool = False

    def state(self, now: float) -> BreakerState:
        """What it lets through at `now`."""
        if not self.pause:
            return "closed"
        return "open" if self.trying or now < self.opened + self.pause else "half-open"

    def try_one(self, now: float) -> None:
        """A request goes to the worker. While half open it is the only one."""
        self.trying = self.state(now) == "half-open"

    def weight(self, now: float) -> float:
        """The share of its usual load that the worker may get."""
        return min(1.0, LEAST_WEIGHT + (1.0 - LEAST_WEIGHT) * (now - self.closed) / SLOW_START_S)

    def succeed(self, now: float) -> None:
        """The worker has answered."""
        if self.pause:
            self.closed = now
        self.failures, self.pause, self.trying = 0, 0.0, False

    def fail(self, now: float, *, lost: bool = False) -> None:
        """The worker has failed. `lost`: it cannot be reached, so the breaker opens at once."""
        self.failures += 1
        self.trying = False
        if lost or self.failures >= FAILURES:
            self.pause = min(max(2 * self.pause, FIRST_PAUSE_S), LONGEST_PAUSE_S)
            self.opened = now
