"""What a newcomer would find at each variant: the queues and streams of an engine, ready for quick questions.

It reads the snapshots that admission reads and applies the same estimate. Models of one engine take turns, so
the prompts and streams of all of them count. What a snapshot says is worked out once, not for each request.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import NamedTuple

from stretto.deadlines import Deadline
from stretto.engine.scheduler.admission import Outlook, Snapshot
from stretto.types import Objective

LEAST_PACE = 0.02  # of the time: what a prompt is counted on to get, however full the machine is


class Standing(NamedTuple):
    """Where a newcomer would stand with one variant. `queue_ms`: until its first step. `pace`: the share of
    the time that its prompt then gets. `beside_ms`: the steps of other models between two of its own."""

    seen: Snapshot
    queue_ms: float
    pace: float
    beside_ms: float
    crowded: bool


@dataclass(frozen=True, slots=True)
class PreparedSnapshot:
    """One model's snapshot. `waiting`: by falling weight, the deadlines of the prompts that can be on time
    and the work until each of them is done. `pressure`: the share of the time that its streams take at least.
    """

    seen: Snapshot
    waiting: tuple[tuple[float, list[float], list[float]], ...]
    pressure: float
    step_ms: float

    @classmethod
    def of(cls, seen: Snapshot) -> PreparedSnapshot:
        """Leaves out the prompts that the scheduler would defer."""
        estimate = seen.estimate
        if not any(seen.prompts.values()):
            return cls(seen, (), estimate.pressure, _step_ms(seen))
        late = estimate.defer(seen.prompts, lambda weight: seen.inflow.get(weight, 0.0), seen.now).late_by
        waiting: list[tuple[float, list[float], list[float]]] = []
        first = 0
        for weight, jobs in seen.prompts.items():
            kept = [job for index, job in enumerate(jobs, first) if index not in late]
            first += len(jobs)
            if kept:
                work = list(accumulate(ms for _, ms, _ in kept))
                waiting.append((weight, [deadline for deadline, _, _ in kept], work))
        return cls(seen, tuple(waiting), estimate.pressure, _step_ms(seen))

    def ahead_ms(self, weight: float, deadline: float) -> float:
        """The work of the prompts that go before one of this weight and deadline."""
        total = 0.0
        for other, deadlines, work in self.waiting:
            if other > weight:
                total += work[-1]
            elif other == weight and (place := bisect_right(deadlines, deadline)):
                total += work[place - 1]
        return total


class Prospects:
    """The standings of newcomers, from the outlooks of an engine's models."""

    def __init__(self, outlooks: Callable[[], Mapping[str, Outlook]]) -> None:
        self._outlooks = outlooks
        self._prepared: dict[str, PreparedSnapshot] = {}

    def standings(
        self,
        models: Mapping[str, object],
        objective: Objective,
        weight: float,
        arrival: float,
        length: int,
        cached: Mapping[str, int],
    ) -> dict[str, Standing]:
        """Where a request would stand with each of these models; none for a model without a snapshot.

        Its prompt has `length` tokens, its tier this weight. `cached`: how many of them a model has computed.
        """
        outlooks = self._outlooks()
        prepared = self._current(outlooks)
        deadline = Deadline.of(arrival, objective)
        first, itl_ms = deadline.of_token(0), deadline.itl_s * 1e3
        ahead: dict[str, float] = {}
        pressure = steps_ms = 0.0
        for name, each in prepared.items():
            ahead[name] = each.ahead_ms(weight, first) + _sent_ms(outlooks[name], weight, first)
            pressure += each.pressure
            steps_ms += each.step_ms
        waiting = [ms for ms in ahead.values() if ms]
        found: dict[str, Standing] = {}
        for name in models:
            each = prepared.get(name)
            if each is None:
                continue
            estimate, heavier = each.seen.estimate, each.seen.inflow.get(weight, 0.0)
            pace = max(estimate.rate(itl_ms) - heavier, LEAST_PACE)
            others = 0.0
            if waiting:
                known = cached.get(name, 0)
                own = ahead[name] + estimate.cost.prefill(known, length - known)
                others = sum([ms if ms < own else own for ms in waiting]) - ahead[name]
            beside = steps_ms - each.step_ms
            if beside and itl_ms == inf:
                # Only the whole is due, so a mean counts: other streams take their share.
                own = estimate.margin * estimate.cost.decodes(
                    estimate.streams + 1, each.seen.context + length
                )
                share = min(pressure - each.pressure, 1.0 - LEAST_PACE)
                beside = min(beside, own * share / (1.0 - share))
            crowded = itl_ms < inf and pressure > 0 and not estimate.bears(length, itl_ms, heavier)
            found[name] = Standing(each.seen, (ahead[name] + others) / pace, pace, beside, crowded)
        return found

    def backlog_ms(self) -> float:
        """The work of all prompts with deadlines that wait, on all models."""
        return sum(outlook.backlog_ms for outlook in self._outlooks().values())

    def _current(self, outlooks: Mapping[str, Outlook]) -> dict[str, PreparedSnapshot]:
        prepared = self._prepared
        for name, outlook in outlooks.items():
            seen = outlook.seen
            known = prepared.get(name)
            if seen is None:
                prepared.pop(name, None)
            elif known is None or known.seen is not seen:
                prepared[name] = PreparedSnapshot.of(seen)
        return prepared


def _sent_ms(outlook: Outlook, weight: float, deadline: float) -> float:
    """The work of the prompts that were sent since the snapshot and go before one of this weight."""
    sent = outlook.sent_since
    if not sent:
        return 0.0
    return sum(
        [job[1] for _, other, job in sent if other > weight or (other == weight and job[0] <= deadline)]
    )


def _step_ms(seen: Snapshot) -> float:
    """What a step of the streams takes; 0 without streams."""
    estimate = seen.estimate
    return (
        estimate.margin * estimate.cost.decodes(estimate.streams, seen.context) if estimate.streams else 0.0
    )
