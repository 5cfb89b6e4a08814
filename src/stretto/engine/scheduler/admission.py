"""Whether a request would be on time if it came now: an answer before any work, from a snapshot.

Pure: the same reckoning as the schedule's, on numbers that fit in a message, so that whoever chooses between
models or machines can ask it without asking the engine.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import islice
from math import inf
from typing import NamedTuple

import msgspec
from msgspec import Struct

from stretto.config import Tier
from stretto.deadlines import Deadline
from stretto.engine.scheduler.deadline import CAUTION, CROWDED, LEAST, reach
from stretto.engine.scheduler.moore_hodgson import Job, tardy_jobs
from stretto.engine.scheduler.types import Limits, Queues, SchedulingContext
from stretto.engine.sequence import TIMED
from stretto.engine.step_time import StepCost
from stretto.types import Request

MOST = 64
SOONEST_S = 0.05


class Ahead(NamedTuple):
    """A prompt that waits or is being read: the weight of its tier, its due, and its work, ms."""

    weight: float
    due: float
    ms: float


class Snapshot(Struct, frozen=True, kw_only=True, array_like=True):
    """An engine's work at `now`, the requests up to id `newest` among it. `load`: the share of the time that
    its streams take at their slowest pace; `gap_ms`: the shortest pause one of them bears; `streams` and
    `context` make its decodes; `inflow`: work above each weight that has come of late, as a share of the
    time; `usual`: tokens of a long answer of each tier."""

    now: float
    newest: int
    cost: StepCost
    margin: float
    load: float
    gap_ms: float
    streams: int
    context: int
    ahead: tuple[Ahead, ...]
    inflow: dict[float, float]
    usual: dict[str, int]


class Forecast(NamedTuple):
    """When a request would start and its first token be out, after its arrival; whether the whole would be on
    time, and if not, after how many seconds it would be, were nothing else to come (inf: never on this
    machine)."""

    queue_ms: float
    ttft_ms: float
    feasible: bool
    retry_after: float


class Outlook:
    """What is known of an engine elsewhere: its last snapshot, and what was sent to it since."""

    def __init__(self, tiers: Mapping[str, Tier]) -> None:
        self._tiers = tiers
        self._seen: Snapshot | None = None
        self._since: list[tuple[int, Ahead]] = []

    def see(self, seen: Snapshot) -> None:
        """The engine's word replaces what was guessed of it."""
        self._seen = seen
        self._since = [(ident, job) for ident, job in self._since if ident > seen.newest]

    def sent(self, request: Request) -> None:
        """One more request is on its way to the engine."""
        due, seen = Deadline.of(request.arrival, request.objective).of_token(0), self._seen
        if seen is not None and due < inf and len(self._since) < MOST:
            job = Ahead(self._weight(request), due, seen.cost.prefill(0, len(request.prompt)))
            self._since.append((request.id, job))

    def forecast(self, request: Request, now: float) -> Forecast | None:
        """What would become of the request if it were sent now; None before the engine has said anything."""
        seen = self._seen
        if seen is None:
            return None
        if self._since:
            ahead = sorted([*seen.ahead, *(job for _, job in self._since)], key=_by_weight)
            seen = msgspec.structs.replace(seen, ahead=tuple(ahead))
        return predict(request, seen, self._weight(request), now)

    def work_ms(self, request: Request) -> float:
        """What the whole request takes of the machine, its part of what its steps cost whatever they hold
        included, as far as one can tell; 0 when nothing is known."""
        seen = self._seen
        if seen is None:
            return 0.0
        length, tokens = len(request.prompt), _tokens(request, seen)
        base = seen.cost.base / (seen.streams + 1)
        return seen.cost.prefill(0, length) + tokens * (base + seen.cost.row(length + tokens // 2))

    def _weight(self, request: Request) -> float:
        tier = self._tiers.get(request.tier)
        return tier.weight if tier else 0.0


def snapshot(queues: Queues, limits: Limits, moment: SchedulingContext, newest: int) -> Snapshot:
    """What `predict` needs to know of an engine that has had the requests up to id `newest`; bounded in
    size."""
    cost = moment.times.cost
    weights = {name: tier.weight for name, tier in limits.tiers.items()}
    timed = [seq for seq in queues.running if seq.rank[0] == TIMED and not seq.deadline.late]
    streams = [seq for seq in timed if seq.deadline.emitted]
    waiting = (seq for seq in queues.waiting if seq.rank[0] <= TIMED and seq.deadline.next < inf)
    prompts = [*(seq for seq in timed if not seq.deadline.emitted), *islice(waiting, MOST)]
    ahead = [
        Ahead(
            weights.get(seq.request.tier, 0.0),
            seq.deadline.next,
            cost.prefill(seq.kv.computed, seq.length - seq.kv.computed),
        )
        for seq in prompts
    ]
    return Snapshot(
        now=moment.now,
        newest=newest,
        cost=cost,
        margin=moment.times.margin,
        load=sum(cost.row(seq.length) / seq.deadline.target_itl_s for seq in streams) / 1e3,
        gap_ms=min((seq.deadline.target_itl_s for seq in streams), default=inf) * 1e3,
        streams=len(streams),
        context=sum(seq.length for seq in streams),
        ahead=tuple(sorted(ahead, key=_by_weight)),
        inflow={weight: moment.ledger.inflow_above(weight) for weight in {*weights.values(), 0.0}},
        usual={name: moment.ledger.expected(name, None) for name in limits.tiers},
    )


def predict(request: Request, seen: Snapshot, weight: float, now: float) -> Forecast:
    """What would become of a request of a tier of this weight that was sent `now`. It is feasible when the
    schedule would not make it give way: its first token in time beside those of its weight and above, its
    streams' pace, and its whole answer (of a usual length for its tier) by `total_ms`."""
    cost, objective = seen.cost, request.objective
    gap = min(inf if objective.itl_ms is None else objective.itl_ms, seen.gap_ms, reach(cost))
    rate = max(1.0 / seen.margin - cost.base / gap - seen.load, LEAST / 10)
    heavier = seen.inflow.get(weight, 0.0)
    pace = max(rate - heavier, LEAST * rate) * (CAUTION if heavier else 1.0) * 1e3
    begin = now + sum(job.ms for job in seen.ahead if job.weight > weight) / pace
    deadline = Deadline.of(request.arrival, request.objective)
    due = deadline.of_token(0)
    own = cost.prefill(0, len(request.prompt)) / pace + cost.base / 1e3
    jobs: list[Job] = [(job.due, job.ms / pace, 0.0) for job in seen.ahead if job.weight == weight]
    place = bisect_right(jobs, (due, inf, 0.0))
    jobs.insert(place, (due, own, 0.0))
    start = begin + sum(seconds for _, seconds, _ in jobs[:place])
    excess = tardy_jobs(jobs, begin).get(place, 0.0)
    rest = _tokens(request, seen) - 1
    excess = max(excess, start + own + rest * _pace(request, seen) / 1e3 - deadline.whole)
    hopeless = now + cost.prefill(0, len(request.prompt)) / 1e3 > due
    if not _bearable(request, seen, heavier):
        excess = max(excess, SOONEST_S)
    after = 0.0 if excess <= 0 else inf if hopeless else max(excess, SOONEST_S)
    queued = (start - request.arrival) * 1e3
    return Forecast(queued, queued + own * 1e3, excess <= 0, after)


def _tokens(request: Request, seen: Snapshot) -> int:
    wanted, usual = request.sampling.max_tokens, seen.usual.get(request.tier, 1)
    return max(usual if wanted is None else min(wanted, usual), 1)


def _pace(request: Request, seen: Snapshot) -> float:
    """Milliseconds between the tokens of this request as one more stream."""
    return seen.cost.decodes(seen.streams + 1, seen.context + len(request.prompt))


def _bearable(request: Request, seen: Snapshot, heavier: float) -> bool:
    itl = request.objective.itl_ms
    if itl is None:
        return True
    base = seen.cost.base / min(itl, seen.gap_ms)
    return base + seen.load + seen.cost.row(len(request.prompt)) / itl < CROWDED / seen.margin - heavier


def _by_weight(job: Ahead) -> tuple[float, float]:
    return -job.weight, job.due
