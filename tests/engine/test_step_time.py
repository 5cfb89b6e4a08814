"""The step-time model: its predictions, its online learning and its resistance to outliers."""

from __future__ import annotations

from random import Random
from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.engine.runners.calibrate import fit
from stretto.engine.step_time import UNKNOWN, StepCost, StepLoad, StepTime, Window, solved
from stretto.simulator.setting import SMALL_CPU


def some_load(rng: Random) -> StepLoad:
    decode, start = rng.randint(0, 16), rng.randint(0, 2000)
    prefill = rng.choice([0, 0, rng.randint(1, 90)])
    if decode == prefill == 0:
        decode = 1
    return StepLoad(decode, prefill, decode * rng.randint(50, 2000), prefill * (start + prefill / 2))


def steps(
    model: StepTime, count: int, rng: Random, *, speed: float = 1.0, outliers: float = 0.0
) -> list[float]:
    """Let the model observe noisy steps and return its relative errors against the noise-free machine."""
    errors: list[float] = []
    for _ in range(count):
        seen = some_load(rng)
        truth = speed * SMALL_CPU(seen)
        errors.append(abs(model.cost(seen) / truth - 1.0))
        factor = 6.0 if rng.random() < outliers else 1.0
        model.observe(seen, truth * rng.lognormvariate(0.0, 0.05) * factor)
    return errors


def test_the_model_learns_an_unknown_machine():
    model = StepTime(UNKNOWN)
    assert median(steps(model, 300, Random(1))[-100:]) < 0.03
    assert model.error < 0.08


def test_outliers_do_not_spoil_the_model():
    model = StepTime(SMALL_CPU, [0.05] * 32)
    assert median(steps(model, 400, Random(2), outliers=0.15)[-200:]) < 0.06


def test_a_lasting_change_of_speed_is_learnt_within_fifty_steps():
    model = StepTime(SMALL_CPU, [0.03] * 32)
    steps(model, 100, Random(3))
    before = steps(model, 60, Random(4), speed=2.0)
    assert before[0] > 0.4 and median(before[-10:]) < 0.1


def test_short_steps_are_learnt_as_well_as_long_ones():
    """Many short steps are needed for one update, but a surprising step causes an update at once."""
    model = StepTime(UNKNOWN)
    assert median(steps(model, 400, Random(6), speed=0.005)[-100:]) < 0.04
    before = steps(model, 60, Random(7), speed=0.01)
    assert before[0] > 0.4 and median(before[-10:]) < 0.1


def test_identical_steps_do_not_erase_what_was_learnt_from_others():
    model, rng = StepTime(SMALL_CPU, [0.03] * 32), Random(5)
    alike = StepLoad(4, 0, 4000, 0.0)
    for _ in range(2000):
        model.observe(alike, SMALL_CPU(alike) * rng.lognormvariate(0.0, 0.03))
    other = StepLoad(16, 64, 20_000, 64 * 500.0)
    assert model.cost(other) == pytest.approx(SMALL_CPU(other), rel=0.1)


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=60), st.integers(0, 9))
def test_coefficients_stay_non_negative(times: list[float], seed: int):
    model, rng = StepTime(), Random(seed)
    for ms in times:
        model.observe(some_load(rng), ms)
        assert all(
            0 <= value < float("inf")
            for value in (model.cost.base, model.cost.per_decode, model.cost.per_prefill)
        )
        assert model.cost.per_key >= 0 and model.cost.per_pair >= 0 and model.margin >= 1.0


@given(st.integers(0, 8000), st.floats(0.0, 5000.0))
def test_one_token_more_than_the_largest_chunk_exceeds_the_budget(start: int, ms: float):
    count = SMALL_CPU.chunk(start, ms)
    assert SMALL_CPU.prefill(start, count) <= ms + 1e-6
    assert SMALL_CPU.prefill(start, count + 1) > ms


def test_a_step_of_decodes_costs_its_base_plus_its_rows():
    cost = StepCost(base=10.0, per_decode=1.0, per_prefill=1.0)
    assert cost.decodes(5, 0) == 15.0 and cost.row(0) == 1.0


def test_a_fit_needs_a_step_and_sets_negative_coefficients_to_zero():
    with pytest.raises(ValueError, match="at least one"):
        fit([])
    falling = [(StepLoad(decode), 10.0 - decode / 10) for decode in range(1, 20)]
    assert fit(falling).per_decode == 0.0


def test_outliers_do_not_change_a_fit():
    rng = Random(8)
    seen = [(each, SMALL_CPU(each)) for each in (some_load(rng) for _ in range(20))]
    seen[3], seen[11] = (seen[3][0], seen[3][1] * 5), (seen[11][0], seen[11][1] * 3)
    cost = fit(seen)
    for each, ms in seen[12:]:
        assert cost(each) == pytest.approx(ms, rel=0.02)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40))
def test_a_window_gives_quantiles_of_its_most_recent_values(values: list[float]):
    window = Window(8)
    assert window.quantile(0.5, 7.0) == 7.0
    for value in values:
        window.add(value)
    last = sorted(values[-8:])
    assert len(window) == len(last) and window.quantile(0.5, 0.0) == pytest.approx(median(last))
    assert window.quantile(1.0, 0.0) == last[-1]


def test_steadily_growing_contexts_do_not_make_the_model_diverge():
    """Each step differs a little from the previous one, always in the same direction. The model must neither
    extrapolate without limit nor forget its other coefficients."""
    rng = Random(6)
    model = StepTime(
        StepCost(base=9.0, per_decode=9.0, per_prefill=5.0, per_key=0.005, per_pair=0.002), [0.05] * 16
    )
    truth = StepCost(base=12.0, per_decode=4.5, per_prefill=4.4, per_key=0.006, per_pair=0.003)
    errors: list[float] = []
    for step in range(600):
        load = StepLoad(2, 0, 130 + 2 * step, 0.0) if step % 3 else StepLoad(0, 2, 0, 2 * (8.0 + step))
        errors.append(abs(model.cost(load) / truth(load) - 1.0))
        model.observe(load, truth(load) * rng.lognormvariate(0.0, 0.1))
    assert max(errors[50:]) < 0.3 and median(errors) < 0.1


def test_the_written_out_elimination_solves_what_numpy_solves():
    rng = np.random.default_rng(5)
    for _ in range(50):
        factor = rng.normal(size=(5, 5))
        matrix, target = factor @ factor.T + np.eye(5), rng.normal(size=5)
        system = np.column_stack([matrix, target]).tolist()
        assert solved(system) == pytest.approx(np.linalg.solve(matrix, target).tolist())
