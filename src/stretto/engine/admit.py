"""Whether a request would be on time if it came now: an answer before any work, from a snapshot.

Pure: the same reckoning as the schedule's, on numbers that fit in a message, so that whoever chooses between
models or machines can ask it without asking the engine.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from msgspec import Struct

from stretto.config import Tier
from stretto.engine.deadline import CAUTION, CROWDED, LEAST, reach
from stretto.engine.feasible import Job, left_out
from stretto.engine.schedule import Limits, Moment, Queues
from stretto.engine.sequence import TIMED
from stretto.engine.steptime import Cost
from stretto.types import Request

MOST = 64
SOONEST_S = 0.05


class Ahead(NamedTuple):
    """A prompt that waits or is being read: the weight of its tier, its due, and its work, ms."""

    weight: float
    due: float
    ms: float


class Snapshot(Struct, frozen=True, kw_only=True):
    """An engine's work at `now`. `load`: the share of the time that its streams take at their slowest pace;
    `gap_ms`: the shortest pause one of them bears; `streams` and `context` make its decodes; `inflow`: work
    above each weight that has come of late, as a share of the time; `usual`: tokens of a long answer."""

    now: float
    cost: Cost
    margin: float
    load: float
    gap_ms: float
    streams: int
    context: int
    ahead: tuple[Ahead, ...]
    inflow: dict[float, float]
    usual: dict[str, int]
    tiers: dict[str, Tier]


class Forecast(NamedTuple):
    """When the first token would be out after arrival, whether the whole would be on time, and if not, after
    how many seconds it would be, were nothing else to come (inf: never on this machine)."""

    ttft_ms: float
    feasible: bool
    retry_after: float


def snapshot(queues: Queues, limits: Limits, moment: Moment) -> Snapshot:
    """What `predict` needs to know of an engine; bounded in size."""
    cost = moment.times.cost
    weights = {name: tier.weight for name, tier in limits.tiers.items()}
    streams = [seq for seq in queues.running if seq.rank[0] == TIMED and not seq.late and seq.spoke < inf]
    reading = [seq for seq in queues.running if seq.rank[0] == TIMED and not seq.late and seq.spoke == inf]
    prompts = reading + [seq for seq in queues.waiting if seq.rank[0] <= TIMED and seq.due < inf][:MOST]
    ahead = [
        Ahead(
            weights.get(seq.request.tier, 0.0), seq.due, cost.prefill(seq.computed, seq.length - seq.computed)
        )
        for seq in prompts
    ]
    return Snapshot(
        now=moment.now,
        cost=cost,
        margin=moment.times.margin,
        load=sum(cost.row(seq.length) / seq.gap for seq in streams) / 1e3,
        gap_ms=min((seq.gap for seq in streams), default=inf) * 1e3,
        streams=len(streams),
        context=sum(seq.length for seq in streams),
        ahead=tuple(sorted(ahead, key=lambda job: (-job.weight, job.due))),
        inflow={weight: moment.ledger.inflow_above(weight) for weight in {*weights.values(), 0.0}},
        usual={name: moment.ledger.expected(name, None) for name in limits.tiers},
        tiers=dict(limits.tiers),
    )


def predict(request: Request, seen: Snapshot) -> Forecast:
    """What would become of a request that came now. It is feasible when the schedule would not make it give
    way: its first token in time beside those of its weight and above, its streams' pace, and its whole answer
    (of a usual length for its tier) by `total_ms`."""
    cost, objective = seen.cost, request.objective
    tier = seen.tiers.get(request.tier)
    weight = tier.weight if tier else 0.0
    gap = min(inf if objective.itl_ms is None else objective.itl_ms, seen.gap_ms, reach(cost))
    rate = max(1.0 / seen.margin - cost.c0 / gap - seen.load, LEAST / 10)
    heavier = seen.inflow.get(weight, 0.0)
    pace = max(rate - heavier, LEAST * rate) * (CAUTION if heavier else 1.0) * 1e3
    begin = seen.now + sum(job.ms for job in seen.ahead if job.weight > weight) / pace
    due, last_due = _dues(request)
    own = cost.prefill(0, len(request.prompt)) / pace
    step = cost.c0 / 1e3
    jobs: list[Job] = [(job.due, job.ms / pace, 0.0) for job in seen.ahead if job.weight == weight]
    jobs = sorted([*jobs, (due, own + step, 0.0)])
    place = jobs.index((due, own + step, 0.0))
    first = begin + sum(seconds for _, seconds, _ in jobs[: place + 1])
    excess = left_out(jobs, begin).get(place, 0.0)
    rest = _tokens(request, seen) - 1
    excess = max(excess, first + rest * _pace(request, seen) / 1e3 - last_due)
    hopeless = seen.now + cost.prefill(0, len(request.prompt)) / 1e3 > due
    if not _bearable(request, seen):
        excess = max(excess, SOONEST_S)
    ttft_ms = (first - request.arrival) * 1e3
    return Forecast(ttft_ms, excess <= 0, 0.0 if excess <= 0 else inf if hopeless else max(excess, SOONEST_S))


def _dues(request: Request) -> tuple[float, float]:
    ttft, total = request.objective.ttft_ms, request.objective.total_ms
    first = inf if ttft is None else request.arrival + ttft / 1e3
    last = inf if total is None else request.arrival + total / 1e3
    return min(first, last), last


def _tokens(request: Request, seen: Snapshot) -> int:
    wanted, usual = request.sampling.max_tokens, seen.usual.get(request.tier, 1)
    return max(usual if wanted is None else min(wanted, usual), 1)


def _pace(request: Request, seen: Snapshot) -> float:
    """Milliseconds between the tokens of this request as one more stream."""
    return seen.cost.decodes(seen.streams + 1, seen.context + len(request.prompt))


def _bearable(request: Request, seen: Snapshot) -> bool:
    itl = request.objective.itl_ms
    if itl is None:
        return True
    base = seen.cost.c0 / min(itl, seen.gap_ms)
    return base + seen.load + seen.cost.row(len(request.prompt)) / itl < CROWDED / seen.margin
