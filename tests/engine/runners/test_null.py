"""The path of a null model says what its steps take."""

from __future__ import annotations

import pytest

from stretto.engine.runners.null import null_cost
from stretto.engine.step_time import StepCost
from stretto.errors import StartError


@pytest.mark.parametrize(
    ("path", "cost"),
    [
        ("null", StepCost()),
        ("null:20", StepCost(base=20.0)),
        ("null:38:1.5", StepCost(base=38.0, per_decode=1.5)),
        ("null:38:1.5:2.9", StepCost(base=38.0, per_decode=1.5, per_prefill=2.9)),
    ],
)
def test_a_path_names_what_a_step_takes(path: str, cost: StepCost) -> None:
    assert null_cost(path) == cost


@pytest.mark.parametrize("path", ["null:", "null:fast", "null:-1", "null:nan", "null:1:inf", "null:1:2:3:4"])
def test_a_wrong_path_is_refused_with_an_example(path: str) -> None:
    with pytest.raises(StartError, match=r"is no null model: write null, null:20 .* or null:38:1\.5:2\.9"):
        null_cost(path)
