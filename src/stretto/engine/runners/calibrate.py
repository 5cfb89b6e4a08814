"""What a runner's steps take, before the first request: measured with steps of every kind, once for a machine
and a checkpoint, and kept on disk for the next start.

It owns the made-up sequences of those steps and the file. Of queues, requests and messages it knows nothing.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Several
from dataclasses import replace
from hashlib import blake2b
from math import inf
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from msgspec import Struct

from stretto.engine.core import Runner
from stretto.engine.runners.null import NullRunner
from stretto.engine.scheduler.types import Limits, Plan, Row
from stretto.engine.sequence import Sequence
from stretto.engine.step_time import SCALES, SMALLEST_NOISE, StepCost, StepLoad, StepTime
from stretto.types import Request, Sampling

log = logging.getLogger(__name__)


class Probe(NamedTuple):
    """A step to measure: `decodes` sequences that read `context` keys each, beside a prompt's chunk of
    `prefill` tokens after its first `start`."""

    decodes: int
    context: int
    prefill: int = 0
    start: int = 0

    @property
    def load(self) -> StepLoad:
        reading = self.prefill * (self.start + self.prefill / 2)
        return StepLoad(self.decodes, self.prefill, self.decodes * self.context, reading)


PROBES = (
    Probe(1, 16),
    Probe(0, 0, 32),
    Probe(8, 16),
    Probe(1, 1024),
    Probe(0, 0, 96),
    Probe(4, 512),
    Probe(0, 0, 32, 1024),
    Probe(4, 128, 64),
    Probe(16, 64),
    Probe(2, 512, 16),
    Probe(0, 0, 160),
)
MOST_KEPT = 64  # files
LOOP_MS = 0.05  # what a step takes when its model takes nothing
REWEIGHTED = 10  # rounds of a robust fit
BUDGET_MS = 1500.0
ROUNDS = 5
STRIDE = 32  # blocks from one made-up sequence's first to the next one's
HELD = 64  # blocks that they use: two of the longest contexts then read memory of their own
EXPLAINED = 0.2  # a fit whose usual error is above this is not kept


class Kept(Struct, frozen=True):
    """A step-time model as it is kept on disk, and what it was measured on."""

    machine: str
    checkpoint: str
    cost: StepCost
    errors: list[float]


def known_times(runner: Runner, limits: Limits, *, machine: str, folder: Path) -> StepTime:
    """The step times of a runner that has not served yet: those kept in `folder` for this `machine` and the
    runner's checkpoint, or else measured now, which takes `BUDGET_MS` of steps at most, and kept.

    A null model says itself what it takes. A step that fails is logged and leaves a guess: the first request
    will say what is wrong.
    """
    if isinstance(runner, NullRunner):
        return StepTime(msgspec.structs.replace(runner.cost, base=max(runner.cost.base, LOOP_MS)))
    checkpoint = identity(runner)
    path = folder / f"{blake2b(f'{machine} {checkpoint}'.encode(), digest_size=12).hexdigest()}.json"
    kept = load(path, machine=machine, checkpoint=checkpoint)
    if kept is not None:
        return kept
    try:
        probes = [probe for probe in PROBES if fits(probe, runner, limits)]
        model = calibrate(Bench(runner, limits).run, probes)
    except Exception:
        log.exception("a step to measure %s failed; its step times are guessed", runner.info.name)
        return StepTime()
    if (
        model.error <= EXPLAINED and min(model.cost.per_decode, model.cost.per_prefill) > 0
    ):  # else something disturbed it
        save(model, path, machine=machine, checkpoint=checkpoint)
    return model


def identity(runner: Runner) -> str:
    """What of a model its step times depend on: the weights' files, and how they are held and computed."""
    info = runner.info
    files = sorted(Path(info.path).glob("*.safetensors"))
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{info.path} {stamps} {info.dtype} {info.quantise} {info.device} {info.kernels} {info.block_size}"


def fits(probe: Probe, runner: Runner, limits: Limits) -> bool:
    """Whether the runner could be asked for this step."""
    tokens = probe.decodes + probe.prefill
    rows = probe.decodes + (probe.prefill > 0)
    longest = max(probe.context, probe.start + probe.prefill)
    room = min(runner.info.context, runner.info.blocks * runner.info.block_size)
    return tokens <= limits.max_step_tokens and rows <= limits.max_running and longest <= room


