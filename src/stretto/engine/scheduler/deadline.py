"""The schedule that knows time: what the next step runs so that the most requests are on time.

Pure, as `fcfs`: it looks at queues, pool, limits and the moment, and says a plan. Streams first; then prompts
by due, without those that must give way; then whatever has no due, in what time is left. A step ends before
the first stream in it would pause too long, so that the gap between tokens is bounded by construction.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import groupby, repeat
from math import inf

from stretto.engine.kv_cache import BlockPool
from stretto.engine.scheduler.fcfs import fcfs
from stretto.engine.scheduler.moore_hodgson import Job, tardy_jobs
from stretto.engine.scheduler.plan_builder import PlanBuilder, go_on, run
from stretto.engine.scheduler.types import Limits, Plan, Queues, Row, SchedulePolicy, SchedulingContext
from stretto.engine.sequence import SPARE, TIMED, Rank, Sequence
from stretto.engine.step_time import StepCost

DEPTH = 64  # prompts that a step looks at
REACH = 20  # a step that no stream waits for takes as long as this many bases: the base is then 5 % of it
SHORTEST_REACH_MS = 20.0
SHARE = 0.03  # of all time goes to those without a due that have waited long
PATIENCE_S = 30.0
CAUTION = 0.7  # of the time that heavier prompts seem to leave
LEAST = 0.25  # of the time for prompts is there for the lighter ones, whatever has come of late
CROWDED = 0.9  # streams may take this share of their gaps; beyond, no prompt becomes a stream
BREVITY = 30.0  # seconds that a second of work puts a request without a due behind
LATE_S = 300.0  # that a request which cannot be on time any more is put behind
DEBT_STEP_MS = 3000.0  # tenants whose use of the last minute differs by less are even

Placed = tuple[Rank, Sequence]


@dataclass(slots=True)
class Running:
    """The running sequences by what they need: `streams` and `prompts` with a due, `spare` (streams) and
    `begun` (prompts) without. Of the first: `starts`, their
    tokens so far; `tightest`, when one must have its token; their shortest `gap`,
    ms; `load`, the share of time they take at the slowest pace they bear; `context`, the keys that a step
    reads for them; `needs`, the blocks they go on with."""

    streams: list[Sequence] = field(default_factory=list[Sequence])
    prompts: list[Sequence] = field(default_factory=list[Sequence])
    starts: list[int] = field(default_factory=list[int])
    spare: list[Sequence] = field(default_factory=list[Sequence])
    begun: list[Placed] = field(default_factory=list[Placed])
    tightest: float = inf
    gap: float = inf
    load: float = 0.0
    context: int = 0
    needs: int = 0


def deadline(model: str, queues: Queues, pool: BlockPool, limits: Limits, moment: SchedulingContext) -> Plan:
    """On time first. An empty plan means there is nothing to run now."""
    cost, now = moment.times.cost, moment.now
    budget = PlanBuilder(
        plan=Plan(model),
        queues=queues,
        pool=pool,
        limits=limits,
        now=now,
        cost=cost,
        margin=moment.times.margin,
        worst=moment.times.worst,
        ms=cost.base,
        tokens_left=limits.max_step_tokens,
        free=pool.available,
        room=limits.max_running - len(queues.running),
    )
    gone = _end_overdue(budget)
    prompts, others = _look_at_waiting(budget, moment, gone)
    running = _sort_running(budget, moment, gone)
    prompts = sorted([(seq.rank, seq) for seq in running.prompts] + prompts)[:DEPTH]
    out = _giving_way(budget, prompts, _rate(budget, running), moment)
    _run_streams(budget, running, moment.until, pressed=bool(out))
    budget.streams = len(budget.plan.rows)
    budget.end = min(budget.end, now + reach(cost) / 1e3)
    spare = running.spare + [seq for _, seq in sorted(running.begun + others)]
    owed = _promised(budget, moment, spare)
    owed -= _fill(budget, spare, min(owed, budget.left() / 2))
    aside = _read(budget, running, prompts, out, moment)
    owed -= _fill(budget, spare + aside, inf)
    budget.plan.owed = max(owed, 0.0)
    budget.plan.predicted = budget.ms
    return budget.plan


def _rate(budget: PlanBuilder, running: Running) -> float:
    """The share of the time that is left for prompts while the streams have their pace."""
    base = budget.cost.base / min(running.gap, reach(budget.cost))
    return max(1.0 / budget.margin - base - running.load, SHARE)


def reach(cost: StepCost) -> float:
    """How long a step may take that no stream waits for, ms: longer would help little and keep the next
    request from starting."""
    return max(REACH * cost.base, SHORTEST_REACH_MS)


def latest_start(queues: Queues, cost: StepCost) -> float:
    """When the next step must start for every stream and the first prompt to be on time; inf: any time."""
    streams = [seq for seq in queues.running if seq.rank[0] == TIMED and not seq.deadline.late]
    tightest = min((seq.deadline.latest for seq in streams), default=inf)
    context = sum(seq.kv.computed for seq in streams)
    start = tightest - cost.decodes(len(streams), context) / 1e3
    first = bisect_left(queues.waiting, (TIMED,), key=_rank)
    if first < len(queues.waiting) and queues.waiting[first].rank[0] == TIMED:
        seq = queues.waiting[first]
        start = min(start, seq.rank[2] - (cost.base + cost.prefill(0, seq.length)) / 1e3)
    return start


def _end_overdue(budget: PlanBuilder) -> set[Sequence]:
    """Those whose whole answer was due by now end, and get no more work."""
    gone: set[Sequence] = set()
    if budget.queues.ends and budget.queues.ends[0][0] <= budget.now:
        gone = {seq for due, _, seq in budget.queues.ends if due <= budget.now and not seq.ended}
        budget.plan.end += sorted(gone, key=_rank)
    return gone


def _look_at_waiting(
    budget: PlanBuilder, moment: SchedulingContext, gone: set[Sequence]
) -> tuple[list[Placed], list[Placed]]:
    """The first of those that wait, with a due and without, once newcomers have their place."""
    waiting = budget.queues.waiting
    timed = bisect_left(waiting, (TIMED,), key=_rank)
    spare = bisect_left(waiting, (SPARE,), key=_rank)
    prompts = [(seq.rank, seq) for seq in waiting[timed : min(spare, timed + DEPTH)]]
    others = [(seq.rank, seq) for seq in waiting[spare : spare + DEPTH]]
    for seq in waiting[:timed]:
        if seq not in gone:
            rank = _rank_for(budget, seq, moment)
            budget.plan.place.append((seq, rank))
            (prompts if rank[0] == TIMED else others).append((rank, seq))
    if gone:
        prompts = [(rank, seq) for rank, seq in prompts if seq not in gone]
        others = [(rank, seq) for rank, seq in others if seq not in gone]
    return prompts, others


def _rank_for(budget: PlanBuilder, seq: Sequence, moment: SchedulingContext) -> Rank:
    """Where a newcomer queues. What must all be out by a last due must start early enough for that."""
    first = seq.deadline.next
    if seq.deadline.whole < inf:
        rest = moment.ledger.expected(seq.request.tier, seq.request.sampling.max_tokens)
        pace = min(
            seq.deadline.target_itl_s, budget.cost.decodes(1 + len(budget.queues.running), seq.length) / 1e3
        )
        first = min(first, seq.deadline.whole - rest * pace)
    if min(first, seq.deadline.target_itl_s) < inf:
        tier = budget.limits.tiers.get(seq.request.tier)
        return TIMED, -tier.weight if tier else 0.0, first, seq.request.id
    return _spare_rank(budget, seq, moment, seq.request.arrival)


def _spare_rank(budget: PlanBuilder, seq: Sequence, moment: SchedulingContext, since: float) -> Rank:
    """A place among those without a due: when it would start if its tenant had the machine alone (start-time
    fair queueing, Goyal et al., SIGCOMM 1996). One tenant's many do not stand before another's few."""
    tags, tenant = budget.plan.tags, seq.request.tenant
    work = budget.cost.prefill(seq.kv.computed, seq.length - seq.kv.computed) / 1e3
    tag = max(since, tags.get(tenant, moment.ledger.tags.get(tenant, 0.0)))
    tags[tenant] = tag + work
    return SPARE, 0.0, tag + BREVITY * work + (LATE_S if seq.deadline.next < inf else 0.0), seq.request.id


def _sort_running(budget: PlanBuilder, moment: SchedulingContext, gone: set[Sequence]) -> Running:
    """Who needs what. A stream that was late is no longer among those with a due: it cannot become on time,
    so it must not make another late."""
    running = Running()
    streams, starts, tightest, gap, needs = running.streams, running.starts, inf, inf, 0
    per_decode, per_key, load = budget.cost.per_decode, budget.cost.per_key, 0.0
    now, size, add, begin = budget.now, budget.pool.size, streams.append, starts.append
    for seq in budget.queues.running:
        at, latest = seq.kv.computed, seq.deadline.latest
        left = seq.remaining if seq.in_flight else len(seq.tokens) - at
        if left == 0 or (gone and seq in gone):
            continue
        if seq.rank[0] != TIMED or seq.deadline.late or (latest < now and seq.deadline.next < now):
            _sort_spare(budget, moment, running, seq)
        elif left == 1:
            add(seq)
            begin(at)
            pause = seq.deadline.target_itl_s
            if latest < tightest:
                tightest = latest
            if pause < gap:
                gap = pause
            load += (per_decode + per_key * at) / pause
            if at % size == 0:
                needs += 1
        else:
            running.prompts.append(seq)
            gap = min(gap, seq.deadline.target_itl_s)
    running.tightest, running.gap, running.load = tightest, gap * 1e3, load / 1e3
    running.context, running.needs = sum(starts) + len(starts), needs
    return running


def _sort_spare(budget: PlanBuilder, moment: SchedulingContext, running: Running, seq: Sequence) -> None:
    """One without a due, or one that has just lost its own."""
    rank = seq.rank
    if rank[0] == TIMED:
        rank = _spare_rank(budget, seq, moment, budget.now)
        budget.plan.place.append((seq, rank))
    if seq.remaining == 1:
        running.spare.append(seq)
    else:
        running.begun.append((rank, seq))


def _run_streams(budget: PlanBuilder, running: Running, until: float, *, pressed: bool) -> None:
    """All streams, when that is in time for the tightest of them; else those that cannot wait. When prompts
    are `pressed`, streams that can have their token as well with the next step leave their time to them."""
    streams, starts, needs, cost = running.streams, running.starts, running.needs, budget.cost
    ms = cost.per_decode * len(streams) + cost.per_key * running.context
    budget.end = min(running.tightest, until)
    step = (budget.ms + ms) * budget.margin / 1e3
    late = budget.now + step > budget.end
    if pressed and not late:
        running.spare += [seq for seq in streams if seq.deadline.latest >= budget.end + step]
        streams = [seq for seq in streams if seq.deadline.latest < budget.end + step]
        starts = [seq.kv.computed for seq in streams]
        needs = sum(start % budget.pool.size == 0 for start in starts)
        ms = cost.per_decode * len(streams) + cost.per_key * (sum(starts) + len(starts))
    if streams and (late or needs > budget.free or len(streams) > budget.tokens_left):
        budget.end = until
        _run_crowded(budget, running)
        return
    budget.plan.rows += map(Row, streams, starts, repeat(1), repeat(True))
    budget.ms += ms
    budget.tokens_left -= len(streams)
    budget.free -= needs


def _run_crowded(budget: PlanBuilder, running: Running) -> None:
    """Not all streams fit: the tightest first, and those with slack wait for the next step. One that cannot
    be in time whatever is done takes its turn with those that have no due."""
    cost, base = budget.cost, budget.now + budget.ms * budget.margin / 1e3
    streams = sorted(running.streams, key=lambda seq: _latest(seq, base))
    rows = [cost.row(seq.kv.computed + 1) for seq in streams]
    jobs = [
        (_latest(seq, base), ms * budget.margin / 1e3, 0.0) for seq, ms in zip(streams, rows, strict=True)
    ]
    out = tardy_jobs(jobs, base)
    running.spare += [streams[index] for index in out]
    for index, seq in enumerate(streams):
        if index in out:
            continue
        if not budget.plan.rows:
            budget.end = min(budget.end, jobs[index][0])
        elif budget.left() < rows[index]:
            break
        go_on(budget, seq, 1)


def _latest(seq: Sequence, soonest: float) -> float:
    """When a stream must speak: before its pause is too long, or when that is lost before it is late."""
    return seq.deadline.latest if seq.deadline.latest >= soonest else seq.deadline.next


def _promised(budget: PlanBuilder, moment: SchedulingContext, spare: list[Sequence]) -> float:
    """Milliseconds of this step that belong to those without a due, if they have waited long."""
    patient = budget.now - PATIENCE_S
    if not any(seq.rank[0] == SPARE and seq.rank[2] < patient for seq in spare[:DEPTH]):
        return 0.0
    return min(moment.ledger.owed + SHARE * max(budget.left() + budget.ms, budget.ms), reach(budget.cost))


def _read(
    budget: PlanBuilder,
    running: Running,
    prompts: list[Placed],
    out: dict[int, float],
    moment: SchedulingContext,
) -> list[Sequence]:
    """Give prompts the rest of the step, without those that must give way. Returns the latter, less those
    refused, for what time may be left."""
    aside: list[Sequence] = []
    crowded, room = False, budget.left() > 0 and budget.tokens_left > 0
    for index, (rank, seq) in enumerate(prompts):
        if index not in out:
            if not room or (seq.slot < 0 and (crowded or budget.held)):
                continue
            if seq.slot < 0 and not _bearable(budget, seq, running, moment.ledger.inflow_above(-rank[1])):
                crowded = True
            else:
                run(budget, seq, budget.left())
                room = budget.left() > 0 and budget.tokens_left > 0
        elif seq.request.objective.on_miss == "reject" and seq.started is None:
            budget.plan.refuse.append((seq, out[index]))
        else:
            if len(out) > DEPTH // 2 or _hopeless(budget, seq):
                budget.plan.place.append((seq, _spare_rank(budget, seq, moment, budget.now)))
            aside.append(seq)
    return aside


def _giving_way(
    budget: PlanBuilder, prompts: list[Placed], rate: float, moment: SchedulingContext
) -> dict[int, float]:
    """Which prompts cannot be on time without making more, or weightier ones, late. `prompts` are by weight,
    then by due: a lighter one has the time that the heavier leave, and that heavier ones to come will."""
    per_prefill, per_pair, debts = budget.cost.per_prefill, budget.cost.per_pair, moment.ledger.debts
    worth = {tenant: -(ms // DEBT_STEP_MS) for tenant, ms in debts.items()} if len(debts) > 1 else {}
    out: dict[int, float] = {}
    start, first = budget.now, 0
    for weight, group in groupby(prompts, key=_minus_weight):
        heavier = moment.ledger.inflow_above(-weight)
        pace = 1e3 * max(rate - heavier, LEAST * rate) * (CAUTION if heavier else 1.0)
        jobs: list[Job] = []
        for rank, seq in group:
            count = len(seq.tokens) - seq.kv.computed
            seconds = count * (per_prefill + per_pair * (seq.kv.computed + count / 2)) / pace
            jobs.append((rank[2], seconds, worth.get(seq.request.tenant, 0.0) if worth else 0.0))
        lost = tardy_jobs(jobs, start)
        start += sum(job[1] for place, job in enumerate(jobs) if place not in lost)
        out.update((first + place, excess) for place, excess in lost.items())
        first += len(jobs)
    return out


def _minus_weight(prompt: Placed) -> float:
    return prompt[0][1]


def _hopeless(budget: PlanBuilder, seq: Sequence) -> bool:
    """Too late even with the machine to itself."""
    alone = budget.cost.prefill(seq.kv.computed, seq.length - seq.kv.computed)
    return budget.now + alone / 1e3 > seq.deadline.next


def _bearable(budget: PlanBuilder, seq: Sequence, running: Running, heavier: float) -> bool:
    """Whether the streams would still have their pace if this prompt became one of them, and `heavier`
    prompts to come the share of the time that they take."""
    gap = seq.deadline.target_itl_s * 1e3
    base = budget.cost.base / min(gap, running.gap)
    load = base + running.load + budget.cost.row(seq.length) / gap
    return not running.streams or load < CROWDED / budget.margin - heavier


def _fill(budget: PlanBuilder, sequences: list[Sequence], ms: float) -> float:
    """Run sequences, in order, for at most `ms` of the step; returns the milliseconds they take."""
    before = budget.ms
    token = (
        budget.cost.per_prefill if budget.plan.rows else 0.0
    )  # a step that has nothing else takes what it costs
    least = min(token, budget.cost.per_decode)
    if not sequences or min(budget.left(), ms) < least:
        return 0.0
    ran = {id(row.seq) for row in budget.plan.rows[budget.streams :]}
    for seq in sequences:
        left = min(budget.left(), ms - (budget.ms - before))
        if (
            left <= 0
            or left < least
            or budget.tokens_left <= 0
            or (seq.slot < 0 and (budget.full or left < token))
        ):
            break
        if id(seq) not in ran:
            run(budget, seq, left)
    return budget.ms - before


def _rank(seq: Sequence) -> Rank:
    return seq.rank


SCHEDULES: dict[str, SchedulePolicy] = {"fcfs": fcfs, "deadline": deadline}
