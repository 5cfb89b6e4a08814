"""Whether a request would be on time if it came now: an answer before any work, from a snapshot.

Pure. It asks the scheduler's own estimate, on numbers that fit in a message, so whoever chooses between
models or machines can ask without asking the engine.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Mapping
from itertools import chain, islice, repeat
from math import inf
from operator import attrgetter, itemgetter
from typing import NamedTuple

import msgspec
from msgspec import Struct

from stretto.config import Tier
from stretto.deadlines import Deadline
from stretto.engine.scheduler.estimate import Estimate, patient
from stretto.engine.scheduler.lateness import ADMITTED, Backlog, Prompt, backlog_of, newcomer, shortfall
from stretto.engine.scheduler.lengths import answer_tokens
from stretto.engine.scheduler.moore_hodgson import Job
from stretto.engine.scheduler.types import SchedulingContext, tier_weight
from stretto.engine.sequence import BEST_EFFORT, SPARE_TIME, TIMED, Sequence
from stretto.types import Request

MAX_PROMPTS = 64
SOONEST_S = 0.05  # the shortest time after which a client is told to try again


class Snapshot(Struct, frozen=True, kw_only=True, array_like=True):
    """An engine's work at `now`. Its size is bounded."""

    now: float
    newest: int  # the id of the newest request that it includes
    estimate: Estimate
    context: int  # keys that a step reads for the streams
    prompts: dict[float, list[Job]]  # by falling weight, then deadline; their work is in ms
    inflow: dict[float, float]  # for each weight, the share of the time that heavier arrivals take
    lengths: dict[str, int]  # tokens of a long answer, by tier
    backlog: Backlog = Backlog()
    worth: dict[str, float] = {}  # of a tenant's prompts, when it is not 0
    patient: Estimate | None = None  # while some prompts would be late; None: as `estimate`


class Forecast(NamedTuple):
    """What would become of a request. Times count from its arrival."""

    queue_ms: float  # until it starts
    ttft_ms: float  # until its first token
    feasible: bool  # whether all of it would be on time
    retry_after: float  # if not, seconds until it would be if nothing else came; inf: never on this machine
    refused_for: float = 0.0  # seconds until it would be admitted although it is late; 0: now

    def refusal(self, request: Request) -> float:
        """The seconds after which to try again if the request is refused; 0 when it is not."""
        if request.objective.on_miss == "reject" and not self.feasible:
            return self.retry_after
        return self.refused_for