class Bench:
    """Runs probes on a runner that serves nobody yet, over blocks that nobody holds. Each probe keeps its
    made-up sequences: met again, it is a step like any other of a stream."""

    def __init__(self, runner: Runner, limits: Limits) -> None:
        self._runner = runner
        self._plans: dict[Probe, Plan] = {}
        self._held = min(HELD, runner.info.blocks)
        runner.erase(list(range(self._held)))  # memory that was never written is not read as other memory is

    def run(self, probe: Probe) -> float:
        """The milliseconds of one such step."""
        plan = self._plans.get(probe)
        if plan is None:
            plan = self._plans[probe] = self._plan(probe)
            if self._runner.info.device.startswith("cuda"):
                for _ in range(
                    2
                ):  # such a step is compiled, and then captured: what follows is like any other
                    self._runner.launch(plan).wait()
        started = time.perf_counter()
        self._runner.launch(plan).wait()
        return (time.perf_counter() - started) * 1e3

    def _plan(self, probe: Probe) -> Plan:
        plan = Plan(self._runner.info.name)
        for slot in range(probe.decodes):
            plan.rows.append(Row(self._sequence(slot, probe.context), probe.context - 1, 1, True))
        if probe.prefill:
            seq = self._sequence(probe.decodes, probe.start + probe.prefill)
            plan.rows.append(Row(seq, probe.start, probe.prefill, True))
        return plan

    def _sequence(self, slot: int, length: int) -> Sequence:
        info = self._runner.info
        prompt = tuple((slot + index * 31) % info.vocab for index in range(length))
        request = Request(id=slot, model=info.name, prompt=prompt, arrival=0.0, sampling=Sampling(seed=slot))
        count = -(-length // info.block_size)
        blocks = [(slot * STRIDE + index) % self._held for index in range(count)]
        seq = Sequence.of(request, info.context)
        return replace(seq, slot=slot, kv=replace(seq.kv, blocks=blocks))


def calibrate(run: Callable[[Probe], float], probes: Several[Probe] = PROBES) -> StepTime:
    """Measure the probes, in rounds until `BUDGET_MS` of steps have run, and fit a model to them.

    `run` carries a probe out and says the milliseconds it took. The first one warms up and is not counted. A
    probe that would exceed the budget is passed over, so a slow machine is calibrated with its short ones.
    What disturbs a step only makes it longer, so of each probe the shortest run counts.
    """
    took: dict[Probe, list[float]] = {}
    spent = run(probes[0])
    for probe in [*probes] * ROUNDS:
        likely = min(took[probe]) if probe in took else _fitted(took)(probe.load) if len(took) > 3 else spent
        if spent + likely <= BUDGET_MS:
            ms = run(probe)
            took.setdefault(probe, []).append(ms)
            spent += ms
    cost = _fitted(took)
    runs = [(probe.load, ms) for probe, times in took.items() for ms in times]
    return StepTime(cost, [abs(ms / max(cost(load), 1e-9) - 1.0) for load, ms in runs])


def _fitted(took: Mapping[Probe, list[float]]) -> StepCost:
    return fit([(probe.load, min(times)) for probe, times in took.items()])


def save(model: StepTime, path: Path, *, machine: str, checkpoint: str) -> None:
    """Keep a model for the next start. Written beside and moved into place: a reader sees all or nothing. A
    disk that takes nothing is not an error: it is measured again next time."""
    kept = Kept(machine, checkpoint, model.cost, list(model.errors))
    draft = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(kept)))
        draft.replace(path)
        for old in sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)[:-MOST_KEPT]:
            old.unlink(missing_ok=True)
    except OSError as error:
        log.warning("step times are not kept in %s: %s", path.parent, error.strerror or error)


def load(path: Path, *, machine: str, checkpoint: str) -> StepTime | None:
    """The model kept at `path`; None when there is none, or it is of another machine or checkpoint, or cannot
    be read: then it is measured again."""
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=Kept)
    except (OSError, msgspec.DecodeError):
        return None
    usable = (kept.machine, kept.checkpoint) == (machine, checkpoint)
    finite = all(0 <= value < inf for value in msgspec.structs.astuple(kept.cost))
    return StepTime(kept.cost, kept.errors) if usable and finite else None


def fit(seen: Several[tuple[StepLoad, float]]) -> StepCost:
    """The cost with the least relative error by Huber's measure, so that a few outliers change little.

    By iteratively reweighted least squares. Raises ValueError when there are no measurements.
    """
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
    """Weighted least squares of `rows @ theta = 1` with no coefficient below zero.

    The most negative coefficient is left out until none is negative. This is not always the optimum of
    non-negative least squares, and it needs no further library.
    """
    held = [index for index in range(len(SCALES)) if rows[:, index].any()]
    while True:
        theta, *_ = np.linalg.lstsq(rows[:, held] * np.sqrt(trust)[:, None], np.sqrt(trust))
        if theta.min() >= 0 or len(held) == 1:
            break
        del held[int(theta.argmin())]
    whole = np.zeros(len(SCALES))
    whole[held] = np.maximum(theta, 0.0)
    return whole
