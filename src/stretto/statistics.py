"""The one definition of a percentile, of a proportion's interval, and the summary that every report uses.

It knows plain numbers only. Values keep the unit in which they came.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import sqrt

from msgspec import Struct


class Spread(Struct, frozen=True):
    """A distribution in five numbers, in the unit of its values."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def quantile(ordered: Sequence[float], q: float) -> float:
    """The value that a share `q` (0 to 1) of the values does not exceed.

    `ordered` must rise. Between two neighbours the result is linear, as numpy has it by default (type 7 of
    Hyndman and Fan, The American Statistician 50, 1996). Raises ValueError when there are no values.
    """
    if not ordered:
        raise ValueError("no values have no quantile")
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spread(values: Iterable[float]) -> Spread | None:
    """The distribution of some values in any order; None when there are none."""
    ordered = sorted(values)
    if not ordered:
        return None
    mean = sum(ordered) / len(ordered)
    return Spread(mean, quantile(ordered, 0.5), quantile(ordered, 0.9), quantile(ordered, 0.99), ordered[-1])


def wilson(right: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a proportion: 95 % with the default `z` (E. B. Wilson, JASA 22, 1927).

    Both numbers may be effective ones of weighted values. `count = 0` gives (0, 1).
    """
    if not count:
        return 0.0, 1.0
    share, scale = right / count, 1 + z * z / count
    centre = share + z * z / (2 * count)
    spread = z * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
