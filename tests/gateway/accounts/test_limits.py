"""Limits and their meters, in virtual time."""

from __future__ import annotations

from datetime import UTC, datetime
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.gateway.accounts.limits import HELD_S, BudgetMeter, KeyLimit, Now, RateMeter, window_of


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def now(steady: float = 0.0, wall: str = "2026-11-29T12:00:00") -> Now:
    return Now(steady, at(wall))


@pytest.mark.parametrize("text", ["requests=60/minute", "cost=0.5/month", "tokens=100000/ever"])
def test_a_limit_is_written_as_it_was_read(text: str):
    assert str(KeyLimit.of(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "requests", "requests=60", "requests=-1/minute", "calls=1/minute", "tokens=1/year"),
        *("cost=nan/day", "tokens=1e999/day", "tokens=1/minute ", "tokens=/minute"),
    ],
)
def test_what_is_no_limit_is_refused_with_an_example(text: str):
    with pytest.raises(ValueError, match="is no limit"):
        KeyLimit.of(text)


@pytest.mark.parametrize(
    ("period", "start", "end"),
    [
        ("hour", "2026-11-29T12:00:00", "2026-11-29T13:00:00"),
        ("day", "2026-11-29T00:00:00", "2026-11-30T00:00:00"),
        ("week", "2026-11-23T00:00:00", "2026-11-30T00:00:00"),
        ("month", "2026-11-01T00:00:00", "2026-12-01T00:00:00"),
    ],
)
def test_windows_are_calendar_periods(period: str, start: str, end: str):
    assert window_of(period, at("2026-11-29T12:34:56")) == (at(start), at(end))  # pyright: ignore[reportArgumentType]


def test_a_window_of_december_ends_with_the_year():
    assert window_of("month", at("2026-12-31T23:59:59")).end == at("2027-01-01T00:00:00")
    assert window_of("ever", 0.0) == (-inf, inf)


def test_a_rate_says_exactly_when_there_is_room_again():
    bucket = RateMeter(KeyLimit.of("requests=60/minute"))
    for _ in range(60):
        assert bucket.wait(1, now()) == 0
        bucket.reserve(1, now())
    assert bucket.wait(1, now()) == pytest.approx(1.0)
    assert bucket.wait(1, now(0.999)) > 0
    assert bucket.wait(1, now(1.0)) == 0


@given(
    st.lists(st.floats(0.0, 3.0), min_size=1, max_size=200),
    st.floats(0.5, 100),
    st.sampled_from([1.0, 0.5, 0.25]),
)
def test_a_rate_is_never_exceeded_and_waiting_as_told_is_enough(
    pauses: list[float], most: float, share: float
):
    bucket = RateMeter(KeyLimit("requests", most, "minute"), share)
    steady, taken = 0.0, 0
    for pause in pauses:
        steady += pause
        wait = bucket.wait(1, now(steady))
        if wait and pause > 1:
            steady += wait * (1 + 1e-9)
            assert bucket.wait(1, now(steady)) == 0
            wait = 0
        if not wait:
            bucket.reserve(1, now(steady))
            taken += 1
    assert taken <= most * share * (1 + steady / 60) + 1


def test_a_debt_of_a_rate_is_paid_before_the_next_request():
    bucket = RateMeter(KeyLimit.of("tokens=600/minute"))
    bucket.reserve(100, now())
    bucket.settle(100, 900, now(), now())
    assert bucket.wait(10, now()) == pytest.approx(31.0)
    bucket.settle(0, -10_000, now(), now())
    assert bucket.used(now()) == 0, "a bucket never holds more than its size"


def test_a_request_larger_than_the_rate_waits_for_a_full_bucket():
    bucket = RateMeter(KeyLimit.of("tokens=60/minute"))
    assert bucket.wait(1000, now()) == 0
    bucket.reserve(1000, now())
    assert bucket.wait(1000, now()) == pytest.approx(1000.0)


def test_a_limit_of_nothing_never_lets_anything_through():
    assert RateMeter(KeyLimit.of("requests=0/minute")).wait(1, now()) == inf
    assert BudgetMeter(KeyLimit.of("tokens=0/ever")).wait(1, now()) == inf


def test_a_steady_clock_that_stood_still_gives_nothing():
    bucket = RateMeter(KeyLimit.of("requests=1/second"))
    bucket.reserve(1, now(5.0))
    assert bucket.wait(1, now(4.0)) > 0 and bucket.wait(1, now(5.0)) == pytest.approx(1.0)


def test_a_budget_is_whole_again_in_the_next_period():
    budget = BudgetMeter(KeyLimit.of("tokens=100/day"))
    budget.reserve(100, now())
    budget.settle(100, 100, now(), now())
    assert budget.wait(1, now()) == 12 * 3600 == budget.resets(now())
    assert budget.wait(1, now(wall="2026-11-30T00:00:00")) == 0
    assert budget.used(now(wall="2026-11-30T00:00:00")) == 0


def test_a_reservation_of_yesterday_gives_nothing_back_today():
    budget = BudgetMeter(KeyLimit.of("tokens=100/day"))
    evening, morning = now(wall="2026-11-29T23:59:59"), now(wall="2026-11-30T00:00:01")
    budget.reserve(80, evening)
    budget.reserve(60, morning)
    budget.settle(80, 10, evening, morning)
    assert budget.used(morning) == 70


def test_a_wall_clock_that_jumps_back_keeps_what_is_spent_and_does_not_get_stuck():
    budget = BudgetMeter(KeyLimit.of("tokens=100/day"))
    far = now(wall="2031-01-01T00:00:00")
    budget.reserve(100, far)
    budget.settle(100, 100, far, far)
    back = now(wall="2026-11-29T12:00:00")
    assert budget.wait(1, back) == 12 * 3600, "spent, and whole again at midnight, not in 2031"
    assert budget.wait(1, now(wall="2026-11-30T00:00:00")) == 0


def test_a_changed_limit_keeps_what_is_used():
    bucket, budget = RateMeter(KeyLimit.of("tokens=100/minute")), BudgetMeter(KeyLimit.of("tokens=100/day"))
    for meter in (bucket, budget):
        meter.reserve(60, now())
        meter.change(KeyLimit(meter.limit.quantity, 200, meter.limit.period), 0.5)
        assert (meter.used(now()), meter.size) == (60, 100)
        meter.change(KeyLimit(meter.limit.quantity, 50, meter.limit.period), 1.0)
        assert meter.wait(1, now()) > 0


def test_what_running_requests_hold_of_a_budget_is_soon_free_again():
    budget = BudgetMeter(KeyLimit.of("tokens=100/day"))
    budget.reserve(265, now())
    assert budget.wait(1, now()) == HELD_S
    budget.settle(265, 28, now(), now())
    assert budget.wait(1, now()) == 0 and budget.held == 0
    budget.reserve(265, now())
    budget.settle(265, 90, now(), now())
    assert budget.wait(1, now()) == 12 * 3600
    counted = BudgetMeter(KeyLimit.of("requests=1/day"))
    counted.reserve(1, now())
    assert counted.wait(1, now()) == 12 * 3600, "a request that runs is one"
    budget.reserve(50, now())
    assert budget.wait(1, now(0.0, "2026-11-30T00:00:00")) == 0 and budget.held == 0
