"""The percentile functions, checked against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.statistics import quantile, spread

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


def test_quantiles_equal_those_of_numpy() -> None:
    assert [quantile([1.0, 2.0, 3.0, 4.0], q) for q in (0, 0.5, 0.9, 1)] == pytest.approx([1, 2.5, 3.7, 4])
    assert quantile([5.0], 0.99) == 5.0
    seen = spread([4.0, 1.0, 2.0, 3.0])
    assert seen is not None
    assert [seen.mean, seen.p50, seen.p90, seen.p99, seen.max] == pytest.approx([2.5, 2.5, 3.7, 3.97, 4.0])


@given(VALUES, st.floats(0, 1))
def test_a_single_quantile_equals_the_default_of_numpy(values: list[float], q: float) -> None:
    assert quantile(sorted(values), q) == pytest.approx(float(np.quantile(values, q)), rel=1e-9, abs=1e-6)


def test_an_empty_list_has_no_distribution() -> None:
    assert spread([]) is None
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)
