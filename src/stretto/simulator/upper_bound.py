"""What no schedule can exceed: the most requests on time, had one known everything before.

An upper bound by relaxation, so a schedule's share of it is at most its share of the best schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stretto.deadlines import Deadline
from stretto.simulator.setting import Setting
from stretto.types import Request

GRID = 512


class Work(NamedTuple):
    """Machine time that a request needs between its arrival and its deadline, all in seconds."""

    arrival: float
    deadline: float
    seconds: float
    steps: int = 0  # that it needs at least
    worth: float = 1.0  # of being on time


def bounds(requests: Sequence[Request], outputs: Sequence[int], setting: Setting) -> dict[str, float]:
    """The goodput that no schedule exceeds: of `all` requests, `weighted` by tier, and of the `timed` ones.

    `outputs` are the tokens of each answer. Without a request with an objective there is no `timed`.
    """
    best = {
        "all": bound(requests, outputs, setting),
        "weighted": bound(requests, outputs, setting, weighted=True),
    }
    timed = [pair for pair in zip(requests, outputs, strict=True) if pair[0].objective.timed]
    if timed:
        best["timed"] = bound([one for one, _ in timed], [tokens for _, tokens in timed], setting)
    return best


def bound(
    requests: Sequence[Request], outputs: Sequence[int], setting: Setting, *, weighted: bool = False
) -> float:
    """Goodput that no schedule exceeds. `weighted`: each request counts as much as its tier weighs.

    A request needs the machine for its own tokens and for its part of its steps' base. Its deadline is that
    of its last token, or the last arrival when that is sooner.
    """
    cost, end = setting.cost, requests[-1].arrival
    works: list[Work] = []
    for request, tokens in zip(requests, outputs, strict=True):
        prompt = len(request.prompt)
        deadline = min(Deadline.of(request.arrival, request.objective).of_token(tokens - 1), end)
        seconds = (cost.prefill(0, prompt) + (tokens - 1) * cost.row(prompt + tokens // 2)) / 1e3
        if deadline - request.arrival >= seconds:
            worth = setting.tiers[request.tier].weight if weighted else 1.0
            works.append(Work(request.arrival, deadline, seconds, tokens, worth))
    return most_on_time(with_base(works, cost.base / 1e3)) / end


def with_base(works: Sequence[Work], base: float, grid: int = 4 * GRID) -> list[Work]:
    """The works with their part of the steps' own cost, which is `base` seconds a step.

    A request needs a step for each of its tokens, and shares steps only with requests that overlap it. Each
    step is charged to the requests that may share it, in fixed parts that add up to at most one, so no
    schedule pays less. The parts are the square of how densely a request needs steps.
    """
    if not works:
        return []
    arrivals = np.array([work.arrival for work in works])
    deadlines = np.array([work.deadline for work in works])
    instants = np.linspace(float(arrivals.min()), float(deadlines.max()), grid + 1)
    first = np.clip(np.searchsorted(instants, arrivals, side="right") - 1, 0, grid - 1)
    last = np.clip(np.searchsorted(instants, deadlines, side="left"), first + 1, grid)
    steps = np.array([work.steps for work in works])
    part = (steps / (deadlines - arrivals)) ** 2
    change = np.zeros(grid + 1)
    np.add.at(change, first, part)
    np.add.at(change, last, -part)
    total = np.cumsum(change)
    most = [float(total[begin:end].max()) for begin, end in zip(first, last, strict=True)]
    return [
        work._replace(seconds=work.seconds + base * work.steps * share / whole if share else work.seconds)
        for work, share, whole in zip(works, part.tolist(), most, strict=True)
    ]


def most_on_time(works: Sequence[Work], grid: int = GRID) -> float:
    """The most worth that one machine can finish between arrivals and deadlines, parts of works included.

    All works are known before, may be interrupted, and may run in any order. Arrivals and deadlines are moved
    apart to the next of `grid` instants. Each of these only makes it easier, so no schedule has more. The
    amounts of work that can be done form a polymatroid (Horn, Naval Research Logistics Quarterly 21, 1974),
    so it is optimal to take the works of most worth per second first, each as far as it fits (Edmonds, 1970).
    """
    if not works:
        return 0.0
    arrivals = np.array([work.arrival for work in works])
    deadlines = np.array([work.deadline for work in works])
    instants = np.linspace(float(arrivals.min()), float(deadlines.max()), grid + 1)
    first = np.searchsorted(instants, arrivals, side="right") - 1
    last = np.searchsorted(instants, deadlines, side="left")
    left: NDArray[np.float64] = (
        instants[None, :] - instants[:, None]
    )  # [from, to]: seconds for works that lie within
    worth = 0.0
    for index in sorted(range(len(works)), key=lambda index: works[index].seconds / works[index].worth):
        within = left[: first[index] + 1, last[index] :]
        seconds = works[index].seconds
        done = min(seconds, max(float(within.min()), 0.0))
        within -= done
        worth += works[index].worth * (done / seconds if seconds > 0 else 1.0)
    return worth
