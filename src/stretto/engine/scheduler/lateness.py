"""How late an answer may be: the one rule by which a request is admitted, waits, and goes first.

A request has its first token by its limit, or it is refused, nearly always when it arrives. The limit is
`LATEST` times its TTFT objective, or `FLEX_WAIT_S` without one. In its last quarter it goes first. A
request with `on_miss="late"` is never refused. Pure numbers, which the scheduler and admission share.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush
from math import inf
from typing import NamedTuple

from msgspec import Struct, structs

from stretto.engine.scheduler.estimate import Deferral
from stretto.engine.scheduler.types import SchedulingContext
from stretto.engine.sequence import TIMED, Rank, Sequence
from stretto.engine.step_time import StepCost

LATEST = 3.0  # times the TTFT objective, or the time that the prompt takes alone if that is longer
FLEX_WAIT_S = 600.0  # the longest wait of a request without a TTFT objective
LEAD = 0.25  # of its longest wait a request goes first; prompts without an objective may fill so much of it
PAUSE_S = 3.0  # a stream that is late or has no objective pauses at most so long
RESUME_S = 10.0  # after so long a preempted sequence goes first
FREE = 0.3, 0.15  # of the longest TTFT objective; while less work waits, prompts without one are admitted
RESERVE = 8.0, 24.0  # beyond it they leave room for so many more like them; at other times and in overload
OVERLOAD = 1.0  # of the time: more prompt work than this that comes is an overload
OVERLOAD_FLEX = 0.1  # of the time is counted on for prompts without an objective in overload
MOST = 0.9  # of the time that others leave is counted on for prompts without an objective
ADMITTED = 1.0  # what an admitted prompt is worth more than a newcomer, in steps of `Fairness.worth`
FIRST = -inf  # the negated weight of those that go first


class Alarms:
    """When requests go first. One that has started or ended by then keeps its alarm, which nobody needs."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []

    def add(self, at: float, ident: int) -> None:
        """Have a request go first from `at` on."""
        heappush(self._heap, (at, ident))

    def due(self, now: float) -> list[int]:
        """Take the ids of those whose time has come."""
        due: list[int] = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heappop(self._heap)[1])
        return due


class Backlog(Struct, frozen=True, array_like=True):
    """The admitted prompts that have no place among those that can be on time, and the rates of arrival."""

    late_ms: float = 0.0  # prompts with a TTFT objective that will miss it
    flex_ms: float = 0.0  # prompts without a TTFT objective
    timed: float = 0.0  # share of the recent time that prompts which can be on time were admitted for
    offered: float = 0.0  # prompt work that came recently, refused or not, as a share of the time
    horizon_s: float = inf  # the longest TTFT objective of a tier, or of a waiting prompt if that is longer

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


class Prompt(NamedTuple):
    """A prompt and its TTFT objective."""

    alone_ms: float
    arrival: float
    deadline: float  # of its first token; inf without one
    weight: float


def newcomer(prompt: Prompt, deferral: Deferral, late_s: float, backlog: Backlog, now: float) -> Newcomer:
    """What a prompt asks for. `late_s`: by how much it would be late as more comes, by `deferral`.

    In an overload more is sure to come. Otherwise it is late only if it is so without caution.
    """
    timed, weight, rate = prompt.deadline < inf, prompt.weight, deferral.rate
    if not timed:
        weight = min(deferral.groups, default=weight)
    group, busy_s = deferral.groups.get(weight), 0.0
    if backlog.overload and group is not None:
        busy_s, rate = group.end - now, group.pace
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
    )


def shortfall(asked: Newcomer, backlog: Backlog) -> float:
    """The seconds after which a prompt could be admitted if nothing else came; 0: it is admitted now.

    While many prompts wait, one without an objective must leave room for several more like it, so only short
    ones are admitted. This is trunk reservation, which is close to optimal when more comes than can be served
    (Reiman, Queueing Systems 8, 1991). One that will be late is admitted if none like it waits.
    """
    overload = backlog.overload
    spare = OVERLOAD_FLEX if overload else max(LEAD, MOST - backlog.timed)
    if asked.ttft_s == inf:
        own_s, horizon_s = asked.alone_ms / asked.rate, backlog.horizon_s
        excess = _excess(asked, backlog.flex_ms, spare)
        if asked.busy_s > FREE[overload] * horizon_s:
            excess = max(excess, (1 + RESERVE[overload]) * own_s + asked.busy_s - horizon_s)
        return max(excess, 0.0)
    if asked.late_s <= 0 or overload:
        return asked.late_s
    ahead_ms = backlog.late_ms + backlog.flex_ms
    if asked.alone_ms / 1e3 <= asked.ttft_s:
        return asked.late_s if ahead_ms else 0.0
    return asked.late_s if _excess(asked, ahead_ms, spare) > 0 else 0.0


def backlog_of(context: SchedulingContext, prompts: Iterable[Sequence], horizon_s: float = 0.0) -> Backlog:
    """The backlog of these prompts, which wait behind those that can be on time.

    `horizon_s`: the longest TTFT objective of a waiting prompt.
    """
    arrivals, late_ms, flex_ms = context.history.arrivals, 0.0, 0.0
    per_prefill, per_pair = context.history.times.cost.per_prefill, context.history.times.cost.per_pair
    for seq in prompts:
        done = seq.done
        count = len(seq.tokens) - done
        ms = count * (per_prefill + per_pair * (done + count / 2))
        if seq.deadline.next < inf:
            late_ms += ms
        else:
            flex_ms += ms
    targets = [tier.objective.ttft_ms for tier in context.limits.tiers.values()]
    return Backlog(
        late_ms=late_ms,
        flex_ms=flex_ms,
        timed=arrivals.above(0.0),
        offered=arrivals.offered,
        horizon_s=max((horizon_s, *(ms / 1e3 for ms in targets if ms is not None))) or inf,
    )


def longest_wait_s(ttft_s: float, alone_ms: float) -> float:
    """How long after its arrival a request has its first token at the latest. `ttft_s`: inf without one."""
    return FLEX_WAIT_S if ttft_s == inf else LATEST * max(ttft_s, alone_ms / 1e3)


def longest_wait_of(seq: Sequence, cost: StepCost) -> float:
    """`longest_wait_s` of a sequence."""
    ttft_s = FLEX_WAIT_S if seq.deadline.emitted else seq.deadline.start - seq.request.arrival
    return longest_wait_s(ttft_s, cost.base + cost.prefill(0, seq.prompt_len))


def goes_first_at(seq: Sequence, cost: StepCost) -> float:
    """When a sequence that has not started goes before all others."""
    return seq.request.arrival + (1 - LEAD) * longest_wait_of(seq, cost)


def first_rank(seq: Sequence, cost: StepCost) -> Rank:
    """The rank of a sequence that goes before all others: by its limit."""
    return Rank(TIMED, FIRST, seq.request.arrival + longest_wait_of(seq, cost), seq.request.id)


def _excess(asked: Newcomer, ahead_ms: float, share: float) -> float:
    """The seconds until a share of the time suffices for the work ahead and the prompt."""
    return (ahead_ms + asked.alone_ms) / (share * 1e3) - asked.wait_s if ahead_ms else 0.0
