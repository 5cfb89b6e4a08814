"""The chance that a variant answers a given prompt right, from features that cost microseconds.

Reading and applying a fitted model: plain Python. `stretto.optimise.evaluate` fits and calibrates it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from functools import lru_cache
from itertools import pairwise
from math import exp, log
from operator import attrgetter
from typing import Annotated, NamedTuple
from zlib import crc32

from msgspec import Meta, Struct

BUCKETS = 128
NUMBERS = 4  # features that are numbers, before the buckets
MAX_WORDS = 96
WORD = re.compile(r"[^\W\d_]+|\d")
FEATURES = NUMBERS + BUCKETS
Chance = Annotated[float, Meta(ge=0, le=1)]


class QualityBin(Struct, frozen=True, forbid_unknown_fields=True):
    """Prompts with a raw estimate near `score`, their mean: the measured share of right answers, its lower
    confidence bound, and how many prompts there were."""

    score: float
    mean: Chance
    low: Chance
    count: Annotated[int, Meta(ge=0)]


class QualityModel(Struct, frozen=True, forbid_unknown_fields=True):
    """Logistic regression over `features`, then a calibration table whose bins rise by `score`."""

    weights: Annotated[tuple[float, ...], Meta(min_length=FEATURES, max_length=FEATURES)]
    bins: Annotated[tuple[QualityBin, ...], Meta(min_length=1)]

    def __post_init__(self) -> None:
        if any(first.score > second.score for first, second in pairwise(self.bins)):
            raise ValueError("the bins must rise by `score`")


class Quality(NamedTuple):
    """An estimate and its lower confidence bound."""

    mean: float
    low: float


def features(text: str) -> list[tuple[int, float]]:
    """The features of a prompt's last message, as (index, value): a constant, its length, digits and
    questions, then one bucket for each of its first `MAX_WORDS` different words."""
    words = WORD.findall(text)
    digits = sum(word.isdigit() for word in words)
    found = [(0, 1.0), (1, log(1 + len(text)) / 8), (2, log(1 + digits) / 4), (3, float("?" in text))]
    buckets = {bucket(word) for word in words[:MAX_WORDS]}
    scale = 1.0 / max(1.0, len(buckets)) ** 0.5
    found += [(NUMBERS + index, scale) for index in sorted(buckets)]
    return found


@lru_cache(maxsize=8192)
def bucket(word: str) -> int:
    """The bucket of a word. All digits share one."""
    return crc32(b"0" if word.isdigit() else word.lower().encode()) % BUCKETS


def raw(weights: tuple[float, ...], found: list[tuple[int, float]]) -> float:
    """The logistic regression's estimate before calibration."""
    score = sum(weights[index] * value for index, value in found)
    return 1.0 / (1.0 + exp(-max(min(score, 30.0), -30.0)))


def estimate(model: QualityModel, found: list[tuple[int, float]]) -> Quality:
    """The calibrated chance of a right answer for a prompt with these features, linear between two bins."""
    score, bins = raw(model.weights, found), model.bins
    place = bisect_left(bins, score, key=_score)
    if place in (0, len(bins)):
        end = bins[min(place, len(bins) - 1)]
        return Quality(end.mean, end.low)
    left, right = bins[place - 1], bins[place]
    share = (score - left.score) / (right.score - left.score)
    return Quality(left.mean + share * (right.mean - left.mean), left.low + share * (right.low - left.low))


_score = attrgetter("score")
