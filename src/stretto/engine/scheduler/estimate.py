"""What a model's time allows: the one estimate that the scheduler and admission share.

Pure numbers that fit in a message. It knows neither sequences nor queues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from math import inf
from operator import attrgetter
from typing import NamedTuple

from msgspec import Struct

from stretto.engine.scheduler.moore_hodgson import Job, tardy_jobs
from stretto.engine.step_time import StepCost

LONGEST_STEP_BASES = 20  # a step that no stream waits for takes so many bases: the base is then 5 % of it
SHORTEST_LIMIT_MS = 20.0  # and this long at least
LEAST_PREFILL = 0.03  # of the time is left for prompts, however many streams there are
LEAST_LIGHTER = 0.25  # of the time for prompts is left for lighter ones, whatever arrives
CAUTION = 0.7  # of the time that heavier prompts seem to leave is counted on
MAX_STREAM_LOAD = 0.9  # no prompt may become a stream if streams would then take more of the time


def step_limit(cost: StepCost) -> float:
    """How long a step may take that no stream waits for, ms.

    A longer one would gain little and keep the next request from starting.
    """
    return max(LONGEST_STEP_BASES * cost.base, SHORTEST_LIMIT_MS)


class PromptWork(NamedTuple):
    """A prompt to compute: the weight of its tier, the deadline of its first token, and its milliseconds."""

    weight: float
    deadline: float
    ms: float
    worth: float = 0.0  # of equal weight, the prompt of the least worth is deferred first


class Deferral(NamedTuple):
    """Which prompts must be deferred, by index, with the seconds by which each would be late; and for each
    weight when its first prompt starts, and how many milliseconds of its work are done in a second."""

    late_by: dict[int, float]
    groups: dict[float, tuple[float, float]]


class Estimate(Struct, frozen=True, array_like=True):
    """The time that a model's streams leave over for prompts."""

    cost: StepCost
    margin: float  # a prediction times this holds for most steps
    streams: int = 0
    itl_ms: float = inf  # the shortest inter-token target of a stream
    load: float = 0.0  # share of the time that the streams take at their slowest pace

    def bears(self, length: int, itl_ms: float, heavier: float) -> bool:
        """Whether all streams would keep their pace if a prompt of `length` tokens became one of them.

        `heavier` is the share of the time that heavier prompts will take.
        """
        base = self.cost.base / min(itl_ms, self.itl_ms)
        return base + self.load + self.cost.row(length) / itl_ms < MAX_STREAM_LOAD / self.margin - heavier

    def defer(
        self,
        prompts: Sequence[PromptWork],
        heavier: Callable[[float], float],
        start: float,
        itl_ms: float = inf,
    ) -> Deferral:
        """Which prompts cannot be on time without making more, or weightier, ones late.

        `prompts` are in order of falling weight, then of deadline. A lighter prompt has the time that heavier
        ones leave, and that heavier ones to come will leave: those take `heavier(weight)` of the time.
        `itl_ms` is the target of a stream that may be added.
        """
        base = self.cost.base / min(self.itl_ms, itl_ms, step_limit(self.cost))
        rate = max(1.0 / self.margin - base - self.load, LEAST_PREFILL)
        late_by: dict[int, float] = {}
        groups: dict[float, tuple[float, float]] = {}
        first = 0
        for weight, group in groupby(prompts, key=attrgetter("weight")):
            share = heavier(weight)
            pace = 1e3 * max(rate - share, LEAST_LIGHTER * rate) * (CAUTION if share else 1.0)
            jobs: list[Job] = [(due, ms / pace, worth) for _, due, ms, worth in group]
            tardy = tardy_jobs(jobs, start)
            groups[weight] = start, pace
            start += sum(job[1] for place, job in enumerate(jobs) if place not in tardy)
            late_by.update((first + place, excess) for place, excess in tardy.items())
            first += len(jobs)
        return Deferral(late_by, groups)
