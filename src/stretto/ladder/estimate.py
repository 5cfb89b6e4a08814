"""The chance that a variant answers a given prompt right, from features that cost microseconds.

Reading and applying a fitted model: plain Python. `stretto.optimise.evaluate` fits and calibrates it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise
from math import exp, log
from operator import itemgetter
from typing import Annotated, NamedTuple
from zlib import crc32

from msgspec import Meta, Struct

BUCKETS = 512
NUMBERS = 4  # features that are numbers, before the buckets
MAX_WORDS = 96
MAX_CHARS = 4096
KEPT_WORDS = 8192  # of which the buckets are remembered
WORD = re.compile(r"[^\W\d_]+|\d")
PLAIN_WORD = re.compile(r"[A-Za-z]+|[0-9]")  # the same in ASCII, in half the time
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


class PromptFeatures(NamedTuple):
    """The features of a prompt, of which `prompt_text` is the text.

    `numbers`: a constant, its length, digits and questions. `buckets`: the indices of its different words
    among all features, rising. `share`: the value of each bucket.
    """

    numbers: tuple[float, float, float, float]
    buckets: tuple[int, ...]
    share: float

    def pairs(self) -> list[tuple[int, float]]:
        """All features as (index, value)."""
        return [*enumerate(self.numbers), *((index, self.share) for index in self.buckets)]


def prompt_text(last: str, others: Iterable[str]) -> str:
    """What the quality of an answer is estimated from: the last message, then the others from the first, in
    all at most `MAX_CHARS` characters. How hard a question is may be told by the records that came before."""
    parts, left = [last[:MAX_CHARS]], MAX_CHARS - len(last)
    for other in others:
        if left <= 0:
            break
        parts.append(other[:left])
        left -= len(other)
    return "\n".join(parts)


def features(text: str) -> PromptFeatures:
    """The features of a prompt's text. Its first `MAX_WORDS` words fall into buckets."""
    words = (PLAIN_WORD if text.isascii() else WORD).findall(text)
    digits = sum(map(str.isdigit, words))
    numbers = 1.0, log(1 + len(text)) / 8, log(1 + digits) / 4, float("?" in text)
    buckets = tuple(sorted({*map(_INDICES.__getitem__, words[:MAX_WORDS])}))
    return PromptFeatures(numbers, buckets, 1.0 / max(1.0, len(buckets)) ** 0.5)


class _Indices(dict[str, int]):
    """The feature of a word's bucket, by the word. All digits share one. Forgets all words when there are too
    many: a hit takes half of what `lru_cache` does."""

    def __missing__(self, word: str) -> int:
        if len(self) >= KEPT_WORDS:
            self.clear()
        index = NUMBERS + crc32(b"0" if word.isdigit() else word.lower().encode()) % BUCKETS
        self[word] = index
        return index


_INDICES = _Indices()


def linear(weights: tuple[float, ...], found: PromptFeatures) -> float:
    """The sum of the features, each times its weight."""
    one, length, digits, question = found.numbers
    score = weights[0] * one + weights[1] * length + weights[2] * digits + weights[3] * question
    return score + found.share * sum(map(weights.__getitem__, found.buckets))


def raw(weights: tuple[float, ...], found: PromptFeatures) -> float:
    """The logistic regression's estimate before calibration."""
    score = linear(weights, found)
    return 1.0 / (1.0 + exp(-max(min(score, 30.0), -30.0)))


class Calibration:
    """A fitted model, ready for quick questions: `raw`, then the line between two bins."""

    __slots__ = ("_bins", "_numbers", "_scores", "_weights")

    def __init__(self, model: QualityModel) -> None:
        self._numbers, self._weights = model.weights[:NUMBERS], model.weights
        self._bins = [(each.score, each.mean, each.low) for each in model.bins]
        self._scores = [each.score for each in model.bins]

    def quality(self, found: PromptFeatures) -> Quality:
        """The calibrated chance of a right answer for these features, linear between two bins."""
        (one, length, digits, question), buckets, share = found
        first, second, third, fourth = self._numbers
        score = first * one + second * length + third * digits + fourth * question
        if len(buckets) > 1:
            score += share * sum(itemgetter(*buckets)(self._weights))
        elif buckets:
            score += share * self._weights[buckets[0]]
        score = 1.0 / (1.0 + exp(-score if -30.0 < score < 30.0 else -30.0 if score > 0.0 else 30.0))
        place, bins = bisect_left(self._scores, score), self._bins
        if place == 0 or place == len(bins):
            _, mean, low = bins[place and place - 1]
            return Quality(mean, low)
        (left, mean, low), (right, next_mean, next_low) = bins[place - 1], bins[place]
        share = (score - left) / (right - left)
        return Quality(mean + share * (next_mean - mean), low + share * (next_low - low))


def estimate(model: QualityModel, found: PromptFeatures) -> Quality:
    """The calibrated chance of a right answer for a prompt with these features."""
    return Calibration(model).quality(found)
