"""How late an answer may be: the one rule by which a request is admitted, waits, and goes first.

A request has its first token by its limit, or it is refused, nearly always when it arrives. The limit is
`LATEST` times its TTFT objective, or `FLEX_WAIT_S` without one. In its last quarter it goes first, and sooner
if its prompt takes longer. A request with `on_miss="late"` is never refused. Pure numbers, which the
scheduler and admission share.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from heapq import heappop, heappush
from math import inf
from typing import NamedTuple

from msgspec import Struct, structs

from stretto.deadlines import Deadline
from stretto.engine.scheduler.estimate import Deferral, Group
from stretto.engine.scheduler.types import SchedulingContext
from stretto.engine.sequence import TIMED, Rank, Sequence
from stretto.engine.step_time import StepCost

LATEST = 3.0  # times the TTFT objective, or the time that the prompt takes alone if that is longer
FLEX_WAIT_S = 600.0  # the longest wait of a request without a TTFT objective
LEAD = 0.25  # of its longest wait a request goes first; prompts without an objective may fill so much of it
PAUSE_S = 3.0  # a stream that is late or has no objective pauses at most so long
OVERDUE_S = 0.05  # a stream that has paused too long emits so soon
RESUME_S = 10.0  # after so long a preempted sequence goes first
FREE = 0.3, 0.15  # of the longest TTFT objective; while less work waits, prompts without one are admitted
RESERVE = 8.0, 24.0  # beyond it they leave room for so many more like them; at other times and in overload
OVERLOAD = 1.0  # of the time: more prompt work than this that comes is an overload
FLEX_OVERLOAD = 1.1  # the same before prompts without an objective get less room: they can wait longer
OVERLOAD_FLEX = 0.1  # of the time is counted on for prompts without an objective in overload
IDLE = 0.4  # of the share of idle time in the last half hour is counted on for them whatever comes now
MOST = 0.9  # of the time that others leave is counted on for prompts without an objective
SHORT_QUEUE = 0.2  # of its TTFT objective a newcomer may wait while newcomers are refused
LONG_QUEUE = 0.8  # the same before any is refused
MEANWHILE = 1.25  # times as long as if nothing else came, a queue takes to be short again
STILL_CROWDED = 0.9  # of what can be done: while newcomers are refused, so much is more than can be done
LUMPS = 6.0  # prompts of the usual size keep the machine busy until more come
SHORT_PROMPT = 1 / 40  # of its TTFT objective is what a short prompt takes alone
LEAST_QUEUE = 0.05  # the same for the longest prompts, without their own time
ADMITTED = 1.0  # what an admitted prompt is worth more than a newcomer, in steps of `Fairness.worth`
FIRST_RATE = 750.0  # ms of work in a second is counted on for a prompt that goes first
FIRST = -inf  # the negated weight of those that go first


class Alarms:
    """When requests go first. One that has started or ended by then keeps its alarm, which nobody needs."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []

    def add(self, at: float, ident: int) -> None:
        """Have a request go first from `at` on."""
        heappush(self._heap, (at, ident))

    def due(self, now: float) -> list[int]:
        """Take the ids of those whose time has come, each once: a late one has two alarms."""
        due: list[int] = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heappop(self._heap)[1])
        return list(dict.fromkeys(due))


class Backlog(Struct, frozen=True, array_like=True):
    """The admitted prompts that have no place among those that can be on time, and the rates of arrival."""

    late_ms: float = 0.0  # prompts with a TTFT objective that will miss it
    flex_ms: float = 0.0  # prompts without a TTFT objective
    timed: float = 0.0  # share of the recent time that prompts which can be on time were admitted for
    offered: float = 0.0  # prompt work that came recently, refused or not, as a share of the time
    horizon_s: float = inf  # the longest TTFT objective of a tier, or of a waiting prompt if that is longer
    recent: dict[float, float] = {}  # by weight, the same for what comes now in it and in heavier ones
    lump_ms: float = 0.0  # what a prompt of the usual size takes, by work
    turns_away: tuple[float, ...] = ()  # the weights of which a newcomer was refused a moment ago
    idle: float = 0.0  # share of the last half hour in which no step ran

    @property
    def overload(self) -> bool:
        """Whether more prompt work comes than can be done."""
        return self.offered > OVERLOAD

    def more(self, admitted: Newcomer) -> Backlog:
        """The backlog with one more prompt that was admitted to it."""
        late_ms, flex_ms = self.late_ms, self.flex_ms
        if admitted.ttft_s < inf:
            late_ms += admitted.alone_ms
        else:
            flex_ms += admitted.alone_ms
        return structs.replace(self, late_ms=late_ms, flex_ms=flex_ms)


