"""What a newcomer would find at each variant: the queues and streams of an engine, ready for quick questions.

It reads the snapshots that admission reads and applies the same estimate. Models of one engine take turns, so
the prompts and streams of all of them count. What a snapshot says is worked out once, not for each request.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import NamedTuple

from stretto.deadlines import first_due
from stretto.engine.scheduler.admission import Outlook, Snapshot
from stretto.types import Objective

MOST_ROOMS = 16  # kinds of newcomers whose room is remembered between two snapshots
SURE_PACE = 0.1  # of the rate at which prompts run: the scheduler counts on more, whatever may come
WaitingPrompt = tuple[float, float, float]  # its deadline, its work in ms and its worth
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
        groups = {weight: jobs for weight, jobs in seen.prompts.items() if jobs}
        if not groups:
            return cls(seen, (), estimate.pressure, _step_ms(seen))
        late: Mapping[int, float] = {}
        if not _all_fit(seen, groups):
            late = estimate.defer(groups, lambda weight: seen.inflow.get(weight, 0.0), seen.now).late_by
        waiting: list[tuple[float, list[float], list[float]]] = []
        first = 0
        for weight, jobs in groups.items():
            kept = [job for index, job in enumerate(jobs, first) if index not in late] if late else jobs
            first += len(jobs)
            if kept:
                work = list(accumulate([ms for _, ms, _ in kept]))
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


class Room(NamedTuple):
    """What a model's snapshot leaves for a newcomer of one weight and inter-token target. `pace`: the share
    of the time that its prompt gets. `heavier`: that which heavier arrivals take."""

    prepared: PreparedSnapshot
    pace: float
    heavier: float


class Prospects:
    """The standings of newcomers, from the outlooks of an engine's models."""

    def __init__(self, outlooks: Callable[[], Mapping[str, Outlook]]) -> None:
        self._outlooks = outlooks
        self._prepared: dict[str, PreparedSnapshot] = {}
        self._pressure = self._steps_ms = 0.0  # of all models
        self._rooms: dict[tuple[float, float], dict[str, Room]] = {}  # by weight and inter-token target

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
        first = first_due(arrival, objective)
        itl_ms = inf if objective.itl_ms is None else objective.itl_ms
        rooms = self._rooms.get((weight, itl_ms)) or self._room(weight, itl_ms)
        ahead: dict[str, float] = {}
        for name, each in prepared.items():
            ms, sent = each.ahead_ms(weight, first), outlooks[name].sent_since
            ahead[name] = ms + _sent_ms(sent, weight, first) if sent else ms
        waiting = [ms for ms in ahead.values() if ms]
        pressure, paced = self._pressure, itl_ms < inf
        found: dict[str, Standing] = {}
        for name in models:
            room = rooms.get(name)
            if room is None:
                continue
            each, pace, heavier = room
            seen, before = each.seen, ahead[name]
            estimate = seen.estimate
            if waiting:
                known = cached.get(name, 0) if cached else 0
                own = before + estimate.cost.prefill(known, length - known)
                before += sum([ms if ms < own else own for ms in waiting]) - before
            beside = self._steps_ms - each.step_ms
            if beside and not paced:
                # Only the whole is due, so a mean counts: other streams take their share.
                own = estimate.margin * estimate.cost.decodes(estimate.streams + 1, seen.context + length)
                share = min(pressure - each.pressure, 1.0 - LEAST_PACE)
                beside = min(beside, own * share / (1.0 - share))
            crowded = paced and pressure > 0 and not estimate.bears(length, itl_ms, heavier)
            found[name] = Standing(seen, before / pace, pace, beside, crowded)
        return found

    def _room(self, weight: float, itl_ms: float) -> dict[str, Room]:
        """The room for such newcomers, kept until a model has another snapshot."""
        found: dict[str, Room] = {}
        for name, each in self._prepared.items():
            heavier = each.seen.inflow.get(weight, 0.0)
            pace = max(each.seen.estimate.rate(itl_ms) - heavier, LEAST_PACE)
            found[name] = Room(each, pace, heavier)
        if len(self._rooms) < MOST_ROOMS:
            self._rooms[weight, itl_ms] = found
        return found

    def backlog_ms(self) -> float:
        """The work of all prompts with deadlines that wait, on all models."""
        return sum(outlook.backlog_ms for outlook in self._outlooks().values())

    def _current(self, outlooks: Mapping[str, Outlook]) -> dict[str, PreparedSnapshot]:
        prepared, changed = self._prepared, False
        for name, outlook in outlooks.items():
            seen, known = outlook.seen, prepared.get(name)
            if known is None:
                if seen is None:
                    continue
            elif known.seen is seen:
                continue
            changed = True
            if seen is None:
                del prepared[name]
            else:
                prepared[name] = PreparedSnapshot.of(seen)
        if changed:
            self._rooms.clear()
            self._pressure = self._steps_ms = 0.0
            for each in prepared.values():
                self._pressure += each.pressure
                self._steps_ms += each.step_ms
        return prepared


def _all_fit(seen: Snapshot, groups: Mapping[float, Sequence[WaitingPrompt]]) -> bool:
    """Whether all prompts are done before the first one is due even at a slower pace than the scheduler
    counts on, so that it defers none. It says no in doubt, and saves most of `Estimate.defer` else."""
    work = sum([ms for jobs in groups.values() for _, ms, _ in jobs])
    due = min([jobs[0][0] for jobs in groups.values()])  # they are in order of deadline
    return work < (due - seen.now) * 1e3 * SURE_PACE * seen.estimate.rate()


def _sent_ms(sent: Sequence[tuple[int, float, WaitingPrompt]], weight: float, deadline: float) -> float:
    """The work of the prompts that were sent since the snapshot and go before one of this weight."""
    return sum(
        [job[1] for _, other, job in sent if other > weight or (other == weight and job[0] <= deadline)]
    )


def _step_ms(seen: Snapshot) -> float:
    """What a step of the streams takes; 0 without streams."""
    estimate = seen.estimate
    return (
        estimate.margin * estimate.cost.decodes(estimate.streams, seen.context) if estimate.streams else 0.0
    )
