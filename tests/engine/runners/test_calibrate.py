"""Calibration of the step-time model at start: measurement, time budget and the stored result."""

# pyright: reportArgumentType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false
from __future__ import annotations

import json
from pathlib import Path
from random import Random

import msgspec
import pytest

from stretto.engine.runners import calibrate as calibration
from stretto.engine.runners.calibrate import (
    BUDGET_MS,
    CALIBRATION_STEPS,
    GPU_CALIBRATION_STEPS,
    CalibrationStep,
    Calibrator,
    calibrate,
    calibrate_together,
    fits,
    known_times,
    load,
    save,
)
from stretto.engine.runners.null import Finished, NullRunner, VirtualClock, null_info
from stretto.engine.scheduler.types import Limits, Plan
from stretto.engine.sequence import Drawn
from stretto.engine.step_time import UNKNOWN, StepCost, StepLoad, StepTime
from stretto.simulator.setting import SMALL_CPU
from stretto.types import ModelInfo

MACHINE = {"machine": "two cores", "checkpoint": "small"}
LIMITS = Limits(64, 512)


class Metered:
    """A runner that records its plans instead of running them. It can be told to fail."""

    def __init__(self, info: ModelInfo, *, failing: bool = False) -> None:
        self.info = info
        self.eos: frozenset[int] = frozenset()
        self.depth = 1
        self.plans: list[Plan] = []
        self.erased: list[int] = []
        self._failing = failing

    def launch(self, plan: Plan) -> Finished:
        if self._failing:
            raise RuntimeError("no memory")
        self.plans.append(plan)
        return Finished([Drawn(1)] * len(plan.rows))

    def erase(self, blocks: list[int]) -> None:
        self.erased += blocks


def metered(tmp_path: Path, *, failing: bool = False, context: int = 8192, blocks: int = 4096) -> Metered:
    info = null_info(context=context, blocks=blocks)
    return Metered(msgspec.structs.replace(info, path=str(tmp_path)), failing=failing)


def test_calibration_fits_the_machine_within_its_time_budget():
    rng, ran = Random(6), list[CalibrationStep]()
    spent = 0.0

    def run(probe: CalibrationStep) -> float:
        nonlocal spent
        ran.append(probe)
        ms = SMALL_CPU(probe.load) * rng.lognormvariate(0.0, 0.03)
        spent += ms
        return ms

    model = calibrate(run)
    assert spent <= BUDGET_MS * 1.05 and len(set(ran)) >= len(CALIBRATION_STEPS) - 3
    for seen in (StepLoad(8, 64, 8000, 64 * 300.0), StepLoad(1, 0, 300, 0.0), StepLoad(0, 90, 0, 4050.0)):
        assert model.cost(seen) == pytest.approx(SMALL_CPU(seen), rel=0.1)
    assert 0 < model.error < 0.1


def test_outliers_do_not_spoil_a_calibration():
    quick, rng = StepCost(base=3.0, per_decode=0.5, per_prefill=0.2, per_key=1e-3, per_pair=1e-6), Random(2)

    def run(probe: CalibrationStep) -> float:
        return quick(probe.load) * (rng.uniform(2.0, 8.0) if rng.random() < 0.3 else 1.0)

    model = calibrate(run)
    for seen in (StepLoad(8, 64, 8000, 64 * 300.0), StepLoad(1, 0, 300, 0.0), StepLoad(0, 90, 0, 4050.0)):
        assert model.cost(seen) == pytest.approx(quick(seen), rel=0.15)


def test_the_step_that_saturates_a_device_is_the_shortest_with_cheap_tokens():
    """A device that reads its weights in 4 ms, and computes a token in 22 us meanwhile."""

    def run(step: CalibrationStep) -> float:
        return max(4.0, 0.022 * (step.decodes + step.prefill)) + 0.3

    assert calibrate(run, GPU_CALIBRATION_STEPS).saturating == 256
    assert calibrate(lambda step: run(step) + 5.0, GPU_CALIBRATION_STEPS).saturating == 384
    assert calibrate(run).saturating == 0  # no step is long enough to tell


