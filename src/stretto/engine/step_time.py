"""The step-time model: how many milliseconds a step takes, from what is in it.

It knows loads (numbers), not sequences. It learns from each step by recursive least squares. Forgetting leads
back to an estimate that moves slowly (stabilised forgetting: Kulhavy, Zarrop, Int. J. Control 58, 1993), so
many equal steps unlearn nothing. Errors are bounded by Huber's psi, so a single outlier changes little.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from math import inf, sqrt
from typing import NamedTuple

import msgspec
from msgspec import Struct

from stretto.statistics import quantile

SCALES = (1.0, 8.0, 128.0, 8192.0, 131072.0)  # a load of each kind that costs about as much as a step's base
REMEMBERED = 0.9  # weight of earlier steps after one more: about the last 10 count
DISTURBED = 0.3  # the same once the machine's speed has changed
NOISE = 0.08  # relative standard deviation of equal steps
FOLLOWED = 0.03  # how far the slow estimate moves towards the present one with each step
ALL_WRONG = 0.5  # likely relative error of the slow estimate that all coefficients have in common
EACH_WRONG = 0.3  # likely relative error of each coefficient by itself
LEAST_SHARE = 0.02  # a coefficient may be wrong by this share of the largest part, however small it is
HUBER = 2.5  # an error larger than this many usual ones counts as one of that size
SHORTEST_MS = 0.01  # a relative error of a shorter step says nothing
SMALLEST_NOISE = 0.01
SOLVED_MS = 3.0  # milliseconds of steps between two changes of the estimate, unless one was an outlier
WARM = 8  # steps before the usual error is known
PERSISTENT = 6  # more outliers in a row on one side mean that the machine's speed has changed


Matrix = list[list[float]]


class StepLoad(NamedTuple):
    """What a step is made of."""

    decode: int = 0  # tokens of decodes
    prefill: int = 0  # tokens of prompts
    context: int = 0  # keys that the decodes read
    reading: float = 0.0  # over all chunks of prompts: tokens times the mean number of keys each one reads


class StepCost(Struct, frozen=True):
    """The milliseconds of a step, linear in its load."""

    base: float = 0.0
    per_decode: float = 0.0
    per_prefill: float = 0.0  # for each token of a prompt
    per_key: float = 0.0  # for each key that a decode reads
    per_pair: float = 0.0  # for each pair of a prompt's token and a key it reads

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
        """A step of `count` decodes that read `context` keys in all, ms."""
        return self.base + self.per_decode * count + self.per_key * context

    def prefill(self, start: int, count: int) -> float:
        """What `count` tokens of a prompt after its first `start` add, in however many steps, ms."""
        return count * (self.per_prefill + self.per_pair * (start + count / 2))

    def chunk(self, start: int, ms: float) -> int:
        """The most tokens of a prompt after its first `start` that add at most `ms`: `prefill` solved."""
        linear = self.per_prefill + self.per_pair * start
        if ms <= 0 or linear <= 0:
            return 0 if ms <= 0 else 1 << 30
        return int(2 * ms / (linear + sqrt(linear * linear + 2 * self.per_pair * ms)) + 1e-9)


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
    """A cost that learns. `cost` is the present estimate, which `observe` refines after each step.

    `saturating`: with so many tokens in a step the device is busy, and a token costs little less in a longer
    one. 0: it is not known, or there is no such number.

    The state is a system of normal equations, kept as rows of five coefficients and a right-hand side, in
    units of the first cost. `_prior` is the system that forgetting leads back to.
    """

    def __init__(
        self, cost: StepCost = UNKNOWN, errors: Sequence[float] = (), *, saturating: int = 0
    ) -> None:
        self.cost = cost
        self.saturating = saturating
        self.errors = Window(64, errors)
        self._overruns = Window(256, errors)
        self._usual = Window(16, errors[-16:])
        self._run = 0
        values = msgspec.structs.astuple(cost)
        largest = max(value * scale for value, scale in zip(values, SCALES, strict=True))
        self._unit = [max(v, LEAST_SHARE * largest / s) or 1.0 for v, s in zip(values, SCALES, strict=True)]
        self._slow = [value / unit for value, unit in zip(values, self._unit, strict=True)]
        self._prior = _with_target(_trust(), self._slow)
        self._known: list[list[float]] = self._prior
        self._unsolved, self._steps = 0.0, 0

    @property
    def error(self) -> float:
        """The median relative error of recent predictions."""
        return self.errors.quantile(0.5, 0.0)

    @property
    def margin(self) -> float:
        """A prediction times this holds for four of five steps."""
        return 1.0 + min(self.errors.quantile(0.8, 0.1), 0.5)

    @property
    def worst(self) -> float:
        """A prediction times this held for every recent step."""
        return 1.0 + min(self._overruns.quantile(1.0, 0.1), 0.5)

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
        self._overruns.add(max(error, 0.0))
        row = [value * unit / predicted for value, unit in zip((1.0, *load), self._unit, strict=True)]
        self._learn(row, 1.0 + min(max(error, -bound), bound), remembered)
        self._unsolved += ms
        self._steps += 1
        if surprised or self._unsolved >= SOLVED_MS:
            self._solve()

    def _learn(self, row: list[float], result: float, remembered: float) -> None:
        """Add the equation `row @ coefficients = result`, in units of the prediction."""
        forgotten, (a, b, c, d, e) = 1.0 - remembered, row
        learnt: Matrix = []
        for old, prior, value in zip(self._known, self._prior, row, strict=True):
            weight = value / NOISE**2
            learnt.append(
                [
                    remembered * old[0] + forgotten * prior[0] + weight * a,
                    remembered * old[1] + forgotten * prior[1] + weight * b,
                    remembered * old[2] + forgotten * prior[2] + weight * c,
                    remembered * old[3] + forgotten * prior[3] + weight * d,
                    remembered * old[4] + forgotten * prior[4] + weight * e,
                    remembered * old[5] + forgotten * prior[5] + weight * result,
                ]
            )
        self._known = learnt

    def _solve(self) -> None:
        coefficients = [max(value, 0.0) for value in solved(self._known)]
        moved = 1.0 - (1.0 - FOLLOWED) ** self._steps
        self._slow = [old + moved * (new - old) for old, new in zip(self._slow, coefficients, strict=True)]
        self._prior = _with_target(self._prior, self._slow)
        self._unsolved, self._steps = 0.0, 0
        self.cost = StepCost(*(value * unit for value, unit in zip(coefficients, self._unit, strict=True)))


def _trust() -> Matrix:
    """The inverse of the first estimate's covariance, `ALL_WRONG**2` everywhere plus `EACH_WRONG**2` on the
    diagonal (by Sherman and Morrison's formula)."""
    size, common, own = len(SCALES), ALL_WRONG**2, EACH_WRONG**2
    shared = common / (own * (own + size * common))
    return [[(1.0 / own if i == j else 0.0) - shared for j in range(size)] for i in range(size)]


def _with_target(matrix: Matrix, target: list[float]) -> Matrix:
    """The system whose solution is `target`: each row with its right-hand side."""
    a, b, c, d, e = target
    return [[*row[:5], row[0] * a + row[1] * b + row[2] * c + row[3] * d + row[4] * e] for row in matrix]


def solved(system: Matrix) -> list[float]:
    """The solution of a symmetric positive definite system, by Gaussian elimination.

    It is written out, because every step solves one.
    """
    (u0, u01, u02, u03, u04, y0), p, q, r, s = system
    f = p[0] / u0
    u1, u12, u13, u14, y1 = p[1] - f * u01, p[2] - f * u02, p[3] - f * u03, p[4] - f * u04, p[5] - f * y0
    f = q[0] / u0
    a21, a22, a23, a24, b2 = q[1] - f * u01, q[2] - f * u02, q[3] - f * u03, q[4] - f * u04, q[5] - f * y0
    f = r[0] / u0
    a31, a32, a33, a34, b3 = r[1] - f * u01, r[2] - f * u02, r[3] - f * u03, r[4] - f * u04, r[5] - f * y0
    f = s[0] / u0
    a41, a42, a43, a44, b4 = s[1] - f * u01, s[2] - f * u02, s[3] - f * u03, s[4] - f * u04, s[5] - f * y0
    f = a21 / u1
    u2, u23, u24, y2 = a22 - f * u12, a23 - f * u13, a24 - f * u14, b2 - f * y1
    f = a31 / u1
    a32, a33, a34, b3 = a32 - f * u12, a33 - f * u13, a34 - f * u14, b3 - f * y1
    f = a41 / u1
    a42, a43, a44, b4 = a42 - f * u12, a43 - f * u13, a44 - f * u14, b4 - f * y1
    f = a32 / u2
    u3, u34, y3 = a33 - f * u23, a34 - f * u24, b3 - f * y2
    f = a42 / u2
    a43, a44, b4 = a43 - f * u23, a44 - f * u24, b4 - f * y2
    f = a43 / u3
    u4, y4 = a44 - f * u34, b4 - f * y3
    x4 = y4 / u4
    x3 = (y3 - (u34 * x4)) / u3
    x2 = (y2 - (u23 * x3 + u24 * x4)) / u2
    x1 = (y1 - (u12 * x2 + u13 * x3 + u14 * x4)) / u1
    x0 = (y0 - (u01 * x1 + u02 * x2 + u03 * x3 + u04 * x4)) / u0
    return [x0, x1, x2, x3, x4]
