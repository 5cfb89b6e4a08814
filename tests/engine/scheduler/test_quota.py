"""What a tenant may ask for at priority: a share of the machine's last minute."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stretto.engine.scheduler.quota import MEMORY_S, MOST_TENANTS, Shares


def test_a_tenant_beyond_its_share_waits_for_it_to_fade_and_others_do_not():
    shares = Shares(0.5)
    assert shares.allows("greedy", 0.0)
    shares.charge("greedy", 31_000.0, 0.0)
    assert not shares.allows("greedy", 0.0) and shares.allows("modest", 0.0)
    assert shares.allows("greedy", 5.0), "31 s fade below 30 s within 5 s"


def test_no_share_is_none_and_a_whole_one_is_a_minute():
    assert not Shares(0.0).allows("anybody", 0.0)
    whole = Shares(1.0)
    whole.charge("one", 59_000.0, 0.0)
    assert whole.allows("one", 0.0)
    whole.charge("one", 2_000.0, 0.0)
    assert not whole.allows("one", 0.0)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(1, 5_000)), min_size=1, max_size=50))
def test_a_tenant_that_asks_without_end_gets_its_share_in_the_long_run(asked: list[tuple[float, float]]):
    """What is allowed in a minute is never more than the share and one request, whatever the pattern."""
    shares, now, allowed = Shares(0.25), 0.0, list[tuple[float, float]]()
    for pause, ms in asked * 4:
        now += pause
        if shares.allows("one", now):
            shares.charge("one", ms, now)
            allowed.append((now, ms))
    for end, _ in allowed:
        recent = sum(ms for at, ms in allowed if end - MEMORY_S <= at <= end)
        assert recent <= 2.72 * (0.25 * MEMORY_S * 1e3 + 5_000)


def test_tenants_without_end_take_no_memory_without_end():
    shares = Shares(0.5)
    shares.charge("heavy", 40_000.0, 0.0)
    for index in range(MOST_TENANTS + 10):
        shares.charge(f"tenant {index}", 1.0, 0.0)
    assert len(shares._used) == MOST_TENANTS and not shares.allows("heavy", 0.0)