class Newcomer(NamedTuple):
    """A prompt that asks to be admitted."""

    alone_ms: float  # its work
    ttft_s: float  # its TTFT objective; inf without one
    wait_s: float  # from now until its limit
    busy_s: float  # that the prompts before it take, itself included if it can be on time
    rate: float  # work for such prompts that is done in a second, ms
    late_s: float = 0.0  # by how much it would be late
    crowded: bool = False  # whether more prompts like it come than can be done
    excess_s: float = 0.0  # by how much it would wait too long in a queue that is to be short


class Prompt(NamedTuple):
    """A prompt and its TTFT objective."""

    alone_ms: float
    arrival: float
    deadline: float  # of its first token; inf without one
    weight: float
    ahead_ms: float = 0.0  # the work of those of its weight that go before it


def prompt_of(
    seq: Sequence,
    rank: Rank,
    cost: StepCost,
    prompts: Iterable[tuple[Rank, Sequence]] = (),
    deferred: Container[Sequence] = (),
) -> Prompt:
    """The prompt of a sequence at this rank. `prompts`: those that wait, of which some are deferred."""
    same = [other for at, other in prompts if at.negated_weight == rank.negated_weight and at < rank]
    ahead = (cost.prefill(each.done, each.length - each.done) for each in same if each not in deferred)
    return Prompt(
        alone_ms=cost.prefill(seq.done, seq.length - seq.done),
        arrival=seq.request.arrival,
        deadline=rank.order if rank.group == TIMED else inf,
        weight=-rank.negated_weight,
        ahead_ms=sum(ahead),
    )


def newcomer(prompt: Prompt, deferral: Deferral, late_s: float, backlog: Backlog, now: float) -> Newcomer:
    """What a prompt asks for. `late_s`: by how much it would be late as more comes, by `deferral`.

    In an overload more is sure to come. Otherwise it is late only if it is so without caution.
    """
    timed, weight, rate = prompt.deadline < inf, prompt.weight, deferral.rate
    turned_away = weight in backlog.turns_away
    most = STILL_CROWDED * deferral.most if turned_away else deferral.most
    crowded = backlog.overload or (timed and backlog.recent.get(weight, 0.0) * 1e3 > most)
    if not timed:
        weight = min(deferral.groups, default=weight)
    group, busy_s, excess_s = deferral.groups.get(weight), 0.0, 0.0
    if crowded and group is not None:
        busy_s, rate = group.end - now, group.pace
        excess_s = _queue_excess(prompt, group, backlog, now, turned_away=turned_away) if timed else 0.0
    elif group is not None:
        busy_s = group.busy_ms / rate
        late_s = group.all_ms / group.likely - (prompt.deadline - now) if late_s > 0 else 0.0
    ttft_s = prompt.deadline - prompt.arrival
    return Newcomer(
        alone_ms=prompt.alone_ms,
        ttft_s=ttft_s,
        wait_s=prompt.arrival + longest_wait_s(ttft_s, prompt.alone_ms) - now,
        busy_s=busy_s,
        rate=rate,
        late_s=max(late_s, 0.0),
        crowded=crowded,
        excess_s=excess_s,
    )


