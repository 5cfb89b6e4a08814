"""Whether a worker may get requests: a circuit breaker with slow start. Pure; the clock is an argument.

The states are those of Nygard's circuit breaker (Release It!, 2007): closed, open, half open. Reports, which
come many times a second, try the worker in place of requests.
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
    """Opens after FAILURES in a row, or at once when the worker is lost. When the pause is over, the worker's
    next report closes it. Then the load rises over SLOW_START_S.

    The pause doubles if the worker fails again within SLOW_START_S. All that fails while it is open counts
    once, so a worker that comes back is used soon, however many streams it lost and however long it was away.
    """

    failures: int = 0
    pause: float = 0.0  # the last one
    opened: float = -inf
    closed: float = -inf  # when it closed again
    broken: bool = False  # whether it has not closed since it opened

    def state(self, now: float) -> BreakerState:
        """What it lets through at `now`."""
        if not self.broken:
            return "closed"
        return "open" if now < self.opened + self.pause else "half-open"

    def weight(self, now: float) -> float:
        """The share of its usual load that the worker may get."""
        return min(1.0, LEAST_WEIGHT + (1.0 - LEAST_WEIGHT) * (now - self.closed) / SLOW_START_S)

    def heard(self, now: float) -> None:
        """The worker has reported."""
        if self.state(now) == "half-open":
            self.failures, self.broken, self.closed = 0, False, now

    def succeed(self) -> None:
        """The worker has answered a request."""
        self.failures = 0

    def fail(self, now: float, *, lost: bool = False) -> None:
        """The worker has failed. `lost`: it cannot be reached, so the breaker opens at once."""
        self.failures += 1
        if self.broken or not (lost or self.failures >= FAILURES):
            return
        again = now < self.closed + SLOW_START_S
        self.pause = min(2 * self.pause, LONGEST_PAUSE_S) if again else FIRST_PAUSE_S
        self.opened, self.broken = now, True