def test_a_machine_too_slow_for_all_steps_is_still_calibrated():
    slow = StepCost(base=300.0, per_decode=40.0, per_prefill=60.0)
    model = calibrate(lambda probe: slow(probe.load))
    assert model.cost(StepLoad(1, 0, 100, 0.0)) == pytest.approx(340.0, rel=0.1)


def test_models_are_compared_in_turns_so_that_a_slow_while_is_not_taken_for_a_slow_model():
    """The machine is half as fast for the first 60 % of the runs. One model takes 1.1 times as long."""
    costs = SMALL_CPU, StepCost(*(1.1 * value for value in msgspec.structs.astuple(SMALL_CPU)))
    steps, turns, ran = CALIBRATION_STEPS[:6], 15, list[int]()
    whole = 2 * (1 + len(steps) * turns)

    def runner(place: int):
        def run(step: CalibrationStep) -> float:
            ran.append(place)
            return costs[place](step.load) / 100 * (2.0 if len(ran) <= 0.6 * whole else 1.0)

        return run

    def ratio(found: list[StepCost]) -> float:
        seen = StepLoad(1, 0, 300)
        return found[1](seen) / found[0](seen)

    assert ratio(calibrate_together([runner(0), runner(1)], [steps, steps], turns)) == pytest.approx(1.1)
    assert len(ran) == whole and all(ran[at] != ran[at + 1] for at in range(2, whole, 2))
    ran.clear()
    alone = [calibrate_together([runner(place)], [steps], turns)[0] for place in (0, 1)]
    assert ratio(alone) < 0.6


def test_models_with_other_limits_have_steps_of_their_own():
    short, ran = CALIBRATION_STEPS[:3], list[CalibrationStep]()

    def run(step: CalibrationStep) -> float:
        ran.append(step)
        return SMALL_CPU(step.load) / 100

    own = CALIBRATION_STEPS[2:5]
    costs = calibrate_together([run, lambda step: SMALL_CPU(step.load) / 100], [own, short], 2)
    assert len(costs) == 2 and set(ran) == set(own)


def test_every_calibration_step_is_a_valid_plan(tmp_path: Path):
    runner = metered(tmp_path)
    bench = Calibrator(runner)
    for probe in CALIBRATION_STEPS:
        bench.run(probe)
        plan = runner.plans[-1]
        assert plan.load == probe.load
        for row in plan.rows:
            assert len(row.seq.tokens) == row.start + row.count
            assert len(row.seq.kv.blocks) * runner.info.block_size >= len(row.seq.tokens)
            assert {*row.seq.kv.blocks} <= {*runner.erased}
        assert len({row.seq.slot for row in plan.rows}) == len(plan.rows)
    again = runner.plans[0].rows[0].seq
    bench.run(CALIBRATION_STEPS[0])
    assert runner.plans[-1].rows[0].seq is again


def test_a_small_model_runs_only_calibration_steps_within_its_limits(tmp_path: Path):
    runner, limits = metered(tmp_path, context=200, blocks=8), Limits(4, 64)
    known_times(runner, limits, machine="small", folder=tmp_path)
    assert runner.plans and {
        block for plan in runner.plans for row in plan.rows for block in row.seq.kv.blocks
    } <= {*range(8)}
    for plan in runner.plans:
        assert len(plan.rows) <= 4 and plan.load.decode + plan.load.prefill <= 64
        assert all(row.start + row.count <= 128 for row in plan.rows)
    assert not fits(CalibrationStep(8, 16), runner, limits) and fits(CalibrationStep(4, 16), runner, limits)


