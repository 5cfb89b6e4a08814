"""The priority quota: a tenant may use a share of the machine's time in the last minute."""

from __future__ import annotations

from math import e

from hypothesis import given
from hypothesis import strategies as st

from stretto.server.quota import DECAY_S, PriorityQuota


def test_a_tenant_over_its_quota_waits_and_other_tenants_do_not():
    quota = PriorityQuota(0.5)
    assert quota.allows("greedy", 0.0)
    quota.charge("greedy", 31_000.0, 0.0)
    assert not quota.allows("greedy", 0.0) and quota.allows("frugal", 0.0)
    assert quota.allows("greedy", 5.0), "31 s fade below 30 s within 5 s"


def test_a_share_of_zero_allows_nothing_and_a_share_of_one_allows_a_minute():
    assert not PriorityQuota(0.0).allows("anybody", 0.0)
    whole = PriorityQuota(1.0)
    whole.charge("one", 59_000.0, 0.0)
    assert whole.allows("one", 0.0)
    whole.charge("one", 2_000.0, 0.0)
    assert not whole.allows("one", 0.0)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(1, 5_000)), min_size=1, max_size=50))
def test_work_allowed_to_a_busy_tenant_stays_within_its_share(requests: list[tuple[float, float]]):
    """Work of the last minute counts at least 1/e, so it stays below e * (share + one request)."""
    quota, now, allowed = PriorityQuota(0.25), 0.0, list[tuple[float, float]]()
    for pause, ms in requests * 4:
        now += pause
        if quota.allows("one", now):
            quota.charge("one", ms, now)
            allowed.append((now, ms))
    for end, _ in allowed:
        recent = sum(ms for at, ms in allowed if end - DECAY_S <= at <= end)
        assert recent <= e * (0.25 * DECAY_S * 1e3 + 5_000), "work of the last minute counts at least 1/e"


def test_the_number_of_tracked_tenants_is_bounded():
    quota = PriorityQuota(0.5, max_tenants=20)
    quota.charge("heavy", 40_000.0, 0.0)
    for index in range(30):
        quota.charge(f"tenant {index}", 1.0, 0.0)
    assert len(quota) == 20 and not quota.allows("heavy", 0.0)
