"""Whether a request would be on time if it came now: an answer before any work, from a snapshot.

Pure. It asks the scheduler's own estimate, on numbers that fit in a message, so whoever chooses between
models or machines can ask without asking the engine.
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
from stretto.engine.scheduler.estimate import Estimate, PromptWork
from stretto.engine.scheduler.types import SchedulingContext, tier_weight
from stretto.engine.sequence import TIMED
from stretto.types import Request

MAX_PROMPTS = 64
SOONEST_S = 0.05  # the shortest time after which a client is told to try again


class Snapshot(Struct, frozen=True, kw_only=True, array_like=True):
    """An engine's work at `now`. Its size is bounded."""

    now: float
    newest: int  # the id of the newest request that it includes
    estimate: Estimate
    context: int  # keys that a step reads for the streams
    prompts: tuple[PromptWork, ...]  # by falling weight, then deadline
    inflow: dict[float, float]  # for each weight, the share of the time that heavier arrivals take
    lengths: dict[str, int]  # tokens of a long answer, by tier


class Forecast(NamedTuple):
    """What would become of a request. Times count from its arrival."""

    queue_ms: float  # until it starts
    ttft_ms: float  # until its first token
    feasible: bool  # whether all of it would be on time
    retry_after: float  # if not, seconds until it would be if nothing else came; inf: never on this machine


class Outlook:
    """What is known of an engine elsewhere: its last snapshot, and what was sent to it since."""

    def __init__(self, tiers: Mapping[str, Tier]) -> None:
        self._tiers = tiers
        self._seen: Snapshot | None = None
        self._sent: list[tuple[int, PromptWork]] = []

    def see(self, seen: Snapshot) -> None:
        """Take over a snapshot, and keep only what was sent after it."""
        self._seen = seen
        self._sent = [(ident, work) for ident, work in self._sent if ident > seen.newest]

    def sent(self, request: Request) -> None:
        """Record that a request is on its way to the engine."""
        due, seen = Deadline.of(request.arrival, request.objective).of_token(0), self._seen
        if seen is not None and due < inf and len(self._sent) < MAX_PROMPTS:
            ms = seen.estimate.cost.prefill(0, len(request.prompt))
            self._sent.append((request.id, PromptWork(tier_weight(self._tiers, request.tier), due, ms)))

    def forecast(self, request: Request, now: float) -> Forecast | None:
        """What would become of the request if it were sent now; None before the first snapshot."""
        seen = self._seen
        if seen is None:
            return None
        if self._sent:
            prompts = sorted([*seen.prompts, *(work for _, work in self._sent)], key=_order)
            seen = msgspec.structs.replace(seen, prompts=tuple(prompts))
        return predict(request, seen, tier_weight(self._tiers, request.tier), now)

    def work_ms(self, request: Request) -> float:
        """The machine time that a request is predicted to take, with its share of each step's base.

        0 before the first snapshot.
        """
        seen = self._seen
        if seen is None:
            return 0.0
        cost, length, tokens = seen.estimate.cost, len(request.prompt), _tokens(request, seen)
        base = cost.base / (seen.estimate.streams + 1)
        return cost.prefill(0, length) + tokens * (base + cost.row(length + tokens // 2))


def snapshot(context: SchedulingContext, newest: int) -> Snapshot:
    """What `predict` needs to know of an engine that has had the requests up to id `newest`."""
    times, queues, tiers = context.history.times, context.queues, context.limits.tiers
    cost = times.cost
    timed = [seq for seq in queues.running if seq.rank.group == TIMED and not seq.deadline.late]
    streams = [seq for seq in timed if seq.deadline.emitted]
    waiting = (seq for seq in queues.waiting if seq.rank.group <= TIMED and seq.deadline.next < inf)
    prompts = [*(seq for seq in timed if not seq.deadline.emitted), *islice(waiting, MAX_PROMPTS)]
    work = [
        PromptWork(
            tier_weight(tiers, seq.request.tier),
            seq.deadline.next,
            cost.prefill(seq.kv.computed, seq.length - seq.kv.computed),
        )
        for seq in prompts
    ]
    estimate = Estimate(
        cost=cost,
        margin=times.margin,
        streams=len(streams),
        itl_ms=min((seq.deadline.target_itl_s for seq in streams), default=inf) * 1e3,
        load=sum(cost.row(seq.length) / seq.deadline.target_itl_s for seq in streams) / 1e3,
    )
    weights = {0.0, *(tier.weight for tier in tiers.values())}
    return Snapshot(
        now=context.now,
        newest=newest,
        estimate=estimate,
        context=sum(seq.length for seq in streams),
        prompts=tuple(sorted(work, key=_order)),
        inflow={weight: context.history.arrivals.above(weight) for weight in weights},
        lengths={name: context.history.lengths.predict(name) for name in tiers},
    )


def predict(request: Request, seen: Snapshot, weight: float, now: float) -> Forecast:
    """What would become of a request in a tier of this weight if it were sent `now`.

    It is feasible when the scheduler would not defer it, the streams would keep their pace, and the whole
    answer (of a long one's length for its tier) would be on time.
    """
    cost, deadline, length = (
        seen.estimate.cost,
        Deadline.of(request.arrival, request.objective),
        len(request.prompt),
    )
    ms, due = cost.prefill(0, length), deadline.of_token(0)
    own = PromptWork(weight, due, ms + cost.base)  # it may wait for a step, so of equals it is deferred first
    place = bisect_right(seen.prompts, _order(own), key=_order)
    prompts = [*seen.prompts[:place], own, *seen.prompts[place:]]
    itl_ms = deadline.itl_s * 1e3
    deferral = seen.estimate.defer(prompts, lambda weight: seen.inflow.get(weight, 0.0), now, itl_ms)
    begin, pace = deferral.groups[weight]
    before = [index for index in range(place) if prompts[index].weight == weight]
    start = begin + sum(prompts[index].ms for index in before if index not in deferral.late_by) / pace
    first_token = start + own.ms / pace
    step_s = cost.decodes(seen.estimate.streams + 1, seen.context + length) / 1e3
    last_token = first_token + (_tokens(request, seen) - 1) * step_s
    excess = max(deferral.late_by.get(place, 0.0), first_token - due, last_token - deadline.whole, 0.0)
    alone = not seen.estimate.streams and not seen.prompts
    if not alone and not seen.estimate.bears(length, itl_ms, seen.inflow.get(weight, 0.0)):
        excess = max(excess, SOONEST_S)
    retry_after = 0.0
    if excess > 0:
        retry_after = inf if now + ms / 1e3 > due else max(excess, SOONEST_S)
    return Forecast(
        queue_ms=(start - request.arrival) * 1e3,
        ttft_ms=(first_token - request.arrival) * 1e3,
        feasible=excess <= 0,
        retry_after=retry_after,
    )


def _tokens(request: Request, seen: Snapshot) -> int:
    """The tokens of the answer if it is a long one of its tier."""
    wanted, usual = request.sampling.max_tokens, seen.lengths.get(request.tier, 1)
    return max(usual if wanted is None else min(wanted, usual), 1)


def _order(work: PromptWork) -> tuple[float, float]:
    return -work.weight, work.deadline
