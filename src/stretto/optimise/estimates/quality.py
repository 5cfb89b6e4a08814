"""Fits the chance of a right answer by the prompt, and calibrates it. `stretto.ladder.estimate` applies it.

It knows features and which answers were right, and neither models nor files.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot

from stretto.ladder.estimate import QualityBin, QualityModel, features, raw
from stretto.optimise.data import DataSample
from stretto.optimise.estimates.regression import FeatureWeights, logistic, unseen
from stretto.statistics import wilson

BINS, LEAST_IN_BIN = 10, 30
RIDGE = 0.3
SMOOTHED = 0.5  # how far an answer counts as the mean of its kind
FEWEST_KINDS = 10  # of prompts; the means of fewer say nothing of another one
ONE_SIDED = 1.645  # standard deviations: 95 % of the kinds of prompts are above the bound


def fitted(samples: Sequence[DataSample], rights: Sequence[bool]) -> QualityModel | None:
    """A model of the chance of a right answer by the prompt; None with too few prompts to calibrate it.

    Ridge logistic regression. The calibration table is made of predictions by models that have not seen the
    prompt (cross-validation), so it is honest. Each answer counts half by itself and half as the share of its
    kind (task and level), which chance moves less: the words then tell kinds apart.
    """
    if len(samples) < 2 * LEAST_IN_BIN:
        return None
    rows = [features(sample.question) for sample in samples]
    kinds = [f"{sample.task} {sample.level}" for sample in samples]

    def fit(places: Sequence[int]) -> FeatureWeights:
        labels = smoothed([rights[place] for place in places], [kinds[place] for place in places])
        return logistic([rows[place].pairs() for place in places], labels, RIDGE)

    scores = unseen(rows, fit, raw)
    return QualityModel(fit(range(len(rows))), calibrated(scores, rights, kinds))


def smoothed(rights: Sequence[bool], kinds: Sequence[str]) -> list[float]:
    """Each answer, drawn by `SMOOTHED` to the mean of its kind. A kind has one answer more, of the mean of
    all, so that a small one counts as what is usual. With few kinds the answers stay as they are."""
    if len(set(kinds)) < FEWEST_KINDS:
        return list(map(float, rights))
    usual = sum(rights) / len(rights)
    good, count = dict.fromkeys(kinds, usual), dict.fromkeys(kinds, 1)
    for one, kind in zip(rights, kinds, strict=True):
        good[kind] += one
        count[kind] += 1
    shares = {kind: good[kind] / count[kind] for kind in good}
    return [one + SMOOTHED * (shares[kind] - one) for one, kind in zip(rights, kinds, strict=True)]


def calibrated(
    scores: Sequence[float], rights: Sequence[bool], kinds: Sequence[str] = ()
) -> tuple[QualityBin, ...]:
    """The reliability diagram of some scores as bins of about equal size, joined until their means rise.

    The lower bound of a bin holds for a kind of prompts, not only for their mean: it also counts how much the
    kinds in the bin differ. Without `kinds` all prompts are of one. No bound exceeds that of a bin with a
    better score: it would be so by chance.
    """
    order = sorted(range(len(scores)), key=lambda place: scores[place])
    size = max(LEAST_IN_BIN, -(-len(order) // BINS))
    groups = [order[first : first + size] for first in range(0, len(order), size)]
    if len(groups) > 1 and len(groups[-1]) < LEAST_IN_BIN:
        groups[-2] += groups.pop()
    place = 1
    while place < len(groups):
        if _mean(groups[place], rights) < _mean(groups[place - 1], rights):
            groups[place - 1] += groups.pop(place)
            place = max(1, place - 1)
        else:
            place += 1
    bins: list[QualityBin] = []
    least = 1.0
    for held in reversed(groups):
        good = sum(rights[place] for place in held)
        mean, (low, _) = good / len(held), wilson(good, len(held))
        differ = ONE_SIDED * _between(held, rights, kinds) if kinds else 0.0
        least = min(least, max(mean - hypot(mean - low, differ), 0.0))
        bins.append(QualityBin(sum(scores[place] for place in held) / len(held), mean, least, len(held)))
    return tuple(reversed(bins))


def _between(places: Sequence[int], rights: Sequence[bool], kinds: Sequence[str]) -> float:
    """The standard deviation of the kinds' true shares of right answers, beyond what chance explains: the
    moment estimate of a one-way random-effects model (W. G. Cochran, 1954)."""
    held: dict[str, list[int]] = {}
    for place in places:
        held.setdefault(kinds[place], []).append(place)
    mean, count = _mean(places, rights), len(places)
    spread = sum(len(one) * (_mean(one, rights) - mean) ** 2 for one in held.values())
    weight = count - sum(len(one) ** 2 for one in held.values()) / count
    return (max(spread - (len(held) - 1) * mean * (1 - mean), 0.0) / weight) ** 0.5 if weight > 0 else 0.0


def _mean(places: Sequence[int], rights: Sequence[bool]) -> float:
    return sum(rights[place] for place in places) / len(places)
