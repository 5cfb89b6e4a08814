"""Off-policy evaluation: its estimators on cases computed by hand, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.ladder.learning.off_policy import LoggedChoice, MissingOverlap, PolicyValue, evaluate
from stretto.statistics import wilson

EVEN = (0.5, 0.5)


def log(count: int = 200, propensities: tuple[float, ...] = EVEN, seed: int = 0) -> list[LoggedChoice]:
    """Variant 0 is right in 90 of 100 cases, variant 1 in 40; the estimates say 80 and 50."""
    rng = np.random.default_rng(seed)
    rows: list[LoggedChoice] = []
    for _ in range(count):
        chosen = int(rng.random() >= propensities[0])
        reward = float(rng.random() < (0.9, 0.4)[chosen])
        rows.append(LoggedChoice(chosen, reward, propensities, (0.8, 0.5)))
    return rows


def contains(value: PolicyValue, truth: float) -> bool:
    return value.low <= truth <= value.high


def test_the_policy_that_ran_has_the_mean_of_its_rewards() -> None:
    rows = log()
    report = evaluate(rows, [row.propensities for row in rows])
    mean = sum(row.reward for row in rows) / len(rows)
    assert report.ips.mean == report.snips.mean == pytest.approx(mean)
    assert report.effective == pytest.approx(len(rows)) and report.largest_weight == 1.0


def test_each_estimator_is_what_its_paper_says() -> None:
    rows = log(400, (0.25, 0.75))
    report = evaluate(rows, [(1.0, 0.0)] * 400)
    hits = [row.reward for row in rows if row.chosen == 0]
    assert report.ips.mean == pytest.approx(4 * sum(hits) / 400)
    assert report.snips.mean == pytest.approx(sum(hits) / len(hits))
    assert report.dr.mean == pytest.approx(0.8 + 4 * sum(hit - 0.8 for hit in hits) / 400)
    assert report.effective == pytest.approx(len(hits)) and report.largest_weight == 4.0
    # With equal weights the interval is Wilson's for the rewards that count.
    low, high = wilson(sum(hits), len(hits))
    assert report.snips.low == pytest.approx(low, abs=0.01) and report.snips.low < low
    assert report.snips.high == pytest.approx(high, abs=0.01) and report.snips.high > high


def test_rewards_that_are_all_right_leave_a_doubt() -> None:
    report = evaluate([LoggedChoice(0, 1.0, EVEN, EVEN)] * 100, [(1.0, 0.0)] * 100)
    assert report.snips.mean == 1.0 and report.snips.high == pytest.approx(1.0) and report.snips.low < 0.97


def test_a_good_expectation_narrows_the_doubly_robust_interval_and_a_bad_one_adds_no_bias() -> None:
    covered = {"good": 0, "bad": 0}
    widths = {"good": 0.0, "bad": 0.0}
    for seed in range(100):
        rows = log(300, (0.3, 0.7), seed)
        for name, expected in (("good", (0.9, 0.4)), ("bad", (0.1, 1.0))):
            report = evaluate([row._replace(expected=expected) for row in rows], [(1.0, 0.0)] * 300)
            covered[name] += contains(report.dr, 0.9)
            widths[name] += report.dr.high - report.dr.low
    assert covered["good"] >= 88 and covered["bad"] >= 88
    assert widths["good"] < 0.6 * widths["bad"]


@given(st.integers(0, 50), st.floats(0.1, 0.9))
def test_intervals_hold_their_means(seed: int, share: float) -> None:
    report = evaluate(log(500, (share, 1 - share), seed), [EVEN] * 500)
    for value in (report.ips, report.snips, report.dr):
        assert value.low <= value.mean <= value.high
    assert 0.0 <= report.snips.mean <= 1.0


def test_a_policy_that_chooses_what_the_log_could_not_is_refused() -> None:
    rows = log()
    rows[3] = LoggedChoice(0, 1.0, (1.0, 0.0), (0.8, 0.5))
    with pytest.raises(MissingOverlap, match=r"in 1 of 200 choices .* variant 1"):
        evaluate(rows, [EVEN] * 200)
    evaluate(rows, [EVEN] * 3 + [(1.0, 0.0)] + [EVEN] * 196)


def test_too_few_rewards_are_refused_with_their_number() -> None:
    with pytest.raises(MissingOverlap, match=r"40 rewards say as much as 40\.0"):
        evaluate(log(40), [EVEN] * 40)
    rare = log(500, (0.98, 0.02))
    with pytest.raises(MissingOverlap, match="and an interval needs 50"):
        evaluate(rare, [(0.0, 1.0)] * 500)


def test_a_single_reward_that_decides_is_refused() -> None:
    rows = [LoggedChoice(0, 1.0, EVEN, EVEN)] * 999 + [LoggedChoice(0, 0.0, (0.004, 0.996), EVEN)]
    with pytest.raises(MissingOverlap, match="one reward has 11% of all weight"):
        evaluate(rows, [EVEN] * 1000)


@pytest.mark.parametrize(
    ("rows", "target", "message"),
    [
        ([], [], "0 choices"),
        (log(60), [EVEN] * 59, "60 choices and 59 rows"),
        (log(60), [(1.0,)] * 60, "2 variants, and the target 1"),
        (log(60), [(0.6, 0.6)] * 60, "the target: row 0 holds no probabilities"),
        (log(60), [(1.5, -0.5)] * 60, "the target: row 0 holds no probabilities"),
        (log(60), [(float("nan"), 1.0)] * 60, "the target: row 0 holds no probabilities"),
        ([LoggedChoice(0, 1.0, (0.5, 0.4), EVEN)] * 60, [EVEN] * 60, "the log: row 0 holds no probabilities"),
        ([LoggedChoice(1, 1.0, (1.0, 0.0), EVEN)] * 60, [(1.0, 0.0)] * 60, "a choice of probability 0"),
    ],
)
def test_what_is_no_log_and_no_policy_is_refused(
    rows: list[LoggedChoice], target: list[tuple[float, ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(rows, target)