class Outlook:
    """What is known of an engine elsewhere: its last snapshot, and what was sent to it since."""

    def __init__(self, tiers: Mapping[str, Tier]) -> None:
        self._tiers = tiers
        self._seen: Snapshot | None = None
        self._sent: list[tuple[int, float, Job]] = []  # id, weight, prompt
        self._now: Snapshot | None = None  # the last snapshot with what was sent since

    @property
    def seen(self) -> Snapshot | None:
        """The last snapshot."""
        return self._seen

    @property
    def sent_since(self) -> list[tuple[int, float, Job]]:
        """The prompts sent since the snapshot: id, weight, and deadline with work. Not to be changed."""
        return self._sent

    @property
    def backlog_ms(self) -> float:
        """The work of all prompts that wait there, as far as they have deadlines."""
        waiting = () if self._seen is None else chain.from_iterable(self._seen.prompts.values())
        return sum(ms for _, ms, _ in waiting) + sum(job[1] for _, _, job in self._sent)

    @property
    def deferred_ms(self) -> float:
        """The work of the prompts that wait there for spare time: late ones, and those without deadlines."""
        return 0.0 if self._seen is None else self._seen.backlog.late_ms + self._seen.backlog.flex_ms

    def prefill_ms(self, tokens: int, cached: int = 0) -> float:
        """The work of a prompt of so many tokens after the cached ones; 0 before the first snapshot."""
        return 0.0 if self._seen is None else self._seen.estimate.cost.prefill(cached, tokens - cached)

    def see(self, seen: Snapshot) -> None:
        """Take over a snapshot, and keep only what was sent after it."""
        self._seen, self._now = seen, None
        self._sent = [one for one in self._sent if one[0] > seen.newest]

    def sent(self, request: Request) -> None:
        """Record that a request is on its way to the engine."""
        first_deadline, seen = Deadline.of(request.arrival, request.objective).of_token(0), self._seen
        if seen is not None and first_deadline < inf and len(self._sent) < MAX_PROMPTS:
            ms = seen.estimate.cost.prefill(request.cached, len(request.prompt) - request.cached)
            weight, job = tier_weight(self._tiers, request.tier), (first_deadline, ms, ADMITTED)
            self._sent.append((request.id, weight, job))
            if self._now is not None and weight in self._now.prompts:
                insort(self._now.prompts[weight], job, key=_deadline)
            else:
                self._now = None

    def forecast(self, request: Request, now: float) -> Forecast | None:
        """What would become of the request if it were sent now; None before the first snapshot."""
        seen = self._seen
        if seen is None:
            return None
        if self._sent and self._now is None:
            prompts = {weight: list(jobs) for weight, jobs in seen.prompts.items()}
            for _, weight, job in self._sent:
                insort(prompts.setdefault(weight, []), job, key=_deadline)
            self._now = msgspec.structs.replace(seen, prompts=dict(sorted(prompts.items(), reverse=True)))
        current = self._now if self._sent and self._now is not None else seen
        return predict(request, current, tier_weight(self._tiers, request.tier), now)

    def work_ms(self, request: Request) -> float:
        """The machine time that a request is predicted to take, with its share of each step's base.

        0 before the first snapshot.
        """
        seen = self._seen
        if seen is None:
            return 0.0
        cost, length = seen.estimate.cost, len(request.prompt)
        tokens = answer_tokens(request, seen.lengths.get(request.tier, 1))
        base = cost.base / (seen.estimate.streams + 1)
        prefill = cost.prefill(request.cached, length - request.cached)
        return prefill + tokens * (base + cost.row(length + tokens // 2))


def snapshot(context: SchedulingContext, newest: int) -> Snapshot:
    """What `predict` needs to know of an engine that has had the requests up to id `newest`."""
    history, queues, limits = context.history, context.queues, context.limits
    prompts, streams = list[tuple[Sequence, int]](), list[tuple[Deadline, int]]()
    cost, keys, load, itl_s = history.times.cost, 0, 0.0, inf
    for seq in queues.running:
        deadline = seq.deadline
        if seq.rank.group != TIMED or deadline.late:
            continue
        if not deadline.emitted:
            prompts.append((seq, 1))
            continue
        streams.append((deadline, seq.length))
        keys += seq.length
        load += cost.row(seq.length) / deadline.target_itl_s
        itl_s = min(itl_s, deadline.target_itl_s)
    behind = bisect_left(queues.waiting, (BEST_EFFORT,), key=_rank)
    spare = bisect_left(queues.waiting, (SPARE_TIME,), key=_rank)
    started = len(prompts)
    prompts += _some([seq for seq in islice(queues.waiting, behind) if seq.deadline.next < inf])
    worth = history.fairness.worth()
    jobs: dict[float, list[Job]] = {weight: [] for weight in limits.weights}
    for seq, count in sorted(prompts, key=lambda one: one[0].deadline.next):
        ms = cost.prefill(seq.done, seq.length - seq.done) * count
        value = ADMITTED + worth.get(seq.request.tenant, 0.0)
        jobs[tier_weight(limits.tiers, seq.request.tier)].append((seq.deadline.next, ms, value))
    estimate = Estimate(
        cost=cost,
        margin=history.times.margin,
        streams=len(streams),
        itl_ms=itl_s * 1e3,
        load=load / 1e3,
        elsewhere=context.elsewhere,
    )
    estimate = context.with_places(estimate, started, context.place_waits(MAX_PROMPTS))
    return Snapshot(
        now=context.now,
        newest=newest,
        estimate=estimate,
        context=keys,
        prompts=jobs,
        inflow=history.arrivals.above_each(limits.weights),
        backlog=backlog_of(
            context, queues.waiting[behind : min(spare, behind + MAX_PROMPTS)], spare - behind
        ),
        worth=dict(islice(worth.items(), MAX_PROMPTS)),
        lengths={name: history.lengths.predict(name) for name in limits.tiers},
        patient=patient(estimate, streams, context.now)[0] if estimate.stretches else None,
    )


def _some(waiting: list[Sequence]) -> Iterator[tuple[Sequence, int]]:
    """At most `MAX_PROMPTS` of the sequences, in order, each with how many it stands for.

    If there are more, those that go first stand for themselves, and each of some others for several.
    """
    if len(waiting) <= MAX_PROMPTS:
        yield from zip(waiting, repeat(1))
        return
    yield from zip(waiting[: MAX_PROMPTS // 2], repeat(1))
    others = waiting[MAX_PROMPTS // 2 :]
    count = -(-len(others) // (MAX_PROMPTS // 2))
    for begin in range(0, len(others), count):
        same = others[begin : begin + count]
        yield same[len(same) // 2], len(same)


def predict(request: Request, seen: Snapshot, weight: float, now: float) -> Forecast:
    """What would become of a request in a tier of this weight if it were sent `now`.

    It is feasible when the scheduler would not defer it, the streams would keep their pace, and a long answer
    would be on time as a whole.
    """
    estimate, length = seen.estimate, len(request.prompt)
    deadline = Deadline.of(request.arrival, request.objective)
    cost, itl_ms, heavier = estimate.cost, deadline.itl_s * 1e3, seen.inflow.get(weight, 0.0)
    prefill_ms, first_deadline = cost.prefill(request.cached, length - request.cached), deadline.of_token(0)
    own_ms = prefill_ms + cost.base  # it may wait for a step, so of equals it is deferred first
    # Lighter prompts cannot delay it, so they are left out.
    groups = {other: jobs for other, jobs in seen.prompts.items() if other > weight}
    jobs = seen.prompts.get(weight, [])
    place = bisect_right(jobs, first_deadline, key=_deadline)
    own: Job = (first_deadline, own_ms, seen.worth.get(request.tenant, 0.0))
    groups[weight] = [*jobs[:place], own, *jobs[place:]]
    deferral = estimate.defer(groups, lambda weight: seen.inflow.get(weight, 0.0), now, itl_ms)
    if deferral.late_by and seen.patient is not None:
        estimate = seen.patient
        deferral = estimate.defer(groups, lambda weight: seen.inflow.get(weight, 0.0), now)
    same = deferral.groups[weight]
    first = sum(map(len, groups.values())) - len(groups[weight])
    ahead = sum(ms for index, (_, ms, _) in enumerate(jobs[:place], first) if index not in deferral.late_by)
    start = same.start + ahead / same.flow
    first_token = start + own_ms / same.pace
    step_s = cost.decodes(estimate.streams + 1, seen.context + length) / 1e3
    last_token = first_token + (answer_tokens(request, seen.lengths.get(request.tier, 1)) - 1) * step_s
    excess = max(
        deferral.late_by.get(first + place, 0.0),
        first_token - first_deadline,
        last_token - deadline.whole,
        0.0,
    )
    alone = not estimate.streams and not any(seen.prompts.values())
    if not alone and not estimate.bears(length, itl_ms, heavier):
        excess = max(excess, SOONEST_S)
    retry_after = refused_for = 0.0
    if excess > 0:
        retry_after = inf if now + prefill_ms / 1e3 > first_deadline else max(excess, SOONEST_S)
    on_miss = request.objective.on_miss
    if on_miss != "late" and not (on_miss == "reject" and retry_after):
        prompt = Prompt(prefill_ms, request.arrival, first_deadline, weight, ahead)
        asked = newcomer(prompt, deferral, deferral.late_by.get(first + place, 0.0), seen.backlog, now)
        refused_for = shortfall(asked, seen.backlog)
    return Forecast(
        queue_ms=(start - request.arrival) * 1e3,
        ttft_ms=(first_token - request.arrival) * 1e3,
        feasible=excess <= 0,
        retry_after=retry_after,
        refused_for=refused_for,
    )


_deadline = itemgetter(0)
_rank = attrgetter("rank")
