"""The snapshot for the live view: rates, times and attainment within its time window."""

from __future__ import annotations

import pytest
from msgspec import UNSET

from stretto.telemetry.live import HISTORY, WINDOW_S, Live, Recent, TierAttainment
from stretto.telemetry.metrics import Ended
from stretto.types import Objective, StepStats

OBJECTIVES = {"priority": Objective(ttft_ms=100.0)}


class World:
    """One step and one late request before the window; three steps and three requests within it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.recent = Recent(lambda: OBJECTIVES, lambda: self.now)
        self.step(1.0, 9.0)
        self.recent.ended(Ended("chat", "ok", 9.0, "late", "default", "m", first=9.0, gaps=[0.5]))
        self.now = WINDOW_S + 1
        for predicted in (8.0, 9.0, None):
            self.step(10.0, predicted)
        self.recent.ended(Ended("chat", "ok", 1.0, "on_time", "default", "m", first=0.02, gaps=[0.01, 0.03]))
        self.recent.ended(Ended("chat", "overloaded", 0.0, "refused", "priority", "m"))
        self.recent.ended(Ended("chat", "client_gone", 0.0, "cancelled", "flex", "m"))

    def step(self, ms: float, predicted_ms: float | None) -> None:
        self.recent.step(StepStats("m", self.now, ms, 4, 60, 100, 4, 2, 10, 64, predicted_ms=predicted_ms))

    def snapshot(self, running: int = 1) -> Live:
        return self.recent.snapshot(running=running, restarts=2, ready=True)


@pytest.fixture
def seen() -> Live:
    return World().snapshot()


def test_rates_count_only_the_window(seen: Live) -> None:
    assert seen.tokens_s == 12 / WINDOW_S
    assert seen.prefill_s == 180 / WINDOW_S
    assert seen.steps_s == 3 / WINDOW_S


def test_sequences_and_blocks_are_those_of_the_last_step(seen: Live) -> None:
    assert (seen.running, seen.waiting) == (4, 2)
    assert (seen.blocks_used, seen.blocks_total) == (54, 64)


def test_an_idle_worker_shows_no_sequences_though_its_last_step_had_some() -> None:
    idle = World().snapshot(running=0)
    assert (idle.running, idle.waiting, idle.blocks_used) == (0, 0, 0)


def test_times_are_median_and_p99_in_milliseconds(seen: Live) -> None:
    assert seen.ttft_ms == (20.0, 20.0)
    assert seen.itl_ms == pytest.approx((20.0, 29.8))
    assert seen.step_ms == (10.0, 10.0)


def test_step_tokens_are_the_mean_of_the_window(seen: Live) -> None:
    assert seen.step_tokens == (4.0, 60.0)


def test_model_error_uses_only_steps_with_a_prediction(seen: Live) -> None:
    assert seen.steps == ((10.0, 8.0), (10.0, 9.0))
    assert seen.model_error == pytest.approx(0.15)


def test_attainment_covers_start_and_window_without_cancelled_requests(seen: Live) -> None:
    assert seen.tiers == {
        "default": TierAttainment(1, 2, 1, 1, 1 / WINDOW_S),
        "priority": TierAttainment(0, 1, 0, 1, 0.0),
    }


def test_refusals_and_ended_requests_count_since_the_start(seen: Live) -> None:
    assert seen.refused == {"overloaded": 1}
    assert seen.ended == 4


def test_restarts_readiness_and_objectives_are_passed_on(seen: Live) -> None:
    assert (seen.restarts, seen.ready) == (2, True)
    assert seen.objectives == OBJECTIVES


def test_an_unused_worker_shows_no_times() -> None:
    empty = Recent(dict, lambda: 0.0).snapshot(running=0, restarts=0, ready=False)
    assert (empty.ttft_ms, empty.itl_ms, empty.step_ms) == ((None, None),) * 3
    assert (empty.model_error, empty.tiers, empty.steps) == (None, {}, ())


def test_the_history_holds_the_windows_before_this_one() -> None:
    world = World()
    now = world.snapshot()
    (past,) = world.recent.with_history(now).history or ()
    assert past.ago_s == WINDOW_S
    assert (past.live.tokens_s, past.live.ttft_ms) == (4 / WINDOW_S, (9000.0, 9000.0))
    assert now.history is UNSET, "only the first event of a stream has it"


def test_the_history_is_bounded_and_reads_each_step_once() -> None:
    world = World()
    for _ in range(1000):
        world.now += WINDOW_S
        world.step(1.0, None)
    past = world.recent.with_history(world.snapshot()).history or ()
    assert len(past) == HISTORY
    assert [each.ago_s for each in past] == [WINDOW_S * index for index in range(HISTORY, 0, -1)]
    assert {each.live.steps_s for each in past} == {1 / WINDOW_S}
