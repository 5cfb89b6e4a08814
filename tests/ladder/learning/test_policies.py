"""What a tenant's rewards say about other ways to choose."""

from __future__ import annotations

import numpy as np
import pytest

from stretto.ladder.learning.feedback import KeptChoice, MadeChoice, Reward
from stretto.ladder.learning.policies import BEST, policies

NAMES = ("full", "tiny")


def kept(number: int, variant: str, reward: float, propensities: tuple[float, ...]) -> KeptChoice:
    choice = MadeChoice("desk", variant, NAMES, propensities, (0.9, 0.5))
    return KeptChoice(str(number), choice, 0.0, Reward(reward))


def test_explored_choices_say_what_each_variant_would_have_been_worth() -> None:
    rng = np.random.default_rng(0)
    rows: list[KeptChoice] = []
    for number in range(600):
        variant = NAMES[int(rng.random() < 0.4)]
        right = float(rng.random() < (0.8 if variant == "full" else 0.3))
        rows.append(kept(number, variant, right, (0.6, 0.4)))
    found = {each.name: each.report for each in policies(rows)["desk"]}
    for name, truth in (("always full", 0.8), ("always tiny", 0.3), (BEST, 0.8)):
        report = found[name]
        assert report is not None and report.effective > 100
        for value in (report.ips, report.snips, report.dr):
            assert value.low <= value.mean <= value.high
            assert value.mean == pytest.approx(truth, abs=0.1)


def test_without_overlap_nothing_is_said() -> None:
    rows = [kept(number, "full", 1.0, (1.0, 0.0)) for number in range(100)]
    found = {each.name: each for each in policies(rows)["desk"]}
    assert found["always tiny"].report is None and "could not" in found["always tiny"].refused
    assert found["always full"].report is not None


def test_choices_without_probabilities_do_not_count() -> None:
    assert policies([kept(1, "full", 1.0, ())]) == {}
    (only,) = {each.refused for each in policies([kept(1, "full", 1.0, (1.0, 0.0))])["desk"]}
    assert only == "1 rewards: an interval needs more"
