"""Which jobs to leave out so that the most others meet their deadlines on one machine.

Pure arithmetic, used for waiting prompts and for streams that do not fit into a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

# A deadline, the work until then, and its worth. A plain tuple, because a step makes a hundred of them.
Job = tuple[float, float, float]


def tardy_jobs(jobs: Sequence[Job], start: float, pace: float = 1.0) -> tuple[dict[int, float], float]:
    """The jobs to leave out, by index, with the seconds by which each would be late; and when the others end.

    `jobs` are in order of deadline, and `pace` is the work done in a second. This is the algorithm of Moore
    and Hodgson for the fewest late jobs (Management Science 15, 1968), in O(n log n): take jobs in order.
    When one would be late, leave out the longest so far, of equals the one that is due
    last, because its time may still come. A job is never left out for one of less worth. A job
    that would be late even alone is left out at once, so it delays no other.
    """
    end = start
    for index, (deadline, work, _) in enumerate(jobs):
        end += work / pace
        if end > deadline:
            return _leave_out(jobs, index, start, pace)
    return {}, end


def _leave_out(jobs: Sequence[Job], first: int, start: float, pace: float) -> tuple[dict[int, float], float]:
    """`tardy_jobs`, where job `first` is the first that would be late."""
    tardy: dict[int, float] = {}
    heap: list[tuple[float, float, int]] = []
    kept = list(range(first))  # those that are not in the heap yet: it is looked at only when one is left out
    end = start + sum([work / pace for _, work, _ in jobs[:first]])
    for index in range(first, len(jobs)):
        deadline, work, _ = jobs[index]
        seconds = work / pace
        if start + seconds > deadline:
            tardy[index] = start + seconds - deadline
            continue
        end += seconds
        kept.append(index)
        if end <= deadline:
            continue
        more = [(jobs[at][2], -jobs[at][1] / pace, -at) for at in kept]
        if len(more) > len(heap):
            heap += more
            heapify(heap)
        else:
            for one in more:
                heappush(heap, one)
        kept = []
        while end > deadline:
            excess = end - deadline
            _, negated, dropped = heappop(heap)
            tardy[-dropped] = excess
            end += negated
    return tardy, end
