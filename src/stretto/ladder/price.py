"""What machine time is worth, in quality, while more work comes than the best variants can do.

The most quality that fits into the time is a knapsack with a choice from each request. Its relaxation has one
price: each request takes the variant with the most quality less price times work (P. Sinha and A. Zoltners,
"The multiple-choice knapsack problem", Operations Research 27, 1979). The price is the least one at which the
recent requests would have fitted. It knows numbers, and neither queues nor clocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

HORIZON_S = 20.0  # of recent requests
FEWEST = 32  # of them count even if they are older
LONGEST_S = 300.0  # but never for longer than this
KEPT = 256  # requests
SAMPLED = 48  # of them, for one price
EVERY_S = 0.25  # between two prices
FULL = 0.7  # of the time may be taken; the rest is for what cannot be foreseen
HALVINGS = 10  # of the interval that holds the price


class WorkOption(NamedTuple):
    """A variant for one request: what it takes, in ms of the machine's time, and the quality it gives."""

    work_ms: float
    quality: float


class TimePrice:
    """The price of a millisecond, from the requests that came lately."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, Sequence[WorkOption]]] = deque(maxlen=KEPT)
        self._prices = 0.0, 0.0
        self._share = 0.0  # of the requests that take the lower price
        self._credit = 0.0
        self._set_at = float("-inf")

    def offer(self, now: float, options: Sequence[WorkOption]) -> None:
        """Record a request and the variants that may answer it."""
        self._recent.append((now, options))

    def update(self, now: float) -> None:
        """Work the price out again, if that was not done in the last `EVERY_S`. It takes up to a millisecond,
        so no request should wait for it."""
        if now >= self._set_at + EVERY_S:
            self._set_at = now
            self._prices = self._least(now)

    def value(self) -> float:
        """The price for the next request; 0 while the best variants for all recent requests fit into
        `FULL` of the time. Where many requests would change their variant at one price, only so many do that
        the rest of the time is used: they see a little less than the price."""
        low, high = self._prices
        if low == high:
            return high
        self._credit += self._share
        if self._credit < 1.0:
            return high
        self._credit -= 1.0
        return low

    def _least(self, now: float) -> tuple[float, float]:
        """The largest price at which the recent requests do not fit, and the least one at which they do."""
        recent = self._recent
        while recent and recent[0][0] < now - (HORIZON_S if len(recent) > FEWEST else LONGEST_S):
            recent.popleft()
        count = len(recent)
        if not count:
            return 0.0, 0.0
        span = max(now - recent[0][0], HORIZON_S if count < KEPT else 1e-3)
        stride = -(-count // SAMPLED)
        sample = [options for _, options in islice(recent, 0, None, stride)]
        fits = FULL * 1e3 * span * len(sample) / count
        low, high = 0.0, 1.001 * max(_dearest(options) for options in sample)
        more, less = _work(sample, low), _work(sample, high)
        if more <= fits or more <= less:
            return 0.0, 0.0
        for _ in range(HALVINGS):
            middle = (low * high) ** 0.5 if low else high / 32
            work = _work(sample, middle)
            if work <= fits:
                high, less = middle, work
            else:
                low, more = middle, work
        self._share = min(max((fits - less) / (more - less), 0.0), 1.0)
        return low, high


def _work(sample: Sequence[Sequence[WorkOption]], price: float) -> float:
    """The machine time of all requests if each takes its best variant at this price, ms."""
    total = 0.0
    for options in sample:
        best, taken = float("-inf"), 0.0
        for work, quality in options:
            worth = quality - price * work
            if worth > best:
                best, taken = worth, work
        total += taken
    return total


def _dearest(options: Sequence[WorkOption]) -> float:
    """A price at which a request takes its lightest variant."""
    light, quality = min(options)
    return max(
        ((other.quality - quality) / (other.work_ms - light) for other in options if other.work_ms > light),
        default=0.0,
    )
