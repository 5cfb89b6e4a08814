"""The live view's snapshot: what it counts, and what it forgets."""

from __future__ import annotations

import pytest

from stretto.telemetry.live import WINDOW_S, Kept, Recent
from stretto.telemetry.metrics import Ended
from stretto.types import StepStats


def test_a_snapshot_of_the_last_seconds() -> None:
    now = 0.0
    recent = Recent({}, lambda: now)

    def step(ms: float, predicted_ms: float | None) -> None:
        recent.step(StepStats("m", now, ms, 4, 60, 100, 4, 2, 10, 64, predicted_ms=predicted_ms))

    step(1.0, 9.0)
    recent.ended(Ended("chat", "ok", 9.0, "late", "default", "m", first=9.0, gaps=[0.5]))
    now = WINDOW_S + 1
    for predicted in (8.0, 9.0, None):
        step(10.0, predicted)
    recent.ended(Ended("chat", "ok", 1.0, "on_time", "default", "m", first=0.02, gaps=[0.01, 0.03]))
    recent.ended(Ended("chat", "overloaded", 0.0, "refused", "priority", "m"))
    recent.ended(Ended("chat", "client_gone", 0.0, "cancelled", "flex", "m"))
    seen = recent.snapshot(running=1, restarts=2, ready=True)
    assert (seen.tokens_s, seen.prefill_s, seen.steps_s) == (12 / WINDOW_S, 180 / WINDOW_S, 3 / WINDOW_S)
    assert (seen.running, seen.waiting, seen.blocks_used, seen.blocks_total) == (4, 2, 54, 64)
    assert (seen.ttft_ms, seen.step_ms) == ((20.0, 20.0), (10.0, 10.0))
    assert seen.itl_ms == pytest.approx((20.0, 29.8))
    assert (seen.step_tokens, seen.steps) == ((4.0, 60.0), ((10.0, 8.0), (10.0, 9.0)))
    assert seen.model_error == pytest.approx(0.15)
    assert seen.tiers == {"default": Kept(1, 2, 1, 1, 1 / WINDOW_S), "priority": Kept(0, 1, 0, 1, 0.0)}
    assert (seen.refused, seen.ended, seen.restarts) == ({"overloaded": 1}, 4, 2)
    idle = recent.snapshot(running=0, restarts=2, ready=True)
    assert (idle.running, idle.waiting, idle.blocks_used) == (0, 0, 0), "the last step does not know it was"
