"""Which variants share an estimate of quality."""

from __future__ import annotations

import pytest

from stretto.ladder.quality import measured_qualities
from stretto.ladder.registry import Flips, QualityInterval, Variant
from tests.ladder.tiny_ladder import variant

COUNT = 900


def measured(name: str, mean: float, size: int, worse: float = 0.0, better: float = 0.0) -> Variant:
    quality = QualityInterval(mean, mean - 0.01, mean + 0.01, COUNT)
    return variant(name, quality=quality, bytes=size, flips=Flips(worse / COUNT, better / COUNT))


def test_a_variant_that_answers_as_the_top_does_lends_it_its_estimate() -> None:
    full, int8, small = measured("full", 0.9, 3), measured("int8", 0.9 - 1 / COUNT, 2, 2, 1), variant("small")
    found = measured_qualities([full, int8, small], "full")
    assert found["full"] is found["int8"] is not found["small"]
    assert found["full"]._usual.mean == int8.quality.mean  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(
    ("worse", "better", "mean"),
    [
        (8, 0, 0.9 - 8 / COUNT),  # significantly worse
        (30, 30, 0.9),  # as good, but with other prompts
        (0, 0, 0.85),  # flips that were not measured
    ],
)
def test_variants_that_are_not_alike_keep_their_own(worse: int, better: int, mean: float) -> None:
    found = measured_qualities([measured("full", 0.9, 3), measured("int8", mean, 2, worse, better)], "full")
    assert found["full"] is not found["int8"]


def test_without_the_top_each_variant_has_its_own() -> None:
    found = measured_qualities([measured("a", 0.9, 3), measured("b", 0.9, 2)], "full")
    assert found["a"] is not found["b"]
