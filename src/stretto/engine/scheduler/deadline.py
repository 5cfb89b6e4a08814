"""The policy that knows deadlines: what the next step runs so that the most requests are on time.

Streams come first. Then come prompts by deadline, except those that must be deferred, and then best-effort
sequences in the time that is left. A step ends before the first stream in it would pause too long, so the
gap between tokens is bounded by construction. `lateness` bounds the wait of all others.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import repeat
from math import inf
from operator import attrgetter, itemgetter

from msgspec import Struct

from stretto.deadlines import Deadline
from stretto.engine.scheduler import spare_time
from stretto.engine.scheduler.estimate import Deferral, Estimate, patient, step_limit
from stretto.engine.scheduler.lateness import (
    ADMITTED,
    FIRST,
    OVERLOAD,
    PAUSE_S,
    Backlog,
    backlog_of,
    beyond_their_limit,
    first_rank,
    gives_way,
    goes_first_at,
    latest_of,
    may_refuse,
    newcomer,
    prompt_of,
    shortfall,
    works_of,
)
from stretto.engine.scheduler.moore_hodgson import Job, tardy_jobs
from stretto.engine.scheduler.plan_builder import PlanBuilder
from stretto.engine.scheduler.types import Plan, Row, SchedulingContext, tier_weight
from stretto.engine.sequence import BEST_EFFORT, SPARE_TIME, TIMED, Rank, Sequence
from stretto.engine.step_time import StepCost

DEPTH = 64  # prompts that a step considers
BEST_EFFORT_SHARE = 0.03  # of all time goes to best-effort sequences that have waited long
PATIENCE_S = 30.0  # they have waited long after this
BREVITY = 5.0  # seconds that a second of work puts a best-effort sequence behind
LATE_S = 300.0  # seconds that a late sequence is put behind
STARTED = 100.0  # the same for one that is partly computed
EASILY = 1.25  # times as long as alone may the rest of a prompt take, and be on time

Placed = tuple[Rank, Sequence]
Late = dict[Sequence, float]  # the seconds by which each would be late
_rank = attrgetter("rank")
_place = itemgetter(0)  # comparing ranks alone takes half of the time


class Running(Struct, eq=False):
    """The running sequences, by what they need. A stream has computed its prompt."""

    streams: list[Sequence] = []  # with a deadline
    deadlines: list[Deadline] = []  # of the streams
    starts: list[int] = []  # the streams' tokens so far
    prompts: list[Placed] = []  # with a deadline, or those that go first
    best_effort: list[Sequence] = []  # streams without one
    partial_prefills: list[Placed] = []  # prompts without one
    tightest: float = inf  # when the first stream must have its token
    shortest_itl_s: float = inf  # the shortest inter-token target of a stream or prompt with a deadline
    load: float = 0.0  # share of the time that the streams take at their slowest pace
    context: int = 0  # keys that a step reads for the streams

    def estimate(self, builder: PlanBuilder) -> Estimate:
        """What the streams leave over for prompts."""
        itl_ms, context = self.shortest_itl_s * 1e3, builder.context
        streams = len(self.streams)
        made = Estimate(builder.cost, builder.margin, streams, itl_ms, self.load, context.elsewhere)
        return context.with_places(made, len(self.prompts), builder.place_waits)


def deadline(context: SchedulingContext) -> Plan:
    """Plan a step so that the most requests are on time. An empty plan: there is nothing to run."""
    builder = PlanBuilder.of(context, timed=True)
    expired = _end_expired(builder)
    prompts, others = _look_at_waiting(builder, expired)
    builder.place_waits = context.place_waits(len(prompts))
    running = _sort_running(builder, expired)
    prompts = sorted(running.prompts + prompts, key=_place)[:DEPTH]
    estimate = running.estimate(builder)
    jobs, heavier = _jobs(builder, prompts), context.history.arrivals.above
    goes_first = bool(prompts) and prompts[0][0].negated_weight == FIRST
    deferral = None if goes_first else estimate.defer(jobs, heavier, context.now)
    pressed = deferral is None or bool(deferral.late_by)
    if running.streams and estimate.stretches and (pressed or _has_waited_long(builder, others[:1])):
        early = zip(running.deadlines, running.starts, strict=True)
        hurried = estimate.rate()
        estimate, running.tightest = patient(estimate, early, context.now)
        if estimate.rate() != hurried:
            deferral = None
    deferral = deferral or estimate.defer(jobs, heavier, context.now)
    deferred = {prompts[index][1]: excess for index, excess in deferral.late_by.items()}
    # Those that admission has let in, and that will be on time, ask for nothing.
    if goes_first or any(seq in deferred or not seq.request.admitted for seq in builder.plan.newcomers):
        prompts, others = _admit(builder, prompts, others, deferral, deferred)
    _run_streams(builder, running, pressed=pressed)
    if context.history.times.saturating and not pressed:
        unread = running.partial_prefills + others
        works = _prompt_works(jobs, unread, builder.cost)
        streams = running.streams + running.best_effort
        builder.spread(streams, [seq for _, seq in prompts + unread], works)
    builder.plan.predicted = builder.ms
    idle = not (prompts or others or running.best_effort or running.partial_prefills)
    if idle and not spare_time.waits(context):
        return builder.plan
    builder.timed_rows = len(builder.plan.rows)
    builder.end = min(builder.end, context.now + step_limit(builder.cost) / 1e3)
    best_effort = running.best_effort + [
        seq for _, seq in sorted(running.partial_prefills + others, key=_place)
    ]
    owed = _owed_now(builder, best_effort)
    owed -= builder.fill(best_effort, min(owed, builder.left_ms / 2))
    _run_prompts(builder, prompts, deferred, estimate)
    put_off = _put_off(builder, prompts, others, estimate, deferral, deferred)
    owed -= builder.fill(best_effort + put_off, inf)
    if spare_time.waits(context):
        spare_time.fill(builder)
    late = {**deferred, **dict(builder.plan.refuse)}
    builder.plan.to_move += [seq for seq in late if _may_move(builder, seq)]
    builder.plan.owed = max(owed, 0.0)
    builder.plan.predicted = builder.ms
    return builder.plan


def _end_expired(builder: PlanBuilder) -> set[Sequence]:
    """Those whose whole answer is overdue: they end, and get no more work."""
    expired: set[Sequence] = set()
    ends, now = builder.context.queues.ends, builder.context.now
    if ends and ends[0][0] <= now:
        expired = {seq for whole, _, seq in ends if whole <= now and not seq.ended}
        builder.plan.end += sorted(expired, key=_rank)
    return expired


def _look_at_waiting(builder: PlanBuilder, expired: set[Sequence]) -> tuple[list[Placed], list[Placed]]:
    """The first waiting sequences with a deadline and without, once newcomers have a rank."""
    waiting, plan = builder.context.queues.waiting, builder.plan
    timed = bisect_left(waiting, (TIMED,), key=_rank)
    best_effort = bisect_left(waiting, (BEST_EFFORT,), key=_rank)
    prompts = [(seq.rank, seq) for seq in waiting[timed : min(best_effort, timed + DEPTH)]]
    spare = bisect_left(waiting, (SPARE_TIME,), key=_rank)
    others = [(seq.rank, seq) for seq in waiting[best_effort : min(spare, best_effort + DEPTH)]]
    builder.waiting, builder.behind = spare, spare - best_effort
    due = builder.context.due
    if due:
        prompts = [one for one in prompts if one[1] not in due]
        others = [one for one in others if one[1] not in due]
        prompts += [(first_rank(seq, builder.cost), seq) for seq in due if seq.slot < 0]
        plan.place += [(seq, rank) for rank, seq in prompts if rank.negated_weight == FIRST and seq in due]
    for seq in waiting[:timed]:
        if seq not in expired and seq not in due:
            rank = _first_rank(builder, seq)
            plan.place.append((seq, rank))
            plan.newcomers.append(seq)
            if rank.group == TIMED:
                prompts.append((rank, seq))
            else:
                others.append((rank, seq))
    if expired:
        prompts = [(rank, seq) for rank, seq in prompts if seq not in expired]
        others = [(rank, seq) for rank, seq in others if seq not in expired]
    return prompts, others


def _first_rank(builder: PlanBuilder, seq: Sequence) -> Rank:
    """The rank of a newcomer. It must start early enough for the whole answer to be on time too."""
    context, deadline, tier = builder.context, seq.deadline, seq.request.tier
    first = deadline.next
    if deadline.whole < inf:
        rest = context.history.lengths.of(seq.request) - seq.output_len
        step_s = builder.cost.decodes(1 + len(context.queues.running), seq.length) / 1e3
        first = min(first, deadline.whole - max(rest, 1) * min(deadline.target_itl_s, step_s))
    if min(first, deadline.target_itl_s) < inf:
        return Rank(TIMED, -tier_weight(context.limits.tiers, tier), first, seq.request.id)
    return _best_effort_rank(builder, seq, seq.request.arrival)


def _best_effort_rank(builder: PlanBuilder, seq: Sequence, since: float) -> Rank:
    """A rank by when the sequence would start if its tenant had the machine alone.

    So many requests of one tenant do not stand before few of another (start-time fair queueing, Goyal et al.,
    SIGCOMM 1996).
    """
    tags, tenant = builder.plan.tags, seq.request.tenant
    work = works_of((seq,), builder.cost)[0] / 1e3
    tag = max(since, tags.get(tenant, builder.context.history.fairness.tags.get(tenant, 0.0)))
    tags[tenant] = tag + work
    behind = BREVITY * work + (LATE_S if seq.deadline.next < inf else 0.0)
    return Rank(BEST_EFFORT, 0.0, tag + behind, seq.request.id)


def _sort_running(builder: PlanBuilder, expired: set[Sequence]) -> Running:
    """Who needs what. A late stream is best effort until it has paused too long: it makes no other late.

    While prompts wait for places it does not wait: a place becomes free only when a stream ends.
    """
    running = Running()
    streams, starts, deadlines = running.streams, running.starts, running.deadlines
    tightest, itl_s, load = inf, inf, 0.0
    per_decode, per_key = builder.cost.per_decode, builder.cost.per_key
    now, due, queue = builder.context.now, builder.context.due, builder.context.queues.running
    for seq in queue[: bisect_left(queue, (SPARE_TIME,), key=_rank)]:
        at, rank, deadline = seq.kv.computed, seq.rank, seq.deadline
        left = seq.remaining if seq.in_flight else len(seq.tokens) - at
        if left == 0 or (expired and seq in expired):
            continue
        if (left > 1 or not deadline.emitted) and (rank[1] == FIRST or (due and seq in due)):
            if rank[1] != FIRST:
                rank = first_rank(seq, builder.cost)
                builder.plan.place.append((seq, rank))
            running.prompts.append((rank, seq))
            continue
        timed = rank[0] == TIMED
        if not timed or deadline.late or (deadline.latest < now and deadline.next < now):
            if timed:
                rank = _best_effort_rank(builder, seq, now)
                builder.plan.place.append((seq, rank))
            if left > 1:
                running.partial_prefills.append((rank, seq))
            elif seq.draws and (
                (builder.place_waits and deadline.late) or deadline.last_emission + PAUSE_S <= now
            ):
                streams.append(seq)
                deadlines.append(deadline)
                starts.append(at)
            else:
                running.best_effort.append(seq)
            continue
        target = deadline.target_itl_s
        if target < itl_s:
            itl_s = target
        if left == 1 and seq.draws:
            streams.append(seq)
            deadlines.append(deadline)
            starts.append(at)
            latest = deadline.latest
            if latest < tightest:
                tightest = latest
            load += (per_decode + per_key * at) / target
        else:
            running.prompts.append((rank, seq))
    running.tightest, running.shortest_itl_s, running.load = tightest, itl_s, load / 1e3
    running.context = sum(starts) + len(starts)
    return running


def _run_streams(builder: PlanBuilder, running: Running, *, pressed: bool) -> None:
    """Run all streams if that is in time for the tightest one, else those that cannot wait.

    When prompts are `pressed`, streams that may have their token with the next step leave them their time.
    """
    streams, starts, cost, size = running.streams, running.starts, builder.cost, builder.context.pool.size
    until = builder.context.until
    ms = cost.per_decode * len(streams) + cost.per_key * running.context
    builder.end = min(running.tightest, until)
    step_s = (builder.ms + ms) * builder.margin / 1e3
    late = builder.context.now + step_s > builder.end
    if pressed and not late:
        soon, latest = builder.end + step_s, latest_of(running.deadlines, builder.context.now)
        running.best_effort += [seq for seq, at in zip(streams, latest, strict=True) if at >= soon]
        urgent = [index for index, at in enumerate(latest) if at < soon]
        streams, starts = [streams[index] for index in urgent], [starts[index] for index in urgent]
        ms = cost.per_decode * len(streams) + cost.per_key * (sum(starts) + len(starts))
    needs = 0 if late else sum([start % size == 0 for start in starts])  # blocks for one more token each
    if streams and (late or needs > builder.free or len(streams) > builder.tokens_left):
        builder.end = until
        _run_crowded(builder, running)
        return
    builder.plan.rows += map(Row, streams, starts, repeat(1), repeat(True))
    builder.ms += ms
    builder.tokens_left -= len(streams)
    builder.free -= needs


def _run_crowded(builder: PlanBuilder, running: Running) -> None:
    """Not all streams fit: run the tightest first, and let those with slack wait for the next step.

    A stream that will be late whatever is done takes its turn with the best-effort ones.
    """
    base, row_s = builder.context.now + builder.ms * builder.margin / 1e3, builder.margin / 1e3
    per_decode, per_key = builder.cost.per_decode, builder.cost.per_key
    latest, starts = latest_of(running.deadlines, base), running.starts
    order = sorted(range(len(latest)), key=latest.__getitem__)
    jobs: list[Job] = [(latest[at], (per_decode + per_key * (starts[at] + 1)) * row_s, 0.0) for at in order]
    tardy, _ = tardy_jobs(jobs, base)
    running.best_effort += [running.streams[order[index]] for index in tardy]
    for index, at in enumerate(order):
        if index in tardy:
            continue
        ms = per_decode + per_key * (starts[at] + 1)
        if not builder.plan.rows:
            builder.end = min(builder.end, jobs[index][0])
        elif builder.left_ms < ms:
            break
        builder.decode(running.streams[at], starts[at], ms)


def _owed_now(builder: PlanBuilder, best_effort: list[Sequence]) -> float:
    """Milliseconds of this step that belong to best-effort sequences, if one has waited long."""
    if not _has_waited_long(builder, ((seq.rank, seq) for seq in best_effort[:DEPTH])):
        return 0.0
    share = BEST_EFFORT_SHARE * max(builder.left_ms + builder.ms, builder.ms)
    return min(builder.context.history.fairness.owed + share, step_limit(builder.cost))


def _has_waited_long(builder: PlanBuilder, placed: Iterable[Placed]) -> bool:
    """Whether a best-effort sequence among these has waited long."""
    since = builder.context.now - PATIENCE_S
    return any(rank.group == BEST_EFFORT and rank.order < since for rank, _ in placed)


def _jobs(builder: PlanBuilder, prompts: list[Placed]) -> dict[float, list[Job]]:
    """The prompts by weight. Newcomers are deferred before admitted ones, and never one that goes first."""
    worth = builder.context.history.fairness.worth()
    groups: dict[float, list[Job]] = {}
    jobs, group = list[Job](), inf
    works = works_of([seq for _, seq in prompts], builder.cost)
    for ((_, negated_weight, order, _), seq), ms in zip(prompts, works, strict=True):
        if negated_weight != group:
            group, jobs = negated_weight, []
            groups[-negated_weight] = jobs
        value = worth.get(seq.request.tenant, 0.0) if worth else 0.0
        if seq.rank[0] or seq.request.admitted:
            value += ADMITTED if seq.started is None else STARTED
        jobs.append((inf if group == FIRST else order, ms, value))
    return groups


def _prompt_works(
    jobs: dict[float, list[Job]], others: list[Placed], cost: StepCost
) -> list[tuple[float, float]]:
    """The deadline and the milliseconds of each prompt. Those without a deadline come last."""
    timed = [(due, ms) for group in jobs.values() for due, ms, _ in group]
    return timed + [(inf, ms) for ms in works_of([seq for _, seq in others], cost)]


def _admit(
    builder: PlanBuilder, prompts: list[Placed], others: list[Placed], deferral: Deferral, deferred: Late
) -> tuple[list[Placed], list[Placed]]:
    """Refuse newcomers by the rule of `lateness`, and what has not started by its limit.

    Returns the prompts and the others that are left. A newcomer that is admitted although it will be late is
    one of the others from now on.
    """
    plan, now, refused, late = builder.plan, builder.context.now, dict[Sequence, float](), list[Placed]()
    newcomers = set(plan.newcomers)
    first = prompts[: bisect_left(prompts, (Rank(TIMED, FIRST, inf, 0),))]
    refused.update((seq, 0.0) for seq in beyond_their_limit(first, builder.cost, deferral.rate, now))
    if newcomers:
        horizon_s = max((rank.order - now for rank, _ in prompts if rank.negated_weight > FIRST), default=0.0)
        behind = [seq for _, seq in others if seq not in newcomers]
        backlog = backlog_of(builder.context, behind, builder.behind, horizon_s)
        for rank, seq in [one for one in prompts + others if one[1] in newcomers]:
            late_s = deferred.get(seq, 0.0)
            prompt = prompt_of(seq, rank, builder.cost, prompts, deferred)
            asked = newcomer(prompt, deferral, late_s, backlog, now)
            asks = may_refuse(seq) and not seq.request.admitted
            after = shortfall(asked, backlog) if asks else 0.0
            if after > 0 or (late_s > 0 and seq.request.objective.on_miss == "reject"):
                refused[seq] = max(after, late_s)
                continue
            if asked.late_s > 0 and not (asked.crowded and seq.request.admitted):
                late.append((_best_effort_rank(builder, seq, now), seq))
                plan.first.append((goes_first_at(seq, builder.cost, backlog.late_ms), seq))
            if asked.late_s > 0 or asked.ttft_s == inf:
                backlog = backlog.more(asked)
    if not refused and not late:
        return prompts, others
    plan.refuse += refused.items()
    plan.place += [(seq, rank) for rank, seq in late]
    gone = {*refused, *(seq for _, seq in late)}
    return [one for one in prompts if one[1] not in gone], [
        one for one in others if one[1] not in gone
    ] + late


def _may_move(builder: PlanBuilder, seq: Sequence) -> bool:
    """Whether another model may emit all of its tokens: a prompt that is partly computed stays as long as the
    rest of it would easily be on time if it were alone."""
    if seq.deadline.emitted or not seq.request.lighter:
        return False
    alone = builder.cost.prefill(seq.done, seq.length - seq.done)
    return seq.started is None or builder.context.now + EASILY * alone / 1e3 > seq.deadline.next


def _run_prompts(builder: PlanBuilder, prompts: list[Placed], deferred: Late, estimate: Estimate) -> None:
    """Give the rest of the step to prompts that need not be deferred."""
    crowded, left, weight, heavier = False, builder.left_ms, -inf, 0.0
    token = builder.cost.per_prefill if builder.plan.rows else 0.0
    least = min(token, builder.cost.per_decode)
    for rank, seq in prompts:
        if left <= 0 or left < least or builder.tokens_left <= 0:
            return
        if seq in deferred or (seq.slot < 0 and (crowded or builder.held or left < token)):
            continue
        if seq.slot < 0 and estimate.streams and rank.negated_weight > FIRST:
            if weight != -rank.negated_weight:
                weight = -rank.negated_weight
                heavier = builder.context.history.arrivals.above(weight)
            if not estimate.bears(seq.length, seq.deadline.target_itl_s * 1e3, heavier):
                crowded = True
                continue
        builder.run(seq, left)
        left = builder.left_ms


def _put_off(
    builder: PlanBuilder,
    prompts: list[Placed],
    others: list[Placed],
    estimate: Estimate,
    deferral: Deferral,
    deferred: Late,
) -> list[Sequence]:
    """Refuse the deferred prompts that ask for it, or that are sure to be late while others are late already.

    The rest may take what time is left.
    """
    put_off, now = list[Sequence](), builder.context.now
    if not deferred:
        return put_off
    sure = _sure_to_be_late(builder, prompts, estimate, deferred)
    backlog: Backlog | None = None
    many = len(deferred) > DEPTH // 2
    late = [one for one in prompts if one[1] in deferred]
    for (rank, seq), ms in zip(late, works_of([seq for _, seq in late], builder.cost), strict=True):
        if seq.request.objective.on_miss == "reject" and seq.started is None:
            builder.plan.refuse.append((seq, deferred[seq]))
            continue
        hopeless = many or now + ms / 1e3 > seq.deadline.next  # even with the machine to itself
        if (hopeless or seq in sure) and may_refuse(seq) and gives_way(seq, builder.cost):
            backlog = backlog or backlog_of(builder.context, (other for _, other in others), builder.behind)
            prompt = prompt_of(seq, rank, builder.cost)
            asked = newcomer(prompt, deferral, deferred[seq], backlog, now)._replace(late_s=deferred[seq])
            if shortfall(asked, backlog) > 0:
                builder.plan.refuse.append((seq, deferred[seq]))
                continue
            if hopeless:
                backlog = backlog.more(asked)
                at = goes_first_at(seq, builder.cost, backlog.late_ms - asked.alone_ms)
                builder.plan.first.append((at, seq))
        if hopeless:
            builder.plan.place.append((seq, _best_effort_rank(builder, seq, now)))
        put_off.append(seq)
    return put_off


def _sure_to_be_late(builder: PlanBuilder, prompts: list[Placed], estimate: Estimate, deferred: Late) -> Late:
    """The deferred prompts that will be late even if nothing else comes. In an overload more is sure to come.

    Only what comes makes others late, so this is looked at when something has come.
    """
    if builder.context.history.arrivals.offered > OVERLOAD:
        return deferred
    if not builder.plan.newcomers or not any(map(may_refuse, deferred)):
        return {}
    deferral = estimate.defer(_jobs(builder, prompts), lambda weight: 0.0, builder.context.now)
    return {prompts[index][1]: excess for index, excess in deferral.late_by.items()}