def test_a_gpu_has_calibration_steps_of_its_own(tmp_path: Path):
    runner = metered(tmp_path)
    runner.info = msgspec.structs.replace(runner.info, device="cuda:0")
    known_times(runner, Limits(256, 8192), machine="gpu", folder=tmp_path)
    assert {plan.load for plan in runner.plans} <= {step.load for step in GPU_CALIBRATION_STEPS}
    assert max(plan.load.prefill for plan in runner.plans) == 2048


def test_calibration_runs_once_per_machine_and_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Calibrator, "run", lambda self, step: self.plan(step) and SMALL_CPU(step.load))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"12")
    folder, measured = tmp_path / "kept", list[StepCost]()
    calibrated = calibration.calibrate

    def counting(*args: object) -> StepTime:
        measured.append(UNKNOWN)
        return calibrated(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(calibration, "calibrate", counting)
    first = known_times(metered(tmp_path), LIMITS, machine="one", folder=folder)
    again = known_times(metered(tmp_path), LIMITS, machine="one", folder=folder)
    assert len(measured) == 1 and first.cost == again.cost and first.error == again.error
    known_times(metered(tmp_path), LIMITS, machine="another", folder=folder)
    assert len(measured) == 2
    weights.write_bytes(b"123")
    known_times(metered(tmp_path), LIMITS, machine="one", folder=folder)
    assert len(measured) == 3


def test_an_implausible_measurement_is_used_but_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flat = StepCost(base=80.0, per_prefill=20.0)  # Decodes cost nothing here, which no real machine does.
    monkeypatch.setattr(Calibrator, "run", lambda self, step: flat(step.load))
    times = known_times(metered(tmp_path), LIMITS, machine="one", folder=tmp_path)
    assert times.cost(StepLoad(0, 96, 0, 96 * 48.0)) == pytest.approx(2000.0, rel=0.05)
    assert not list(tmp_path.glob("*.json"))


def test_an_unwritable_folder_is_logged_and_not_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model, blocked = StepTime(SMALL_CPU), tmp_path / "file"
    blocked.write_text("in the way")
    save(model, blocked / "steptime.json", **MACHINE)
    assert "cannot be stored" in caplog.text


def test_a_failing_step_falls_back_to_the_default_model(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    times = known_times(metered(tmp_path, failing=True), LIMITS, machine="one", folder=tmp_path)
    assert times.cost == UNKNOWN and "no memory" in caplog.text
    assert not list(tmp_path.glob("*.json"))


def test_a_null_model_reports_its_own_step_time(tmp_path: Path):
    clock = VirtualClock()
    runner = NullRunner(null_info(), cost=StepCost(base=20.0), sleep=clock.sleep)
    assert known_times(runner, LIMITS, machine="one", folder=tmp_path).cost == StepCost(base=20.0)
    assert clock() == 0.0
    free = known_times(NullRunner(null_info(), sleep=clock.sleep), LIMITS, machine="one", folder=tmp_path)
    assert 0 < free.cost.base < 0.1
    for _ in range(50):
        free.observe(StepLoad(8, 0, 100, 0.0), 0.4)
    assert free.cost(StepLoad(8, 0, 100, 0.0)) == pytest.approx(0.4, rel=0.1)


def test_stored_step_times_load_only_for_their_machine_and_checkpoint(tmp_path: Path):
    path = tmp_path / "steptime.json"
    assert load(path, **MACHINE) is None
    model = StepTime(SMALL_CPU, [0.02, 0.04], saturating=512)
    save(model, path, **MACHINE)
    again = load(path, **MACHINE)
    assert again is not None and again.cost == SMALL_CPU and list(again.errors) == [0.02, 0.04]
    assert again.saturating == 512
    assert load(path, machine="other", checkpoint="small") is None
    assert load(path, machine="two cores", checkpoint="large") is None
    broken = json.loads(path.read_text())
    broken["cost"]["base"] = -1.0
    path.write_text(json.dumps(broken))
    assert load(path, **MACHINE) is None
    path.write_text("{")
    assert load(path, **MACHINE) is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["steptime.json"]
