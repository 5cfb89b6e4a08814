"""Fits the tokens of an answer by the prompt. `stretto.ladder.lengths` applies it, and corrects it by use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf, log

from stretto.ladder.estimate import FEATURES, NUMBERS, PromptFeatures, features
from stretto.ladder.lengths import LONG, LONGEST, LengthBin, LengthModel, slope_of
from stretto.optimise.data import DataSample
from stretto.optimise.estimates.regression import FeatureWeights, SparseRow, expectile, unseen
from stretto.statistics import quantile

RIDGE = 0.3
EXPECTILE = 0.95  # answers that are longer than expected count so much more than those that are shorter
BINS, LEAST_IN_BIN = 10, 30


def fitted_lengths(samples: Sequence[DataSample], tokens: Sequence[int]) -> LengthModel | None:
    """A model of the tokens of an answer by the prompt; None with too few prompts for two bins.

    Ridge regression of an expectile of their logarithm. The bins are made of predictions by models that have
    not seen the prompt (cross-validation), so their quantiles hold for new ones.
    """
    if len(samples) < 2 * LEAST_IN_BIN:
        return None
    rows = [_pairs(features(sample.question)) for sample in samples]
    targets = [log(max(count, 1)) for count in tokens]

    def fit(places: Sequence[int]) -> FeatureWeights:
        seen = [rows[place] for place in places]
        return expectile(seen, [targets[place] for place in places], EXPECTILE, RIDGE)

    scores = unseen(rows, fit, _score)
    order = sorted(range(len(rows)), key=scores.__getitem__)
    size = max(LEAST_IN_BIN, -(-len(order) // BINS))
    groups = [order[first : first + size] for first in range(0, len(order), size)]
    if len(groups) > 1 and len(groups[-1]) < LEAST_IN_BIN:
        groups[-2] += groups.pop()
    weights = fit(range(len(rows)))
    return LengthModel(weights[:FEATURES], weights[FEATURES:], tuple(_bins(groups, scores, tokens)))


def _pairs(found: PromptFeatures) -> SparseRow:
    """All features as (index, value), with the slopes after them."""
    slope = slope_of(found) * found.share
    return [*found.pairs(), *((FEATURES - NUMBERS + index, slope) for index in found.buckets)]


def _score(weights: FeatureWeights, row: SparseRow) -> float:
    return sum(weights[index] * value for index, value in row)


def _bins(
    groups: Sequence[Sequence[int]], scores: Sequence[float], tokens: Sequence[int]
) -> Iterator[LengthBin]:
    """The table of some groups of prompts that rise by their scores. What is expected rises too."""
    mean = long = longest = 0.0
    before = -inf
    for held in groups:
        score = sum(scores[place] for place in held) / len(held)
        answers = sorted(tokens[place] for place in held)
        mean = max(mean, sum(answers) / len(answers))
        long, longest = max(long, quantile(answers, LONG)), max(longest, quantile(answers, LONGEST))
        if score > before:
            yield LengthBin(score, mean, long, longest, len(held))
            before = score
