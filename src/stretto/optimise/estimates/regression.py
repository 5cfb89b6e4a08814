"""Linear models over the features of prompts: how they are fitted, and what they predict of new prompts."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

import torch
from torch import Tensor

from stretto.ladder.estimate import BUCKETS, FEATURES

FOLDS = 5
CONSTANT_RIDGE = 1e-3
REWEIGHTED = 8  # times at most
FeatureWeights = tuple[float, ...]
SparseRow = list[tuple[int, float]]  # features as (index, value); the first one is constant
RowT = TypeVar("RowT")


def unseen(
    rows: Sequence[RowT],
    fit: Callable[[list[int]], FeatureWeights],
    apply: Callable[[FeatureWeights, RowT], float],
) -> list[float]:
    """What models that have not seen a row predict of it (cross-validation). `fit` gets places of rows."""
    order = list(range(len(rows)))
    Random(0).shuffle(order)
    found = [0.0] * len(rows)
    for fold in range(FOLDS):
        held = set(order[fold::FOLDS])
        weights = fit([place for place in order if place not in held])
        for place in held:
            found[place] = apply(weights, rows[place])
    return found


def logistic(
    rows: Sequence[SparseRow], rights: Sequence[float], penalty: float, width: int = FEATURES
) -> FeatureWeights:
    """The `width` weights of a ridge logistic regression, by Newton's method. `rights`: 1, 0, or a share."""
    x, penalties = _matrix(rows, width), _penalties(penalty, width)
    y = torch.tensor(rights, dtype=torch.float64)
    weights = torch.zeros(width, dtype=torch.float64)
    for _ in range(25):
        chances = (x @ weights).sigmoid()
        slope = x.T @ (chances - y) + penalties * weights
        curve = (x.T * (chances * (1 - chances))) @ x + torch.diag(penalties)
        move = torch.linalg.solve(curve, slope)
        weights -= move
        if float(move.abs().max()) < 1e-8:
            break
    return tuple(weights.tolist())


def expectile(
    rows: Sequence[SparseRow], targets: Sequence[float], share: float, penalty: float
) -> FeatureWeights:
    """The `FEATURES + BUCKETS` weights of a ridge regression in which the square of a target that is too high
    counts `share`, and that of one that is too low the rest (W. Newey, J. Powell, Econometrica 55, 1987)."""
    width = FEATURES + BUCKETS
    x, y = _matrix(rows, width), torch.tensor(targets, dtype=torch.float64)
    kernel = x / _penalties(penalty, width)  # there may be fewer rows than features
    gram = kernel @ x.T
    counted = torch.ones_like(y)
    weights = torch.zeros(width, dtype=torch.float64)
    for _ in range(REWEIGHTED):
        weights = kernel.T @ torch.linalg.solve(gram + torch.diag(1 / counted), y)
        new = torch.where(y > x @ weights, share, 1 - share).to(torch.float64)
        if bool((new == counted).all()):
            break
        counted = new
    return tuple(weights.tolist())


def _matrix(rows: Sequence[SparseRow], width: int) -> Tensor:
    """Float64 [len(rows), width]."""
    x = torch.zeros(len(rows), width, dtype=torch.float64)
    for number, row in enumerate(rows):
        for index, value in row:
            x[number, index] = value
    return x


def _penalties(penalty: float, width: int) -> Tensor:
    penalties = torch.full((width,), penalty, dtype=torch.float64)
    penalties[0] = CONSTANT_RIDGE
    return penalties
