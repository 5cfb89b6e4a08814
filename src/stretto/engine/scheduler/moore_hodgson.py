"""The most jobs that can be on time on one machine: who is left out so that the others are not late.

Pure arithmetic on due times, used for prompts that wait and for streams that crowd a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

Job = tuple[float, float, float]  # due, seconds of work, worth: where not all fit, the least worth gives way


def tardy_jobs(jobs: Sequence[Job], start: float) -> dict[int, float]:
    """The jobs (by index) that must give way for all others to be on time, each with the seconds by which it
    is too late.

    `jobs` are by due. Moore's algorithm for the fewest late jobs (Management Science 15, 1968), O(n log n):
    go through by due; when one would be late, leave out the longest so far. Jobs of more worth are never left
    out for ones of less. A job that could not be on time alone is left out at once and so delays nobody.
    """
    out: dict[int, float] = {}
    end = start
    for due, seconds, _ in jobs:
        end += seconds
        if end > due:
            break
    else:
        return out
    heap: list[tuple[float, float, int]] = []
    end = start
    for index, (due, seconds, worth) in enumerate(jobs):
        if start + seconds > due:
            out[index] = start + seconds - due
            continue
        end += seconds
        heappush(heap, (worth, -seconds, index))
        while end > due:
            excess = end - due
            _, shorter, victim = heappop(heap)
            out[victim] = excess
            end += shorter
    return out
