"""The threshold of a cascade, and what is measured of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stretto.ladder.registry import MeasuredCascade, QualityInterval
from stretto.optimise.answers import TracedAnswer
from stretto.optimise.cascade.calibrate import kept_cascade, threshold

SURE = [-0.1, -0.2, -0.5, -1.0]
CASCADE = MeasuredCascade(
    begins="small", below=-0.3, quality=QualityInterval(0.9, 0.8, 1.0, 60), loss=0.0, escalated=0.5, begun=0.4
)


@pytest.mark.parametrize(
    ("first", "most_loss", "below"),
    [
        ([True, True, False, False], 0.0, -0.35),  # between the second and the third
        ([True, True, False, False], 0.25, -0.75),
        ([True, True, True, True], 0.0, -1.0),  # nobody is less sure: the small one answers alone
        ([False, True, True, True], 0.0, None),  # it is wrong where it is surest
        ([True, False, True, False], 0.0, -0.15),
    ],
)
def test_the_threshold_is_the_lowest_that_loses_little(
    first: list[bool], most_loss: float, below: float | None
) -> None:
    found = threshold(SURE, first, [True] * 4, most_loss)
    assert found == (below if below is None else pytest.approx(below))


def test_where_the_better_one_is_wrong_too_nothing_is_lost() -> None:
    assert threshold(SURE, [False] * 4, [False] * 4, 0.0) == -1.0


def test_a_traced_answer_is_kept_up_to_the_first_unsure_token() -> None:
    answer = TracedAnswer([5, 6, 7], [-0.1, -0.4, -0.1, -0.9])  # the last one ended it
    assert [answer.sure_of(below) for below in (-0.05, -0.3, -0.5, -1.0)] == [0, 1, 3, 4]
    assert (answer.least, answer.drawn) == (-0.9, 4)


def test_a_measurement_is_kept_until_something_changes(tmp_path: Path) -> None:
    calls: list[str] = []

    def make(name: str, found: MeasuredCascade | None) -> Callable[[], MeasuredCascade | None]:
        return lambda: calls.append(name) or found

    file = tmp_path / "cascade.json"
    assert kept_cascade(file, "a", make("first", CASCADE)) == CASCADE
    assert kept_cascade(file, "a", make("again", None)) == CASCADE
    assert kept_cascade(file, "b", make("changed", None)) is None
    assert kept_cascade(file, "b", make("known to be none", CASCADE)) is None
    assert calls == ["first", "changed"]
