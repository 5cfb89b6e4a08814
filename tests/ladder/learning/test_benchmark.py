"""What learning from feedback promises, on prompts for which the answers of all variants are known."""

from __future__ import annotations

import pytest

from benchmarks import feedback
from benchmarks.feedback import DriftSetting, KnownAnswers, LogSetting, Recovery


@pytest.fixture(scope="module")
def known() -> KnownAnswers:
    return feedback.drawn(1200, seed=5)


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_intervals_of_all_estimators_contain_the_truth_as_often_as_they_say(known: KnownAnswers) -> None:
    rows = {row.policy: row for row in feedback.coverage(known, LogSetting(size=600, learns_every=4), seed=3)}
    evaluated = [row for row in rows.values() if row.refused == 0]
    assert len(evaluated) >= 2
    for row in evaluated:
        # 95 % of 200, less 3.3 standard deviations of the count.
        assert min(row.shares.values()) >= 0.90, row
        assert row.effective >= 50
    assert rows["always tiny"].refused > 150  # the log says too little about it


@pytest.fixture(scope="module")
def recovered(known: KnownAnswers) -> Recovery:
    return feedback.recovery(known, DriftSetting("order", before=600, after=600), seeds=4)


@pytest.fixture(scope="module")
def unlearned(known: KnownAnswers) -> Recovery:
    return feedback.recovery(known, DriftSetting("order", before=600, after=600, learns=False), seeds=4)


def test_200_feedbacks_after_a_drift_the_choices_beat_every_fixed_policy(
    recovered: Recovery, unlearned: Recovery
) -> None:
    assert unlearned.fixed_later > 0.02  # without learning they are worse than the best fixed variant
    assert recovered.fixed_later < 0.0  # the cumulative regret falls again
    assert recovered.worst <= 200
    assert recovered.later < 0.4 * unlearned.later


def test_floors_hold_while_it_learns_and_explores(recovered: Recovery, unlearned: Recovery) -> None:
    assert 0.0 < recovered.explored < 0.1
    assert recovered.explored_violations <= 0.01
    assert recovered.all_violations <= 0.01
    assert recovered.violations < 0.5 * unlearned.violations


def test_without_a_drift_learning_costs_little(recovered: Recovery, unlearned: Recovery) -> None:
    assert recovered.before < unlearned.before + 0.015
