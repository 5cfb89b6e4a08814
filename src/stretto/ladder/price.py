"""What machine time is worth, in quality, while more work comes than the best variants can do.

The most quality that fits into the time is a knapsack with a choice from each request. Its relaxation has one
price: each request takes the variant with the most quality less price times work (P. Sinha and A. Zoltners,
"The multiple-choice knapsack problem", Operations Research 27, 1979). The price is the least one at which as
many requests as came lately fit, beside the work that waits. It knows numbers, and neither queues nor clocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from itertools import islice
from math import inf
from typing import NamedTuple

HORIZON_S = 20.0  # of recent requests
FEWEST = 32  # of them count even if they are older
LONGEST_S = 300.0  # but never for longer than this
KEPT = 256  # requests
SAMPLED = 48  # of them, for one price
EVERY_S = 0.25  # between two prices
FULL = 0.7  # of the time may be taken; the rest is for what cannot be foreseen
SHORT = (8, 32)  # of the last requests count alone, so that a peak is seen at once
FULL_SHORT = 0.85  # of the time for these; beside them the backlog says what was not foreseen
WAITING = 0.15  # of the time until first tokens are due may be spent in the queue
HALF_LIFE_S = 0.5  # in which a price falls by half at the fastest, so that it does not swing
HALVINGS = 10  # of the interval that holds the price


# A variant for one request: what it takes, in ms of the machine's time, and the quality it gives.
WorkOption = tuple[float, float]


class PricedRequest(NamedTuple):
    """A request, as it counts for the price."""

    at: float
    options: Sequence[WorkOption]
    patience_ms: float


class TimePrice:
    """The price of a millisecond, from the requests that came lately and the work that waits."""

    def __init__(self) -> None:
        self._recent: deque[PricedRequest] = deque(maxlen=KEPT)
        self._prices = 0.0, 0.0
        self._share = 0.0  # of the requests that take the lower price
        self._credit = 0.0
        self._set_at = float("-inf")

    def offer(self, now: float, options: Sequence[WorkOption], patience_ms: float = inf) -> None:
        """Record a request and the variants that may answer it. `patience_ms`: how long after its arrival its
        first token is due; inf: never."""
        self._recent.append(PricedRequest(now, options, patience_ms))

    def update(self, now: float, backlog_ms: float = 0.0) -> None:
        """Work the price out again, if that was not done in the last `EVERY_S`. `backlog_ms`: the work that
        waits. It takes up to a millisecond, so no request should wait for it."""
        passed = now - self._set_at
        if passed >= EVERY_S:
            self._set_at = now
            kept = self._prices[1] * 0.5 ** (passed / HALF_LIFE_S) if passed < HORIZON_S else 0.0
            self._prices = self._least(now, backlog_ms)
            if kept > self._prices[1]:
                self._prices = kept, kept

    def value(self) -> float:
        """The price for the next request; 0 while the best variants for all recent requests fit. Where many
        requests would change their variant at one price, only so many do that the rest of the time is used:
        they see a little less than the price."""
        low, high = self._prices
        if low == high:
            return high
        self._credit += self._share
        if self._credit < 1.0:
            return high
        self._credit -= 1.0
        return low

    def _least(self, now: float, backlog_ms: float) -> tuple[float, float]:
        """The largest price at which the recent requests do not fit, and the least one at which they do: the
        highest of the prices for the last few of them and for all."""
        recent = self._recent
        while recent and recent[0].at < now - (HORIZON_S if len(recent) > FEWEST else LONGEST_S):
            recent.popleft()
        count = len(recent)
        if not count:
            return 0.0, 0.0
        span = max(now - recent[0].at, HORIZON_S if count < KEPT else 1e-3)
        found, self._share = _fitting(recent, FULL * 1e3 * span - backlog_ms)
        for few in SHORT:
            if few < count:
                last = list(islice(recent, count - few, None))
                time_ms = FULL_SHORT * 1e3 * (now - last[0].at) + WAITING * _patience_ms(last)
                prices, share = _fitting(last, time_ms - backlog_ms)
                if prices[1] > found[1]:
                    found, self._share = prices, share
        return found


def _patience_ms(requests: Sequence[PricedRequest]) -> float:
    """How long the less patient of these requests can wait for their first token, at most `HORIZON_S`."""
    patience = sorted([each.patience_ms for each in requests])
    return min(patience[len(patience) // 4], 1e3 * HORIZON_S)


def _fitting(requests: Collection[PricedRequest], time_ms: float) -> tuple[tuple[float, float], float]:
    """The prices between which requests begin to fit into this time, and the share that takes the lower."""
    stride = -(-len(requests) // SAMPLED)
    sample = [each.options for each in islice(requests, 0, None, stride)]
    fits = time_ms * len(sample) / len(requests)
    low, high = 0.0, 1.001 * max(_dearest(options) for options in sample)
    more, less = _work(sample, low), _work(sample, high)
    if more <= fits or more <= less:
        return (0.0, 0.0), 0.0
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5 if low else high / 32
        work = _work(sample, middle)
        if work <= fits:
            high, less = middle, work
        else:
            low, more = middle, work
    return (low, high), min(max((fits - less) / (more - less), 0.0), 1.0)


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
        ((more - quality) / (work - light) for work, more in options if work > light),
        default=0.0,
    )
