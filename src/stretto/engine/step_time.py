"""The step-time model: how many milliseconds a step takes, from what is in it. One model answers for all:
schedule, admission, and whoever chooses between models or machines.

It knows loads (numbers), not sequences, and learns from each step: recursive least squares whose forgetting
leads back to a belief that moves slowly (stabilised forgetting: Kulhavy, Zarrop, Int. J. Control 58, 1993),
with errors bounded by Huber's psi, so that one outlier moves nothing and steps all alike unlearn nothing.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from math import inf, sqrt
from typing import NamedTuple

import msgspec
import numpy as np
from msgspec import Struct

from stretto.statistics import quantile

SCALES = (1.0, 8.0, 128.0, 8192.0, 131072.0)  # a load of each kind that costs about as much as a step's base
REMEMBERED = 0.9  # of what steps have taught, from one to the next: about the last 10 count
DISTURBED = 0.3  # the same when the machine has changed
NOISE = 0.08  # the relative spread of steps that are alike
FOLLOWED = 0.03  # of the way from the slow belief to the present one goes by with a step
ALL_WRONG = 0.5  # the slow belief's likely relative error that is the same for all coefficients
EACH_WRONG = 0.3  # and that of each by itself
LEAST_SHARE = 0.02  # of the largest part: a smaller coefficient is believed to be wrong by at least that
HUBER = 2.5  # an error beyond this many usual ones counts as one of that size
SHORTEST_MS = 0.01  # below this a step is as good as free, and a relative error says nothing
SMALLEST_NOISE = 0.01
SOLVED_MS = 3.0  # of steps go by before the belief changes, unless one was a surprise
REWEIGHTED = 10  # rounds of a robust fit
WARM = 8  # steps before the usual error means anything
PERSISTENT = 6  # so many outliers in a row, on one side, are a change and not a disturbance


class StepLoad(NamedTuple):
    """What a step is made of. `context`: keys that its decodes read. `reading`: over its prompt chunks, the
    sum of tokens times the mean number of keys each of them reads."""

    decode: int = 0
    prefill: int = 0
    context: int = 0
    reading: float = 0.0


class StepCost(Struct, frozen=True):
    """Milliseconds of a step: the base, and what each decode, each prompt token, each key that a decode reads
    and each pair of prompt token and key adds."""

    base: float = 0.0
    per_decode: float = 0.0
    per_prefill: float = 0.0
    per_key: float = 0.0
    per_pair: float = 0.0

    def __call__(self, load: StepLoad) -> float:
        return (
            self.base
            + self.per_decode * load.decode
            + self.per_prefill * load.prefill
            + self.per_key * load.context
            + self.per_pair * load.reading
        )

    def row(self, context: int) -> float:
        """What one decode that reads `context` keys adds to a step, ms."""
        return self.per_decode + self.per_key * context

    def decodes(self, count: int, context: int) -> float:
        """A step of `count` decodes that read `context` keys in all, ms: the pace of those streams."""
        return self.base + self.per_decode * count + self.per_key * context

    def prefill(self, start: int, count: int) -> float:
        """What reading `count` tokens after the first `start` adds, in however many steps, ms."""
        return count * (self.per_prefill + self.per_pair * (start + count / 2))

    def chunk(self, start: int, ms: float) -> int:
        """The most tokens after the first `start` whose reading adds at most `ms`: the root of `prefill`."""
        linear = self.per_prefill + self.per_pair * start
        if ms <= 0 or linear <= 0:
            return 0 if ms <= 0 else 1 << 30
        return int(2 * ms / (linear + sqrt(linear * linear + 2 * self.per_pair * ms)) + 1e-9)

    def first_token(self, start: int, count: int, beside: float, step: float) -> float:
        """Milliseconds to read `count` tokens in steps of `step` ms that first spend `beside` ms on decodes
        (their base included); inf when those leave nothing."""
        return self.prefill(start, count) * step / (step - beside) if step > beside else inf


class Window:
    """The last `size` values, for their quantiles."""

    def __init__(self, size: int, values: Sequence[float] = ()) -> None:
        self._size = size
        self._recent = deque(values, maxlen=size)
        self._sorted = sorted(self._recent)

    def __len__(self) -> int:
        return len(self._sorted)

    def __iter__(self) -> Iterator[float]:
        return iter(self._recent)

    def add(self, value: float) -> None:
        if len(self._recent) == self._size:
            del self._sorted[bisect_left(self._sorted, self._recent[0])]
        self._recent.append(value)
        insort(self._sorted, value)

    def quantile(self, q: float, default: float) -> float:
        """Their q-quantile; `default` when there are none."""
        return quantile(self._sorted, q) if self._sorted else default


UNKNOWN = StepCost(20.0, 1.0, 0.5, 1e-3, 1e-6)


class StepTime:
    """A cost that learns. `cost` is the present belief: every question goes there; `observe` changes it."""

    def __init__(self, cost: StepCost = UNKNOWN, errors: Sequence[float] = ()) -> None:
        self.cost = cost
        self.errors = Window(64, errors)
        self._over = Window(256, errors)
        self._usual = Window(16, errors[-16:])
        self._run = 0
        parts = np.array(msgspec.structs.astuple(cost)) * SCALES
        self._unit = np.maximum(parts, LEAST_SHARE * parts.max()) / SCALES  # coefficients are in these
        doubt = np.full((len(SCALES), len(SCALES)), ALL_WRONG**2) + np.eye(len(SCALES)) * EACH_WRONG**2
        self._trust = np.linalg.inv(doubt)
        self._slow = parts / SCALES / self._unit
        self._toward = self._trust @ self._slow
        self._known, self._seen = self._trust, self._toward
        self._unsolved, self._steps = 0.0, 0

    @property
    def error(self) -> float:
        """The median relative error of recent predictions."""
        return self.errors.quantile(0.5, 0.0)

    @property
    def margin(self) -> float:
        """What to multiply a prediction by so that most steps take no longer."""
        return 1.0 + min(self.errors.quantile(0.8, 0.1), 0.5)

    @property
    def worst(self) -> float:
        """What to multiply it by so that hardly any step takes longer: none of the last ones did."""
        return 1.0 + min(self._over.quantile(1.0, 0.1), 0.5)

    def observe(self, load: StepLoad, ms: float) -> None:
        """Learn from a step that took `ms`. Errors are relative, so long and short steps weigh the same."""
        predicted, ms = max(self.cost(load), SHORTEST_MS), max(ms, SHORTEST_MS)
        error = ms / predicted - 1.0
        usual = max(self._usual.quantile(0.5, 0.0), SMALLEST_NOISE)
        bound = HUBER * usual if len(self._usual) >= WARM else 1.0
        self._run = max(self._run, 0) + 1 if error > bound else min(self._run, 0) - 1 if error < -bound else 0
        remembered, surprised = REMEMBERED, self._run != 0
        if abs(self._run) > PERSISTENT:
            remembered, bound, self._run = DISTURBED, inf, 0
        self.errors.add(abs(error))
        self._usual.add(abs(error))
        self._over.add(max(error, 0.0))
        believed = 1.0 + min(max(error, -bound), bound)
        self._learn(np.array((1.0, *load)) * self._unit / predicted, believed, remembered)
        self._unsolved += ms
        self._steps += 1
        if surprised or self._unsolved >= SOLVED_MS:
            self._solve()

    def _learn(self, row: np.ndarray, ms: float, remembered: float) -> None:
        """One more equation `row @ coefficients = ms`, in units of the prediction."""
        weighted, forgotten = row / NOISE**2, 1.0 - remembered
        self._known = remembered * self._known + forgotten * self._trust + weighted[:, None] * row
        self._seen = remembered * self._seen + forgotten * self._toward + ms * weighted

    def _solve(self) -> None:
        coefficients = np.maximum(np.linalg.solve(self._known, self._seen), 0.0)
        self._slow += (1.0 - (1.0 - FOLLOWED) ** self._steps) * (coefficients - self._slow)
        self._toward = self._trust @ self._slow
        self._unsolved, self._steps = 0.0, 0
        self.cost = StepCost(*(coefficients * self._unit).tolist())


def fit(seen: Sequence[tuple[StepLoad, float]]) -> StepCost:
    """The cost of least relative error by Huber's measure (iteratively reweighted least squares), so that a
    few disturbed steps do not bend it. Raises ValueError when nothing was seen."""
    if not seen:
        raise ValueError("a step-time model needs at least one measured step")
    rows = np.array([(1.0, *load) for load, _ in seen]) / SCALES / np.array([[ms] for _, ms in seen])
    trust = np.ones(len(seen))
    theta = _positive(rows, trust)
    for _ in range(REWEIGHTED):
        errors = np.abs(rows @ theta - 1.0)
        usual = max(1.5 * float(np.median(errors)), SMALLEST_NOISE)
        trust = np.minimum(1.0, usual / np.maximum(errors, 1e-9))
        theta = _positive(rows, trust)
    return StepCost(*(theta / SCALES).tolist())


def _positive(rows: np.ndarray, trust: np.ndarray) -> np.ndarray:
    """Weighted least squares of `rows @ theta = 1`, no coefficient below zero: those that would be are left
    out, the most negative first."""
    held = [index for index in range(len(SCALES)) if rows[:, index].any()]
    while True:
        theta, *_ = np.linalg.lstsq(rows[:, held] * np.sqrt(trust)[:, None], np.sqrt(trust))
        if theta.min() >= 0 or len(held) == 1:
            break
        del held[int(theta.argmin())]
    whole = np.zeros(len(SCALES))
    whole[held] = np.maximum(theta, 0.0)
    return whole
