"""What another way to choose would have been worth, from the choices and rewards of the one that ran.

Three estimators side by side, because each fails in a way of its own. An estimate is refused where the log
cannot support one. It knows probabilities and rewards, and neither prompts nor variants' names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from stretto.statistics import wilson

NORMAL_95 = 1.96
LEAST_EFFECTIVE = 50.0  # rewards; with fewer, no approximation of the distribution of a weighted mean holds
MOST_WEIGHT = 0.1  # of all weights together that one reward may have
SUM_ERROR = 1e-6
Rows = NDArray[np.float64]


class MissingOverlap(ValueError):
    """The log has too little of what the other policy would choose."""


class LoggedChoice(NamedTuple):
    """A choice with its reward from 0 to 1. Each list has an entry for each variant.

    `propensities`: the probabilities with which it was drawn; 0 for what was not feasible. `expected`: the
    qualities that had been estimated, without any reward of this log.
    """

    chosen: int
    reward: float
    propensities: Sequence[float]
    expected: Sequence[float]


class PolicyValue(Struct, frozen=True):
    """An estimate of the mean reward, with its 95 % confidence interval. Those of `ips` and `dr` may leave 0
    to 1."""

    mean: float
    low: float
    high: float


class OffPolicyReport(Struct, frozen=True, kw_only=True):
    """The value of a policy by three estimators.

    `ips`: inverse propensity scores (D. Horvitz, D. Thompson, JASA 47, 1952), without bias and with the most
    variance. `snips`: the same, divided by the sum of the weights (A. Swaminathan, T. Joachims, "The
    self-normalized estimator for counterfactual learning", NeurIPS 2015). `dr`: doubly robust, the expected
    quality and the weighted error of it (M. Dudik, J. Langford, L. Li, ICML 2011). `effective`: the rewards
    that would say as much with equal weights (L. Kish, "Survey sampling", 1965).
    """

    ips: PolicyValue
    snips: PolicyValue
    dr: PolicyValue
    count: int
    effective: float
    largest_weight: float


def evaluate(log: Sequence[LoggedChoice], target: Sequence[Sequence[float]]) -> OffPolicyReport:
    """The value of the policy that would have drawn the variants of choice i with probabilities `target[i]`.

    Raises MissingOverlap when the target draws what the log never could, or when the rewards that support it
    are too few; ValueError for probabilities that are none.
    """
    if len(log) != len(target) or not log:
        raise ValueError(
            f"{len(log)} choices and {len(target)} rows of a target: give one row for each choice"
        )
    logged = np.array([row.propensities for row in log], dtype=np.float64)
    wanted = np.array(target, dtype=np.float64)
    if logged.shape != wanted.shape:
        raise ValueError(f"the log has {logged.shape[1]} variants, and the target {wanted.shape[-1]}")
    _check_probabilities("the log", logged)
    _check_probabilities("the target", wanted)
    places = np.arange(len(log))
    chosen = np.array([row.chosen for row in log])
    if not logged[places, chosen].all():
        raise ValueError("the log has a choice of probability 0: it is not the log of these propensities")
    _check_support(logged, wanted)
    rewards = np.array([row.reward for row in log], dtype=np.float64)
    expected = np.array([row.expected for row in log], dtype=np.float64)
    weights: Rows = wanted[places, chosen] / logged[places, chosen]
    effective, largest = _check_weights(weights)
    direct: Rows = (wanted * expected).sum(1)
    reach = _reach(weights)
    return OffPolicyReport(
        ips=_mean(weights * rewards, reach),
        snips=_ratio(weights, rewards, reach),
        dr=_mean(direct + weights * (rewards - expected[places, chosen]), reach),
        count=len(log),
        effective=effective,
        largest_weight=largest,
    )


def _mean(terms: Rows, reach: float) -> PolicyValue:
    """The mean of independent terms, with its interval."""
    mean = float(terms.mean())
    half = reach * float(terms.std(ddof=1)) / len(terms) ** 0.5
    return PolicyValue(mean, mean - half, mean + half)


def _ratio(weights: Rows, rewards: Rows, reach: float) -> PolicyValue:
    """The weighted mean of the rewards, with Wilson's interval for as many rewards as have its variance.

    C. Franco et al. compare such intervals (Journal of Survey Statistics and Methodology 7, 2019): the plain
    one is too narrow when a few large weights meet rewards near 0 or 1. An error counts more the more its
    reward moved the mean (HC3 of J. MacKinnon, H. White, Journal of Econometrics 29, 1985).
    """
    total = float(weights.sum())
    mean = float((weights * rewards).sum()) / total
    errors: Rows = weights * (rewards - mean) / (1.0 - weights / total)
    variance = float((errors * errors).sum()) / total**2
    count = mean * (1.0 - mean) / variance if variance > 0.0 else _effective(weights)
    low, high = wilson(mean * count, count, reach)
    return PolicyValue(mean, low, high)


def _reach(weights: Rows) -> float:
    """How many standard errors an interval reaches: Student's quantile, because a few large weights decide
    the estimated variance (F. Satterthwaite, Biometrics Bulletin 2, 1946, for the degrees of freedom)."""
    squares: Rows = weights * weights
    freedom = max(3.0, float(squares.sum() ** 2 / (squares * squares).sum()) - 1.0)
    z = NORMAL_95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _check_probabilities(whose: str, rows: Rows) -> None:
    wrong = np.flatnonzero(
        (rows < 0.0).any(1) | (abs(rows.sum(1) - 1.0) > SUM_ERROR) | ~np.isfinite(rows).all(1)
    )
    if len(wrong):
        raise ValueError(f"{whose}: row {wrong[0]} holds no probabilities: {rows[wrong[0]].tolist()}")


def _check_support(logged: Rows, wanted: Rows) -> None:
    missing = (wanted > 0.0) & (logged == 0.0)
    if missing.any():
        rows = missing.any(1)
        variant = int(missing.sum(0).argmax())
        raise MissingOverlap(
            f"in {int(rows.sum())} of {len(rows)} choices the other policy may choose a variant that the log"
            f" could not (most often variant {variant}), so nothing is known of those answers. Evaluate a"
            " policy that stays within the feasible variants, or log with exploration"
        )


def _effective(weights: Rows) -> float:
    total = float(weights.sum())
    return total * total / float((weights * weights).sum()) if total else 0.0


def _check_weights(weights: Rows) -> tuple[float, float]:
    """The effective number of rewards, and the largest weight. Raises MissingOverlap."""
    total, largest, effective = float(weights.sum()), float(weights.max()), _effective(weights)
    if effective < LEAST_EFFECTIVE:
        raise MissingOverlap(
            f"{len(weights)} rewards say as much as {effective:.1f} about the other policy, and an interval"
            f" needs {LEAST_EFFECTIVE:.0f}: log more rewards, or with more exploration"
        )
    if largest > MOST_WEIGHT * total:
        raise MissingOverlap(
            f"one reward has {largest / total:.0%} of all weight, and may have {MOST_WEIGHT:.0%}: log more"
            " rewards, or with more exploration"
        )
    return effective, largest
