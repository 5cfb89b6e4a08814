"""When a second attempt of a request is worth its work. Pure.

The decision uses how wrong the predictions have been: the ratios of real to predicted time to first token.
Dean and Barroso, The tail at scale, CACM 2013, hedge after a fixed quantile; here the deadline decides.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Collection
from math import ceil, inf

from stretto.gateway.routing.router import Ask, Placement, Router

REMEMBERED = 256
MISS_BOUND = 0.5  # a second attempt starts when a miss is likelier than this
OVERLOAD = 0.1
LATE_SMOOTH = 0.1  # an overload shows within ten requests
SMOOTH = 0.02  # weight of the newest request in averages
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
        ratios = self._sorted
        if len(ratios) < FEW or not 0 < predicted_s < inf:
            return inf
        late = len(ratios) - bisect_right(ratios, limit_s / predicted_s)
        # `miss_chance` exceeds the bound while at most so many ratios exceed that of the wait.
        left = ceil((late + 1) / bound) - 2
        if left < 0:
            return inf
        waited = ratios[-1 - left] * predicted_s if left < len(ratios) else 0.0
        return waited if waited < limit_s else inf


class HedgeBudget:
    """Second attempts may cost at most `share` of the work; a short burst may use what was saved up.

    `most`: how much may be saved, in requests of the usual size.
    """

    def __init__(self, share: float, most: float = 10.0) -> None:
        self.share = share
        self._most = most
        self._saved = 0.0
        self._usual = 0.0

    def earn(self, work: float = 1.0) -> None:
        """A request has come, of so much work."""
        self._usual += SMOOTH * (work - self._usual) if self._usual else work
        self._saved = min(self._saved + self.share * work, self._most * self._usual)

    def spend(self, work: float = 1.0) -> bool:
        """Takes a second attempt from the budget; False when there is too little."""
        if self._saved < work:
            return False
        self._saved -= work
        return True


class Hedges:
    """Decides on second attempts. A request gets one when a miss of its deadline for the first token has
    become likely, and another worker has a short queue; none does in an overload."""

    def __init__(self, share: float) -> None:
        self._errors = Errors()
        self.budget = HedgeBudget(share)
        self._late = 0.0  # share of the requests that no worker could answer in time when they came

    @property
    def overloaded(self) -> bool:
        """Whether so many requests are late that a second attempt would only make others late."""
        return self._late > OVERLOAD

    def placed(self, ask: Ask, placement: Placement) -> None:
        """A request got its first worker."""
        self.budget.earn(len(ask.request.prompt))
        self._late += LATE_SMOOTH * ((not placement.feasible) - self._late)

    def came(self, placement: Placement, ttft_s: float) -> None:
        """The first token came from that worker, so long after the request."""
        self._errors.add(placement.ttft_s, ttft_s)

    def wait(self, ask: Ask, placement: Placement) -> float:
        """Seconds from the request's arrival after which a second attempt may start; inf for never."""
        ttft_ms = ask.request.objective.ttft_ms
        if ttft_ms is None or not placement.feasible:
            return inf
        return self._errors.wait_before(placement.ttft_s, ttft_ms / 1e3, MISS_BOUND)

    def second(
        self, router: Router, ask: Ask, placement: Placement, now: float, avoid: Collection[str]
    ) -> Placement | None:
        """The worker of a second attempt, which is recorded like a first one; None if none is worth it."""
        if self.overloaded:
            return None
        request = ask.request
        able = [
            each for each in router.able(request.model, {placement.worker.name, *avoid}) if each.fresh(now)
        ]
        idle = [
            option
            for option in router.predictions(ask, able, now)
            if option.feasible and option.worker.outlooks[request.model].backlog_ms <= _own_ms(ask, option)
        ]
        best = min(idle, key=lambda option: option.ttft_s, default=None)
        if best is None or not self.budget.spend(len(request.prompt)):
            return None
        router.record(ask, best.worker, best.cached)
        return best


def _own_ms(ask: Ask, option: Placement) -> float:
    return option.worker.outlooks[ask.request.model].prefill_ms(len(ask.request.prompt))
