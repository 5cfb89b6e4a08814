"""The step-time model: how many milliseconds a step takes, from what is in it. One model answers for all:
schedule, admission, and whoever chooses between models or machines.

It knows loads (numbers), not sequences, and learns from each step: recursive least squares with forgetting
(Ljung, System Identification, 11.2) whose step is bounded by Huber's psi, so that one outlier moves nothing.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from math import inf, sqrt
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from msgspec import Struct

SCALES = (1.0, 8.0, 128.0, 8192.0, 131072.0)  # a load of each kind that costs about as much as a step's base
FORGETTING = 0.9  # remembers about 10 steps of a kind
NOISE = 0.05  # the relative spread of steps that are alike
HUBER = 2.5  # an error beyond this many usual ones counts as one of that size
MOST_SPREAD = 1e12
SHORTEST_MS = 0.01  # below this a step is as good as free, and a relative error says nothing
SMALLEST_NOISE = 0.01
WARM = 8  # steps before the usual error means anything
PERSISTENT = 6  # so many outliers in a row, on one side, are a change and not a disturbance


class Load(NamedTuple):
    """What a step is made of. `context`: keys that its decodes read. `reading`: over its prompt chunks, the
    sum of tokens times the mean number of keys each of them reads."""

    decode: int = 0
    prefill: int = 0
    context: int = 0
    reading: float = 0.0


class Cost(Struct, frozen=True):
    """Milliseconds of a step: `c0 + c1 * decode + c2 * prefill + c3 * context + c4 * reading`."""

    c0: float = 0.0
    c1: float = 0.0
    c2: float = 0.0
    c3: float = 0.0
    c4: float = 0.0

    def __call__(self, load: Load) -> float:
        return (
            self.c0
            + self.c1 * load.decode
            + self.c2 * load.prefill
            + self.c3 * load.context
            + self.c4 * load.reading
        )

    def row(self, context: int) -> float:
        """What one decode that reads `context` keys adds to a step, ms."""
        return self.c1 + self.c3 * context

    def decodes(self, count: int, context: int) -> float:
        """A step of `count` decodes that read `context` keys in all, ms: the pace of those streams."""
        return self.c0 + self.c1 * count + self.c3 * context

    def prefill(self, start: int, count: int) -> float:
        """What reading `count` tokens after the first `start` adds, in however many steps, ms."""
        return count * (self.c2 + self.c4 * (start + count / 2))

    def chunk(self, start: int, ms: float) -> int:
        """The most tokens after the first `start` whose reading adds at most `ms`: the root of `prefill`."""
        linear = self.c2 + self.c4 * start
        if ms <= 0 or linear <= 0:
            return 0 if ms <= 0 else 1 << 30
        return int(2 * ms / (linear + sqrt(linear * linear + 2 * self.c4 * ms)) + 1e-9)

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
        """The value that a share `q` of them does not exceed; `default` when there are none."""
        return (
            self._sorted[min(int(q * len(self._sorted)), len(self._sorted) - 1)] if self._sorted else default
        )


class Probe(NamedTuple):
    """A step to measure: `decodes` sequences that read `context` keys each, beside a prompt's chunk of
    `prefill` tokens after its first `start`."""

    decodes: int
    context: int
    prefill: int = 0
    start: int = 0

    @property
    def load(self) -> Load:
        reading = self.prefill * (self.start + self.prefill / 2)
        return Load(self.decodes, self.prefill, self.decodes * self.context, reading)


PROBES = (
    Probe(1, 16),
    Probe(0, 0, 32),
    Probe(8, 16),
    Probe(1, 1024),
    Probe(0, 0, 96),
    Probe(4, 512),
    Probe(0, 0, 32, 1024),
    Probe(8, 1024),
    Probe(4, 128, 64),
    Probe(16, 64),
    Probe(0, 0, 256),
    Probe(2, 256, 128, 512),
)
BUDGET_MS = 2000.0
UNKNOWN = Cost(20.0, 1.0, 0.5, 1e-3, 1e-6)


class StepTime:
    """A cost that learns. `cost` is the present belief: every question goes there; `observe` changes it."""

    def __init__(self, cost: Cost = UNKNOWN, errors: Sequence[float] = ()) -> None:
        self.cost = cost
        self.errors = Window(64, errors)
        self._theta = np.array(msgspec.structs.astuple(cost)) * SCALES
        self._run = 0
        self._usual = Window(16, errors[-16:])
        self._spread = self._ignorance()

    @property
    def error(self) -> float:
        """The median relative error of recent predictions."""
        return self.errors.quantile(0.5, 0.0)

    @property
    def margin(self) -> float:
        """What to multiply a prediction by so that most steps take no longer."""
        return 1.0 + min(self.errors.quantile(0.8, 0.1), 0.5)

    def observe(self, load: Load, ms: float) -> None:
        """Learn from a step that took `ms`. Errors are relative, so long and short steps weigh the same."""
        predicted, ms = max(self.cost(load), SHORTEST_MS), max(ms, SHORTEST_MS)
        error = ms / predicted - 1.0
        usual = max(self._usual.quantile(0.5, 0.0), SMALLEST_NOISE)
        bound = HUBER * usual if len(self._usual) >= WARM else 1.0
        self._run = max(self._run, 0) + 1 if error > bound else min(self._run, 0) - 1 if error < -bound else 0
        if abs(self._run) > PERSISTENT:
            bound, self._run = inf, 0
            self._spread = self._ignorance()
        self.errors.add(abs(error))
        self._usual.add(abs(error))
        self._learn(np.array((1.0, *load)) / SCALES / predicted, min(max(error, -bound), bound))
        self.cost = Cost(*(self._theta / SCALES).tolist())

    def _ignorance(self) -> np.ndarray:
        """A spread that holds each coefficient for right within a factor of two or so, and no more."""
        return np.diag(np.maximum(self._theta, 0.02 * self._theta.max()) ** 2)

    def _learn(self, row: np.ndarray, error: float) -> None:
        """Forget only in the direction that this step speaks of (Kulhavy, Automatica 23, 1987): steps that
        are all alike teach nothing of what they lack, and must not unlearn it."""
        lever = self._spread @ row
        known = float(row @ lever) / NOISE**2
        if known <= 0:
            return
        self._theta = np.maximum(self._theta + lever * (error / (1.0 + known) / NOISE**2), 0.0)
        told = FORGETTING - (1.0 - FORGETTING) / known
        self._spread -= np.outer(lever, lever) * (told / (1.0 + told * known) / NOISE**2)
        if not float(self._spread.max()) < MOST_SPREAD:  # rounding has run away with it
            self._spread = self._ignorance()


def calibrate(run: Callable[[Probe], float], budget_ms: float = BUDGET_MS) -> StepTime:
    """Measure the probes, in rounds until `budget_ms` of steps have run, and fit a model to them.

    `run` carries a probe out and says the milliseconds it took. The first one warms up and is not counted. A
    probe that would exceed the budget is passed over, so a slow machine is calibrated with its short ones.
    """
    seen: list[tuple[Load, float]] = []
    took: dict[Probe, float] = {}
    spent = run(PROBES[0])
    for probe in PROBES * 5:
        likely = took.get(probe, fit(seen)(probe.load) if len(seen) > 3 else spent)
        if spent + likely <= budget_ms:
            took[probe] = run(probe)
            spent += took[probe]
            seen.append((probe.load, took[probe]))
    cost = fit(seen)
    return StepTime(cost, [abs(ms / max(cost(load), 1e-9) - 1.0) for load, ms in seen])


def fit(seen: Sequence[tuple[Load, float]]) -> Cost:
    """The cost of least squared relative error, no coefficient below zero: those that would be are left out,
    the most negative first. Raises ValueError when nothing was seen."""
    if not seen:
        raise ValueError("a step-time model needs at least one measured step")
    took = np.array([ms for _, ms in seen])
    rows = np.array([(1.0, *load) for load, _ in seen]) / SCALES / took[:, None]
    held = [index for index in range(len(SCALES)) if rows[:, index].any()]
    while True:
        theta, *_ = np.linalg.lstsq(rows[:, held], np.ones(len(seen)))
        if theta.min() >= 0 or len(held) == 1:
            break
        del held[int(theta.argmin())]
    whole = np.zeros(len(SCALES))
    whole[held] = np.maximum(theta, 0.0)
    return Cost(*(whole / SCALES).tolist())


class Kept(Struct, frozen=True):
    """A step-time model as it is kept on disk, and what it was measured on."""

    machine: str
    checkpoint: str
    cost: Cost
    errors: list[float]


def save(model: StepTime, path: Path, *, machine: str, checkpoint: str) -> None:
    """Keep a model for the next start. Written beside and moved into place: a reader sees all or nothing."""
    kept = Kept(machine, checkpoint, model.cost, list(model.errors))
    draft = path.with_suffix(".part")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(kept)))
    draft.replace(path)


def load(path: Path, *, machine: str, checkpoint: str) -> StepTime | None:
    """The model kept at `path`; None when there is none, or it is of another machine or checkpoint, or cannot
    be read: then it is measured again."""
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=Kept)
    except (OSError, msgspec.DecodeError):
        return None
    usable = (kept.machine, kept.checkpoint) == (machine, checkpoint)
    finite = all(0 <= value < float("inf") for value in msgspec.structs.astuple(kept.cost))
    return StepTime(kept.cost, kept.errors) if usable and finite else None
