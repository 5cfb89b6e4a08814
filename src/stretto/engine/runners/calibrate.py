"""Measures the step times of a runner before its first request, and stores them for the next start.

One file holds the step-time model of one machine and checkpoint. This module owns that file and the
artificial sequences that it measures with. It knows no queue and no message.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from math import inf
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from stretto.engine.runners.interface import Runner
from stretto.engine.runners.null import NullRunner
from stretto.engine.scheduler.types import Limits, Plan, Row
from stretto.engine.sequence import Sequence as EngineSequence
from stretto.engine.step_time import SCALES, SMALLEST_NOISE, StepCost, StepLoad, StepTime
from stretto.types import Request, Sampling

Floats = NDArray[np.float64]
log = logging.getLogger(__name__)


class CalibrationStep(NamedTuple):
    """A step to measure: `decodes` sequences with a context of `context` tokens, and a chunk of a prompt.

    The chunk has `prefill` tokens and comes after the first `start` tokens of its prompt.
    """

    decodes: int
    context: int
    prefill: int = 0
    start: int = 0

    @property
    def load(self) -> StepLoad:
        reading = self.prefill * (self.start + self.prefill / 2)
        return StepLoad(self.decodes, self.prefill, self.decodes * self.context, reading)


StepClock = Callable[[CalibrationStep], float]
"""Runs a step and returns its milliseconds."""

CALIBRATION_STEPS = (
    CalibrationStep(1, 16),
    CalibrationStep(0, 0, 32),
    CalibrationStep(8, 16),
    CalibrationStep(1, 1024),
    CalibrationStep(0, 0, 96),
    CalibrationStep(4, 512),
    CalibrationStep(0, 0, 32, 1024),
    CalibrationStep(4, 128, 64),
    CalibrationStep(16, 64),
    CalibrationStep(2, 512, 16),
    CalibrationStep(0, 0, 160),
)
# A GPU takes as long for 32 tokens as for one, so the cost of a prompt's token shows in longer steps only.
# Each of these has as many tokens as a graph, so that no padding is measured.
GPU_CALIBRATION_STEPS = (
    CalibrationStep(1, 16),
    CalibrationStep(0, 0, 512),
    CalibrationStep(32, 512),
    CalibrationStep(0, 0, 2048),
    CalibrationStep(1, 2048),
    CalibrationStep(0, 0, 1024),
    CalibrationStep(128, 64),
    CalibrationStep(16, 512, 496),
    CalibrationStep(0, 0, 128),
    CalibrationStep(0, 0, 256),
    CalibrationStep(0, 0, 384),
    CalibrationStep(0, 0, 256, 2048),
    CalibrationStep(64, 256, 1472),
)
LONG = 1024  # tokens of a step that saturates any device
SATURATED = 1.5
MAX_FILES = 64
LOOP_MS = 0.05  # of the engine's loop for one step
REWEIGHTED = 10  # rounds of a robust fit
BUDGET_MS = 1500.0
ROUNDS = 5
TURNS = 15  # of several models at each step
STRIDE = 32  # between the first blocks of two sequences
BLOCKS = 64  # used by all sequences: the two longest contexts then read different memory
MAX_ERROR = 0.2  # a model with a larger usual error is used but not stored


class StoredStepTimes(Struct, frozen=True):
    """A step-time model on disk, with the machine and the checkpoint that it was measured on."""

    machine: str
    checkpoint: str
    cost: StepCost
    errors: list[float]
    saturating: int


def known_times(runner: Runner, limits: Limits, *, machine: str, folder: Path | None) -> StepTime:
    """The step-time model of a runner that has not served yet.

    It is read from `folder` (None: nothing is kept) if there is one for this `machine` and checkpoint. If
    not, it is measured now, with at most `BUDGET_MS` of steps, and stored. A null model's cost is known. A
    step that fails is logged, and the default model is used; the first request will report the error.
    """
    if isinstance(runner, NullRunner):
        return StepTime(msgspec.structs.replace(runner.cost, base=max(runner.cost.base, LOOP_MS)))
    checkpoint = identity(runner)
    name = f"{blake2b(f'{machine} {checkpoint}'.encode(), digest_size=12).hexdigest()}.json"
    path = folder and folder / name
    stored = path and load(path, machine=machine, checkpoint=checkpoint)
    if stored is not None:
        return stored
    try:
        steps = steps_of(runner, limits)
        model = calibrate(Calibrator(runner).run, steps)
    except Exception:
        log.exception("the calibration of %s failed; default step times are used", runner.info.name)
        return StepTime()
    # Otherwise other work on the machine disturbed the measurement.
    if path and model.error <= MAX_ERROR and min(model.cost.per_decode, model.cost.per_prefill) > 0:
        save(model, path, machine=machine, checkpoint=checkpoint)
    return model


def identity(runner: Runner) -> str:
    """All that the step times of a model depend on: its files, its formats, its device and its kernels."""
    info = runner.info
    files = sorted(Path(info.path).glob("*.safetensors"))
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{info.path} {stamps} {info.dtype} {info.quantise} {info.device} {info.kernels} {info.block_size}"


def steps_of(runner: Runner, limits: Limits) -> list[CalibrationStep]:
    """The steps to calibrate a runner with."""
    on_gpu = runner.info.device.startswith("cuda")
    return [
        step
        for step in (GPU_CALIBRATION_STEPS if on_gpu else CALIBRATION_STEPS)
        if fits(step, runner, limits)
    ]


def fits(step: CalibrationStep, runner: Runner, limits: Limits) -> bool:
    """Whether the runner can run this step."""
    tokens = step.decodes + step.prefill
    rows = step.decodes + (step.prefill > 0)
    longest = max(step.context, step.start + step.prefill)
    capacity = min(runner.info.context, runner.info.blocks * runner.info.block_size)
    return tokens <= limits.max_step_tokens and rows <= limits.max_running and longest <= capacity


class Calibrator:
    """Runs calibration steps on a runner that serves no request yet.

    A step that is run again uses the same sequences, as the steps of a real answer do.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._plans: dict[CalibrationStep, Plan] = {}
        self._held = min(BLOCKS, runner.info.blocks)
        # Memory that was never written reads faster, so it is written first.
        runner.erase(list(range(self._held)))

    def run(self, step: CalibrationStep) -> float:
        """Run a step and return its milliseconds."""
        plan = self._plans.get(step)
        if plan is None:
            plan = self._plans[step] = self.plan(step)
            if self._runner.info.device.startswith("cuda"):
                self._runner.launch(plan).wait()  # the first launch of a size may compile kernels
        started = time.perf_counter()
        self._runner.launch(plan).wait()
        return (time.perf_counter() - started) * 1e3

    def plan(self, step: CalibrationStep) -> Plan:
        """A plan for this step, with sequences of its own."""
        plan = Plan(self._runner.info.name)
        for slot in range(step.decodes):
            plan.rows.append(Row(self._sequence(slot, step.context), step.context - 1, 1, True))
        if step.prefill:
            seq = self._sequence(step.decodes, step.start + step.prefill)
            plan.rows.append(Row(seq, step.start, step.prefill, True))
        return plan

    def _sequence(self, slot: int, length: int) -> EngineSequence:
        info = self._runner.info
        prompt = tuple((slot + index * 31) % info.vocab for index in range(length))
        request = Request(id=slot, model=info.name, prompt=prompt, arrival=0.0, sampling=Sampling(seed=slot))
        count = -(-length // info.block_size)
        blocks = [(slot * STRIDE + index) % self._held for index in range(count)]
        seq = EngineSequence.of(request, info.context)
        return replace(seq, slot=slot, kv=replace(seq.kv, blocks=blocks))


def calibrate(run: StepClock, steps: Iterable[CalibrationStep] = CALIBRATION_STEPS) -> StepTime:
    """Measure the steps in rounds until `BUDGET_MS` have been spent, and fit a model to them.

    `run` runs a step and returns its milliseconds. The first run warms up and is not counted. A step that
    would exceed the budget is skipped, so a slow machine is calibrated with the short ones. The shortest run
    of each step counts, because disturbances only make a step longer.
    """
    steps = list(steps)
    measurement = _Measurement(run, steps[0])
    for step in steps * ROUNDS:
        measurement.take(step)
    cost = measurement.cost()
    runs = [(step.load, ms) for step, times in measurement.times.items() for ms in times]
    errors = [abs(ms / max(cost(load), 1e-9) - 1.0) for load, ms in runs]
    return StepTime(cost, errors, saturating=_saturating(measurement.times))


def _saturating(times: Mapping[CalibrationStep, Sequence[float]]) -> int:
    """The tokens of the shortest step in which a prompt's token costs at most `SATURATED` times the least.

    0 unless the steps that were measured are long enough to tell.
    """
    per_token = {
        step.prefill: min(ms) / step.prefill
        for step, ms in times.items()
        if step.prefill and not step.decodes and not step.start
    }
    if max(per_token, default=0) < LONG:
        return 0
    least = min(per_token.values())
    return min(tokens for tokens, ms in per_token.items() if ms <= SATURATED * least)


def calibrate_together(
    runs: Sequence[StepClock], steps: Sequence[Sequence[CalibrationStep]], turns: int = TURNS
) -> list[StepCost]:
    """The costs of several models of one machine, for a comparison of them. `steps`: those of each model.

    The models take turns at each step, so whatever disturbs the machine for a while disturbs all of them.
    The shortest run of each step counts, as in `calibrate`: medians follow the load of the machine.
    """
    measurements = [_Measurement(run, own[0]) for run, own in zip(runs, steps, strict=True)]
    possible = [frozenset(own) for own in steps]
    for step in list(dict.fromkeys(step for own in steps for step in own)) * turns:
        for measurement, able in zip(measurements, possible, strict=True):
            if step in able:
                measurement.take(step)
    return [measurement.cost() for measurement in measurements]


class _Measurement:
    """The runs of one model's steps. The first one warms up and is not counted."""

    def __init__(self, run: StepClock, first: CalibrationStep) -> None:
        self.times: dict[CalibrationStep, list[float]] = {}
        self._run, self._spent = run, run(first)

    def take(self, step: CalibrationStep) -> None:
        """Run a step, unless that would exceed the budget."""
        known = self.times.get(step)
        expected = self._spent
        if known:
            expected = min(known)
        elif len(self.times) > 3:
            expected = self.cost()(step.load)
        if self._spent + expected <= BUDGET_MS:
            ms = self._run(step)
            self.times.setdefault(step, []).append(ms)
            self._spent += ms

    def cost(self) -> StepCost:
        return fit([(step.load, min(times)) for step, times in self.times.items()])


def save(model: StepTime, path: Path, *, machine: str, checkpoint: str) -> None:
    """Store a model for the next start, in one atomic step. A file that cannot be written is only logged."""
    stored = StoredStepTimes(machine, checkpoint, model.cost, list(model.errors), model.saturating)
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(stored)))
        temporary.replace(path)
        for old in sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)[:-MAX_FILES]:
            old.unlink(missing_ok=True)
    except OSError as error:
        log.warning("step times cannot be stored in %s: %s", path.parent, error.strerror or error)


def load(path: Path, *, machine: str, checkpoint: str) -> StepTime | None:
    """The model stored at `path`.

    None if there is none, if it cannot be read, or if it belongs to another machine or checkpoint.
    """
    try:
        stored = msgspec.json.decode(path.read_bytes(), type=StoredStepTimes)
    except (OSError, msgspec.DecodeError):
        return None
    usable = (stored.machine, stored.checkpoint) == (machine, checkpoint)
    finite = all(0 <= value < inf for value in msgspec.structs.astuple(stored.cost))
    if not usable or not finite:
        return None
    return StepTime(stored.cost, stored.errors, saturating=stored.saturating)


def fit(seen: list[tuple[StepLoad, float]]) -> StepCost:
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


def _positive(rows: Floats, trust: Floats) -> Floats:
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
