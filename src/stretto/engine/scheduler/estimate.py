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
NEXT_ENDS = 16  # so many of the next answers that end tell when places become free


def step_limit(cost: StepCost) -> float:
    """How long a step may take that no stream waits for, ms.

    A longer one would gain little and keep the next request from starting.
    """
    return max(LONGEST_STEP_BASES * cost.base, SHORTEST_LIMIT_MS)


def ends_of(left: Sequence[int], step_ms: float) -> tuple[float, ...]:
    """After how many seconds the next running sequences end, the first of them first, at most `NEXT_ENDS`.

    `left`: the tokens that each still has. `step_ms`: what a step of all takes, without prompts.
    """
    return tuple(tokens * step_ms / 1e3 for tokens in sorted(left)[:NEXT_ENDS])


class Group(NamedTuple):
    """The prompts of one weight."""

    start: float  # when the first one starts
    pace: float  # work done in a second, ms, as far as it can be counted on
    likely: float  # the same without caution
    end: float  # of the last one that is not deferred
    busy_ms: float  # the work of those that are not deferred, and of heavier ones
    all_ms: float  # the same of all
    flow: float = inf  # `pace`, as far as places allow: work done in a second of prompts that wait for places


class Deferral(NamedTuple):
    """Which prompts must be deferred, and when the prompts of each weight run."""

    late_by: dict[
        int, float
    ]  # by index over all groups, the seconds by which each deferred one would be late
    groups: dict[float, Group]  # by weight
    rate: float  # work for prompts that is done in a second if nothing else comes, ms
    most: float  # `rate`, as far as places allow


class Estimate(Struct, frozen=True, array_like=True):
    """The time that a model's streams leave over for prompts."""

    cost: StepCost
    margin: float  # a prediction times this holds for most steps
    streams: int = 0
    itl_ms: float = inf  # the shortest inter-token target of a stream
    load: float = 0.0  # share of the time that the streams take at their slowest pace
    elsewhere: float = 0.0  # the share that the streams of other models on the device take
    places: int = 1 << 30  # so many prompts can start at once; those after them wait for sequences to end
    place_s: float = 0.0  # the first of those waits so much longer than the others
    place_pace: float = inf  # sequences that end in a second leave their places to prompts of so many ms

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
        rate, late_by, made = self.rate(itl_ms), dict[int, float](), dict[float, Group]()
        first, work, put_off, most = 0, 0.0, 0.0, 1e3 * rate
        for weight, jobs in groups.items():
            share = heavier(weight)
            likely = 1e3 * max(rate - share, LEAST_LIGHTER * rate)
            pace = flow = likely * CAUTION if share else likely
            begin, free = start, self.places - first
            if len(jobs) > max(free, 0):
                flow = 1.0 / (1.0 / pace + 1.0 / self.place_pace)
                most = 1.0 / (1e-3 / rate + 1.0 / self.place_pace)
                jobs = self._behind_places(jobs, free, pace / flow, pace)
                begin += self.place_s if free == 0 else 0.0
            tardy, start = tardy_jobs(jobs, begin, pace)
            work += (start - begin) * pace
            for place, excess in tardy.items():
                late_by[first + place] = excess
                put_off += jobs[place][1]
            made[weight] = Group(begin, pace, likely, start, work, work + put_off, flow)
            first += len(jobs)
        return Deferral(late_by, made, 1e3 * rate, most)

    def _behind_places(self, jobs: Sequence[Job], free: int, longer: float, pace: float) -> list[Job]:
        """The jobs, of which those beyond the free places take so many times longer: they wait for places.

        The first of them also waits for the first place, except when none is free: then all of them do.
        """
        some = max(free, 0)
        first_ms = self.place_s * pace if free > 0 else 0.0
        waiting = [(due, work * longer, worth) for due, work, worth in jobs[some:]]
        due, work, worth = waiting[0]
        return [*jobs[:some], (due, work + first_ms, worth), *waiting[1:]]


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