def _queue_excess(prompt: Prompt, group: Group, backlog: Backlog, now: float, *, turned_away: bool) -> float:
    """The seconds until the queue of a prompt is short, while more comes than can be done; 0: it is admitted.

    The queue may grow until it is long. Then newcomers are refused, and from then on it is kept short
    (`turned_away`). A long one would serve no more of them. It would make each of them wait, and those who
    come after the overload too: the standing queue of Nichols and Jacobson (ACM Queue 10, 2012). A short one
    holds as many prompts as keep the machine busy. Where prompts are long the objective is the only limit.
    """
    queue_s = group.start - now + prompt.ahead_ms / group.flow
    left_s, own_s = prompt.deadline - now, prompt.alone_ms / group.flow
    short_s = min(max(SHORT_QUEUE * left_s, LUMPS * backlog.lump_ms / group.flow), left_s)
    long_s = short_s if turned_away else max(LONG_QUEUE * left_s, short_s)
    least_s = LEAST_QUEUE * left_s
    if queue_s <= max(long_s - own_s, least_s):
        return 0.0
    return (queue_s - max(short_s - own_s, least_s)) * MEANWHILE


def shortfall(asked: Newcomer, backlog: Backlog) -> float:
    """The seconds after which a prompt could be admitted if nothing else came; 0: it is admitted now.

    While many prompts wait, one without an objective must leave room for several more like it, so only short
    ones are admitted. This is trunk reservation, which is close to optimal when more comes than can be served
    (Reiman, Queueing Systems 8, 1991). One that will be late is admitted if none like it waits.

    After a burst comes a pause, so what waits without an objective may also wait for idle time like that of
    the last half hour. It must have its turn there before it goes first.
    """
    overload = backlog.offered > (FLEX_OVERLOAD if asked.ttft_s == inf else OVERLOAD)
    spare = OVERLOAD_FLEX if overload else max(LEAD, MOST - backlog.timed)
    if asked.ttft_s == inf:
        own_s, horizon_s = asked.alone_ms / asked.rate, backlog.horizon_s
        idle_ms = IDLE * backlog.idle * (asked.wait_s - LEAD * FLEX_WAIT_S) * 1e3
        if backlog.flex_ms + (1 + RESERVE[False]) * asked.alone_ms <= idle_ms:
            return 0.0
        excess = _excess(asked, backlog.flex_ms, spare)
        if asked.busy_s > FREE[overload] * horizon_s:
            excess = max(excess, (1 + RESERVE[overload]) * own_s + asked.busy_s - horizon_s)
        return max(excess, 0.0)
    if asked.late_s <= 0 or asked.crowded:
        return max(asked.late_s, asked.excess_s)
    ahead_ms = backlog.late_ms + backlog.flex_ms
    if asked.alone_ms / 1e3 <= asked.ttft_s:
        return asked.late_s if ahead_ms else 0.0
    return asked.late_s if _excess(asked, ahead_ms, spare) > 0 else 0.0


def backlog_of(
    context: SchedulingContext, prompts: Iterable[Sequence], waiting: int, horizon_s: float = 0.0
) -> Backlog:
    """The backlog of the prompts that wait behind those that can be on time, by the first of them.

    `waiting`: how many wait there in all. `horizon_s`: the longest TTFT objective of a waiting prompt.
    """
    arrivals, late_ms, flex_ms = context.history.arrivals, 0.0, 0.0
    prompts = list(prompts)
    times = max(waiting / (len(prompts) or 1), 1.0)
    for seq, ms in zip(prompts, works_of(prompts, context.history.times.cost), strict=True):
        if seq.deadline.next < inf:
            late_ms += ms
        else:
            flex_ms += ms
    return Backlog(
        late_ms=late_ms * times,
        flex_ms=flex_ms * times,
        timed=arrivals.above(0.0),
        offered=arrivals.offered,
        horizon_s=max(horizon_s, context.limits.longest_ttft_s) or inf,
        recent=arrivals.recent(context.limits.weights),
        lump_ms=arrivals.lump_ms,
        turns_away=arrivals.turns_away(context.now),
        idle=context.history.idle.share(context.now),
    )


