"""What became of a load, as its clients saw it: the outcome of each request, and the report over all of them.

A replay in virtual time and one against a real server share it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from msgspec import Struct

from stretto.config import Tier
from stretto.deadlines import Deadline
from stretto.statistics import Spread, spread
from stretto.types import Objective, Reason, Request

ANSWERED = (Reason.STOP, Reason.LENGTH)


class TierReport(Struct, frozen=True, kw_only=True):
    """What became of a tier's requests.

    Rates are per second of the arrivals. What ended after the last arrival does not count in them.
    """

    sent: int
    on_time: int  # with those that have no objective and were answered
    attainment: float
    goodput: float  # requests on time, per second
    completed: float  # requests answered, per second
    tokens: float  # of answered requests, per second
    refused: int
    overdue: int
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    longest_gap_ms: float  # between two tokens of a request that was on time


class ReplayReport(Struct, frozen=True, kw_only=True):
    """A replay. `tiers` has two more entries: `timed`, all requests with an objective, and `all`.

    What a real server does not tell is None.
    """

    schedule: str
    load: float
    rate: float  # arrivals per second
    capacity: float  # arrivals per second at load 1.0
    duration_s: float  # to the last arrival
    drained_s: float  # to the last end
    tokens: int
    wasted: float  # share of the tokens computed for requests that had an objective and were not on time
    weighted_goodput: float  # each request counts as much as its tier weighs
    tiers: dict[str, TierReport]
    steps: int | None = None
    preemptions: int | None = None
    model_error: float | None = None
    best_goodput: dict[str, float] = {}  # what no schedule exceeds; shared prefixes are not considered
    server: str | None = None  # the address of a real server
    objectives: dict[str, Objective] = {}  # of each tier
    errors: dict[str, int] = {}  # failures of a real server, by kind


@dataclass(slots=True)
class RequestOutcome:
    """What the client of one request has seen, judged apart from the engine's own deadlines."""

    request: Request
    deadline: Deadline
    first: float = inf  # when the first token came
    last: float = inf  # when the latest token or the end came
    reason: Reason | None = None
    gaps: array[float] = field(default_factory=lambda: array("f"))  # between tokens, ms
    processed: int = 0  # tokens computed

    @classmethod
    def of(cls, request: Request) -> RequestOutcome:
        """The outcome of a request of which nothing has been seen yet."""
        return cls(request, Deadline.of(request.arrival, request.objective))

    @property
    def good(self) -> bool:
        """Whether it was answered and no token was late."""
        return not self.deadline.late and self.reason in ANSWERED

    @property
    def count(self) -> int:
        """Tokens seen."""
        return self.deadline.emitted

    def on_token(self, now: float) -> None:
        """Record one more token."""
        if self.count:
            self.gaps.append((now - self.last) * 1e3)
        else:
            self.first = now
        self.last = now
        self.deadline.emit(now)


def by_tier(outcomes: Sequence[RequestOutcome], tiers: Iterable[str], end: float) -> dict[str, TierReport]:
    """The report of each tier, of all requests with an objective, and of all. `end`: of the arrivals."""
    groups = {name: [one for one in outcomes if one.request.tier == name] for name in tiers}
    groups |= {"timed": [one for one in outcomes if one.request.objective.timed], "all": list(outcomes)}
    return {name: _tier_report(group, end) for name, group in groups.items()}


def weighted(reports: Mapping[str, TierReport], tiers: Mapping[str, Tier]) -> float:
    """Goodput in which each request counts as much as its tier weighs."""
    return sum(tier.weight * reports[name].goodput for name, tier in tiers.items())


def wasted(outcomes: Sequence[RequestOutcome]) -> float:
    """The share of the computed tokens for requests that had an objective and were not on time."""
    total = sum(one.processed for one in outcomes)
    lost = sum(one.processed for one in outcomes if one.request.objective.timed and not one.good)
    return lost / total if total else 0.0


def _tier_report(group: Sequence[RequestOutcome], end: float) -> TierReport:
    good = [one for one in group if one.good]
    begun = [one for one in group if one.count]
    in_time = [one for one in group if one.last <= end and one.reason in ANSWERED]
    span = end or 1.0
    return TierReport(
        sent=len(group),
        on_time=len(good),
        attainment=len(good) / len(group) if group else 1.0,
        goodput=sum(1 for one in good if one.last <= end) / span,
        completed=len(in_time) / span,
        tokens=sum(one.count for one in in_time) / span,
        refused=sum(1 for one in group if one.reason is Reason.REFUSED),
        overdue=sum(1 for one in group if one.reason is Reason.DEADLINE),
        ttft_ms=spread((one.first - one.request.arrival) * 1e3 for one in begun),
        tpot_ms=spread(sum(one.gaps) / len(one.gaps) for one in begun if one.gaps),
        itl_ms=spread(gap for one in begun for gap in one.gaps),
        longest_gap_ms=max((max(one.gaps, default=0.0) for one in good), default=0.0),
    )
