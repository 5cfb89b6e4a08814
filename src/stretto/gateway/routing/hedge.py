"""When a second attempt of a request is worth its price. Pure.

The decision uses how wrong the predictions have been: the ratios of real to predicted time to first token.
Dean and Barroso, The tail at scale, CACM 2013, hedge after a fixed quantile; here the deadline decides.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from math import inf

REMEMBERED = 256
FEW = 20  # fewer ratios say nothing, so nothing is hedged


class Errors:
    """The last ratios of real to predicted time to first token."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, predicted_s: float, real_s: float) -> None:
        """Learns from a request whose first token came."""
        if predicted_s <= 0 or predicted_s == inf:
            return
        ratio = real_s / predicted_s
        self._recent.append(ratio)
        insort(self._sorted, ratio)
        if len(self._recent) > REMEMBERED:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]

    def miss_chance(self, predicted_s: float, limit_s: float, waited_s: float) -> float:
        """The chance that the first token comes after `limit_s`, when it has not come after `waited_s`."""
        ratios = self._sorted
        if len(ratios) < FEW or predicted_s <= 0:
            return 0.0
        left = len(ratios) - bisect_right(ratios, waited_s / predicted_s)
        # One more than was seen: a wait longer than all before is a sign of trouble.
        return (len(ratios) - bisect_right(ratios, limit_s / predicted_s) + 1) / (left + 1)

    def wait_before(self, predicted_s: float, limit_s: float, bound: float) -> float:
        """The shortest wait, in seconds, after which the chance of a miss exceeds `bound`; inf for never."""
        if len(self._sorted) < FEW or predicted_s == inf:
            return inf
        for ratio in (0.0, *self._sorted):
            waited = ratio * predicted_s
            if waited < limit_s and self.miss_chance(predicted_s, limit_s, waited) > bound:
                return waited
        return inf


class HedgeBudget:
    """At most `share` of the requests may be hedged; a short burst may use what was saved up."""

    def __init__(self, share: float, most: float = 10.0) -> None:
        self.share = share
        self._most = most
        self._saved = 0.0

    def earn(self) -> None:
        """A request has come."""
        self._saved = min(self._saved + self.share, self._most)

    def spend(self) -> bool:
        """Takes one hedge from the budget; False when it is empty."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True
