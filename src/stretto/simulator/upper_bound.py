"""What no schedule can exceed: the most requests that could be on time, had one known everything before.

Pure numbers. An upper bound by relaxation, so a schedule's share of it is a floor on its share of the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

GRID = 512


class Work(NamedTuple):
    """Seconds of machine time to be done between `arrival` and `due`, in `steps` steps or more, and what it
    is worth to be on time."""

    arrival: float
    due: float
    seconds: float
    steps: int = 0
    worth: float = 1.0


def with_base(works: Sequence[Work], base: float, grid: int = 4 * GRID) -> list[Work]:
    """The works with their part of what steps themselves cost (`base` seconds each), whatever they hold.

    A request needs a step for each of its tokens and shares steps only with those it overlaps. Charging each
    step to the requests that may be there, in fixed parts that add to no more than one, so charges a schedule
    no more than it pays: another relaxation. The parts are the square of how densely a request needs steps.
    """
    if not works:
        return []
    starts = np.array([work.arrival for work in works])
    dues = np.array([work.due for work in works])
    instants = np.linspace(starts.min(), dues.max(), grid + 1)
    first = np.clip(np.searchsorted(instants, starts, side="right") - 1, 0, grid - 1)
    last = np.clip(np.searchsorted(instants, dues, side="left"), first + 1, grid)
    steps = np.array([work.steps for work in works])
    part = (steps / (dues - starts)) ** 2
    change = np.zeros(grid + 1)
    np.add.at(change, first, part)
    np.add.at(change, last, -part)
    there = np.cumsum(change)
    most = [float(there[begin:end].max()) for begin, end in zip(first, last, strict=True)]
    return [
        work._replace(seconds=work.seconds + base * work.steps * share / whole if share else work.seconds)
        for work, share, whole in zip(works, part.tolist(), most, strict=True)
    ]


def most_on_time(works: Sequence[Work], grid: int = GRID) -> float:
    """The most worth of requests, fractions counted, that one machine can finish between arrival and due:
    with a worth of 1 each, their number.

    All lengths are known, work may be interrupted at will and done in any order, a part of a request counts
    as that part of one, and arrivals and dues are moved apart to the next of `grid` instants: each makes it
    easier, so no schedule has more. The amounts of work that can be done form a polymatroid (those of a
    preemptive machine with release times and dues: Horn, Naval Research Logistics Quarterly 21, 1974), so
    taking first what is worth most a second, each as far as what is taken leaves room, is optimal (Edmonds
    1970).
    """
    if not works:
        return 0.0
    starts = np.array([work.arrival for work in works])
    dues = np.array([work.due for work in works])
    instants = np.linspace(starts.min(), dues.max(), grid + 1)
    first = np.searchsorted(instants, starts, side="right") - 1
    last = np.searchsorted(instants, dues, side="left")
    room = (
        instants[None, :] - instants[:, None]
    )  # [from, to]: what can still be done of work that lies within
    count = 0.0
    for index in sorted(range(len(works)), key=lambda index: works[index].seconds / works[index].worth):
        within = room[: first[index] + 1, last[index] :]
        seconds = works[index].seconds
        done = min(seconds, max(float(within.min()), 0.0))
        within -= done
        count += works[index].worth * (done / seconds if seconds > 0 else 1.0)
    return count
