"""What a model's time allows: the one estimate that the scheduler and admission share.

Pure numbers that fit in a message. It knows neither sequences nor queues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from typing import NamedTuple

from msgspec import Struct, structs

from stretto.deadlines import Deadline
from stretto.engine.scheduler.moore_hodgson import Job, tardy_jobs
from stretto.engine.step_time import StepCost

LONGEST_STEP_BASES = 20  # a step that no stream waits for takes so many bases: the base is then 5 % of it
SHORTEST_LIMIT_MS = 20.0  # and this long at least
LEAST_PREFILL = 0.03  # of the time is left for prompts, however many streams there are
LEAST_LIGHTER = 0.25  # of the time for prompts is left for lighter ones, whatever arrives
CAUTION = 0.7  # of the time that heavier prompts seem to leave is counted on
SLACK_S = 40.0  # streams that are early use up their slack in so long while prompts are pressed for time
SLOWEST = 20.0  # times its pace is the slowest that a stream is expected to have then
MAX_STREAM_LOAD = 0.9  # no prompt may become a stream if streams would then take more of the time


def step_limit(cost: StepCost) -> float:
    """How long a step may take that no stream waits for, ms.

    A longer one would gain little and keep the next request from starting.
    """
    return max(LONGEST_STEP_BASES * cost.base, SHORTEST_LIMIT_MS)


class Group(NamedTuple):
    """The prompts of one weight."""

    start: float  # when the first one starts
    pace: float  # work done in a second, ms, as far as it can be counted on
    likely: float  # the same without caution
    end: float  # of the last one that is not deferred
    busy_ms: float  # the work of those that are not deferred, and of heavier ones
    all_ms: float  # the same of all


class Deferral(NamedTuple):
    """Which prompts must be deferred, and when the prompts of each weight run."""

    late_by: dict[
        int, float
    ]  # by index over all groups, the seconds by which each deferred one would be late
    groups: dict[float, Group]  # by weight
    rate: float  # work for prompts that is done in a second if nothing else comes, ms


class Estimate(Struct, frozen=True, array_like=True):
    """The time that a model's streams leave over for prompts."""

    cost: StepCost
    margin: float  # a prediction times this holds for most steps
    streams: int = 0
    itl_ms: float = inf  # the shortest inter-token target of a stream
    load: float = 0.0  # share of the time that the streams take at their slowest pace
    elsewhere: float = 0.0  # the share that the streams of other models on the device take

    @property
    def pressure(self) -> float:
        """The share of the time that the streams take at their slowest pace, with their steps' bases."""
        return self.cost.base / self.itl_ms + self.load if self.streams else 0.0

    @property
    def stretches(self) -> bool:
        """Whether a step may become longer when streams are `patient`."""
        return self.itl_ms < step_limit(self.cost)

    def rate(self, itl_ms: float = inf) -> float:
        """The share of the time left for prompts. `itl_ms`: the target of a stream that may be added."""
        base = self.cost.base / min(self.itl_ms, itl_ms, step_limit(self.cost))
        return max(1.0 / self.margin - base - self.load - self.elsewhere, LEAST_PREFILL)

    def bears(self, length: int, itl_ms: float, heavier: float) -> bool:
        """Whether all streams would keep their pace if a prompt of `length` tokens became one of them.

        `heavier` is the share of the time that heavier prompts will take.
        """
        taken = self.cost.base / min(itl_ms, self.itl_ms) + self.load + self.elsewhere
        return taken + self.cost.row(length) / itl_ms < MAX_STREAM_LOAD / self.margin - heavier

    def defer(
        self,
        groups: Mapping[float, Sequence[Job]],
        heavier: Callable[[float], float],
        start: float,
        itl_ms: float = inf,
    ) -> Deferral:
        """Which prompts cannot be on time without making more, or weightier ones, late.

        `groups` holds the prompts by weight, the greatest first. A job is a prompt's deadline, its
        milliseconds and its worth. A lighter prompt has the time that heavier ones leave, and that heavier
        ones to come will leave: those take `heavier(weight)` of the time. `itl_ms` is the target of a stream
        that may be added.
        """
        rate = self.rate(itl_ms)
        deferral = Deferral({}, {}, 1e3 * rate)
        first, work, put_off = 0, 0.0, 0.0
        for weight, jobs in groups.items():
            share = heavier(weight)
            likely = 1e3 * max(rate - share, LEAST_LIGHTER * rate)
            pace = likely * CAUTION if share else likely
            begin = start
            tardy, start = tardy_jobs(jobs, begin, pace)
            work += (start - begin) * pace
            for place, excess in tardy.items():
                deferral.late_by[first + place] = excess
                put_off += jobs[place][1]
            deferral.groups[weight] = Group(begin, pace, likely, start, work, work + put_off)
            first += len(jobs)
        return deferral


def patient(
    estimate: Estimate, streams: Iterable[tuple[Deadline, int]], now: float
) -> tuple[Estimate, float]:
    """What streams leave over while those that are early pause longer, and when the first must emit.

    Each stream has its deadline and its tokens. One that is early may pause as long as a step takes that no
    stream waits for, and not beyond the deadline of its next token. Its pace is slower until its slack is
    used up.
    """
    longest_s, per_decode, per_key = (
        step_limit(estimate.cost) / 1e3,
        estimate.cost.per_decode,
        estimate.cost.per_key,
    )
    itl_s, load, tightest, least, slack_s = inf, 0.0, inf, 1.0 / SLOWEST, SLACK_S
    for deadline, length in streams:
        due = deadline.next
        if due < now or deadline.late:
            continue
        latest, target = deadline.latest, deadline.target_itl_s
        if due > latest and deadline.whole == inf:
            latest = deadline.last_emission + (longest_s if longest_s > target else target)
            if due < latest:
                latest = due
            share = 1.0 - (due - now) / slack_s
            target /= share if share > least else least
        if latest < tightest:
            tightest = latest
        if target < itl_s:
            itl_s = target
        load += (per_decode + per_key * length) / target
    return structs.replace(estimate, itl_ms=itl_s * 1e3, load=load / 1e3), tightest