def works_of(prompts: Iterable[Sequence], cost: StepCost) -> list[float]:
    """The work that is left of each prompt, ms: `StepCost.prefill` written out, because each step asks."""
    works, per_prefill, per_pair = list[float](), cost.per_prefill, cost.per_pair
    for seq in prompts:
        if seq.slot >= 0:
            done = seq.kv.computed
        else:
            expected, most = seq.expected, seq.prompt_len - 1
            done = expected if expected < most else most
        count = len(seq.tokens) + seq.in_flight - done
        works.append(count * (per_prefill + per_pair * (done + count / 2)))
    return works


def gives_way(seq: Sequence, cost: StepCost) -> bool:
    """Whether an admitted prompt may be refused for the sake of others, rather than be late.

    A short one is not, because that would gain nothing: others that come would be as short.
    """
    if seq.request.objective.on_miss == "reject":
        return True
    ttft_ms = (min(seq.deadline.start, seq.deadline.whole) - seq.request.arrival) * 1e3
    return cost.prefill(seq.done, seq.length - seq.done) > SHORT_PROMPT * ttft_ms


def may_refuse(seq: Sequence) -> bool:
    """Whether a sequence may still be refused: it has not started, and does not ask to be served late."""
    return seq.started is None and seq.request.objective.on_miss != "late"


def beyond_their_limit(
    first: Iterable[tuple[Rank, Sequence]], cost: StepCost, rate: float, now: float
) -> list[Sequence]:
    """Those to refuse of the ones that go first, in order: their first tokens would come after their limits.

    `rate`: work done in a second, ms.
    """
    ends, beyond, first = now, list[Sequence](), list(first)
    if not any(may_refuse(seq) for _, seq in first):
        return beyond
    for (rank, seq), ms in zip(first, works_of([seq for _, seq in first], cost), strict=True):
        done = ends + ms / rate
        if done > rank.order and may_refuse(seq):
            beyond.append(seq)
        else:
            ends = done
    return beyond


def longest_wait_s(ttft_s: float, alone_ms: float) -> float:
    """How long after its arrival a request has its first token at the latest. `ttft_s`: inf without one."""
    return FLEX_WAIT_S if ttft_s == inf else LATEST * max(ttft_s, alone_ms / 1e3)


def longest_wait_of(seq: Sequence, cost: StepCost) -> float:
    """`longest_wait_s` of a sequence."""
    ttft_s = FLEX_WAIT_S if seq.deadline.emitted else seq.deadline.start - seq.request.arrival
    return longest_wait_s(ttft_s, cost.base + cost.prefill(0, seq.prompt_len))


def goes_first_at(seq: Sequence, cost: StepCost, ahead_ms: float = 0.0, rate: float = FIRST_RATE) -> float:
    """When a sequence goes before all others, so that its prompt is done by its limit.

    `ahead_ms`: the work of prompts that may have to go first before it; `rate`: work done in a second, ms.
    """
    wait_s = longest_wait_of(seq, cost)
    work_ms = ahead_ms + cost.prefill(seq.done, seq.length - seq.done)
    return seq.request.arrival + wait_s - max(LEAD * wait_s, work_ms / rate)


def first_rank(seq: Sequence, cost: StepCost) -> Rank:
    """The rank of a sequence that goes before all others: by its limit."""
    return Rank(TIMED, FIRST, seq.request.arrival + longest_wait_of(seq, cost), seq.request.id)


def latest_of(deadlines: list[Deadline], soonest: float) -> list[float]:
    """When each stream must emit: before its pause is too long, or if that is lost, before it is late.

    One that is late or has no deadline is here because it has paused too long, and must emit at once.
    """
    overdue = soonest + OVERDUE_S
    return [
        overdue if due.late or due.next == inf else due.latest if due.latest >= soonest else due.next
        for due in deadlines
    ]


def _excess(asked: Newcomer, ahead_ms: float, share: float) -> float:
    """The seconds until a share of the time suffices for the work ahead and the prompt."""
    return (ahead_ms + asked.alone_ms) / (share * 1e3) - asked.wait_s if ahead_ms else 0.0
