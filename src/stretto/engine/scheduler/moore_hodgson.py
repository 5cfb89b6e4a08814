"""Which jobs to leave out so that the most others meet their deadlines on one machine.

Pure arithmetic, used for waiting prompts and for streams that do not fit into a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

# Work for one machine: its deadline, its seconds, and its worth. Of jobs that do not all fit, those of the
# least worth are left out. A plain tuple, because the scheduler makes hundreds of them for each step.
Job = tuple[float, float, float]


def tardy_jobs(jobs: Sequence[Job], start: float) -> dict[int, float]:
    """The jobs to leave out, by index, each with the seconds by which it would be late.

    `jobs` are in order of deadline. This is the algorithm of Moore and Hodgson for the fewest late jobs
    (Management Science 15, 1968), in O(n log n): take jobs in order; when one would be late, leave out the
    longest so far. A job is never left out for one of less worth. A job that would be late even alone is left
    out at once, so it delays no other.
    """
    end = start
    for deadline, seconds, _ in jobs:
        end += seconds
        if end > deadline:
            break
    else:
        return {}
    tardy: dict[int, float] = {}
    heap: list[tuple[float, float, int]] = []
    end = start
    for index, (deadline, seconds, worth) in enumerate(jobs):
        if start + seconds > deadline:
            tardy[index] = start + seconds - deadline
            continue
        end += seconds
        heappush(heap, (worth, -seconds, index))
        while end > deadline:
            excess = end - deadline
            _, negated, dropped = heappop(heap)
            tardy[dropped] = excess
            end += negated
    return tardy
