"""Learns from rewards how far each variant's quality is from its estimate, for one tenant and one ladder.

It corrects estimates, and draws among variants that are feasible already: objective and floor are constraints
that no reward can buy. What it knows is a function of its lessons alone. It knows no clock and no request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from stretto.ladder.estimate import NUMBERS, PromptFeatures, Quality

CONTEXT = 48  # numbers that describe a prompt here
FOLDED = CONTEXT - NUMBERS  # of them stand for words
# A lesson about some words says less about prompts that share only their length.
NUMBER_SCALE, BUCKET_SCALE = 0.3, 2.0
Vectors = NDArray[np.float64]


class BanditSettings(Struct, frozen=True, kw_only=True):
    """How it learns and how it explores.

    `noise`: the standard deviation of a reward about its mean; `prior`: that of a correction before any
    lesson. `keep`: the factor on the weight of all earlier lessons with each new one; `keep_own`: with each
    new one of the same user. `shrink`: the weight of a user's lessons at which half of the user's deviation
    counts; `users`: how many users are remembered.

    A correction counts as far as it exceeds `doubt` standard errors. The lower bound falls already with
    `caution` standard errors, and rises only by what exceeds `proof` of them.

    `spread`: the factor on the uncertainty with which qualities are drawn. `least`: the share of choices that
    are drawn evenly. `warm`: the weight of lessons below which nothing is explored.
    """

    noise: float = 0.4
    prior: float = 0.25
    keep: float = 0.995
    keep_own: float = 0.95
    shrink: float = 10.0
    users: int = 256
    doubt: float = 1.0
    caution: float = 0.5
    proof: float = 1.64
    spread: float = 0.05
    least: float = 0.01
    warm: float = 5.0
    draws: int = 32


SETTINGS = BanditSettings()


class Lesson(NamedTuple):
    """A reward for an answer. `surprise`: the reward minus the quality that the ladder had estimated."""

    context: Vectors
    variant: int
    surprise: float
    user: str = ""


class Corrections(NamedTuple):
    """For one prompt, by variant: what to add to the estimate and to its lower bound, and how uncertain the
    quality is (standard deviation)."""

    mean: list[float]
    low: list[float]
    deviation: list[float]


class ExploredChoice(NamedTuple):
    """The place of what was drawn among the feasible, and the probability that each of them had."""

    place: int
    propensities: tuple[float, ...]


def context(found: PromptFeatures) -> Vectors:
    """The features of a prompt in `CONTEXT` numbers. Buckets of words are folded (K. Weinberger et al.,
    "Feature hashing for large scale multitask learning", ICML 2009)."""
    row = [value * NUMBER_SCALE for value in found.numbers] + [0.0] * FOLDED
    value = found.share * BUCKET_SCALE
    for index in found.buckets:
        row[NUMBERS + index % FOLDED] += value
    return np.array(row)


class Bandit:
    """A linear contextual bandit over `variants` variants.

    The correction of a variant is linear in the context: ridge regression of the surprises, in which old ones
    count less (Y. Russac et al., "Weighted linear bandits for non-stationary environments", NeurIPS 2019).
    Without lessons it returns to none. A choice is drawn by Thompson sampling (S. Agrawal, N. Goyal,
    "Thompson sampling for contextual bandits with linear payoffs", ICML 2013).
    """

    def __init__(self, variants: int, rng: np.random.Generator, settings: BanditSettings = SETTINGS) -> None:
        self._settings, self._rng, self._variants = settings, rng, variants
        self._ridge = (settings.noise / settings.prior) ** 2
        self._users: OrderedDict[str, _UserSums] = OrderedDict()
        self._clear()
        self._solve()

    @property
    def explores(self) -> bool:
        """Whether it has learnt enough to try what is not the best."""
        return self._weight >= self._settings.warm

    @property
    def weight(self) -> float:
        """The weight that its lessons still have; each had 1 when it was new."""
        return self._weight

    def learn(self, lesson: Lesson) -> None:
        """Learn from the newest lesson."""
        keep, at = self._settings.keep, lesson.variant
        self._products *= keep
        self._sums *= keep
        self._products[at] += np.outer(lesson.context, lesson.context)
        self._sums[at] += lesson.surprise * lesson.context
        self._contexts = self._contexts * keep + lesson.context
        self._weight = self._weight * keep + 1.0
        self._learn_user(lesson)
        self._solve()

    def rebuild(self, lessons: Iterable[Lesson]) -> None:
        """Forget everything, then learn these, the oldest first: as `learn` of each does, at once."""
        rows = list(lessons)
        self._clear()
        if rows:
            contexts = np.stack([row.context for row in rows])
            surprises = np.array([row.surprise for row in rows])
            chosen = np.array([row.variant for row in rows])
            weights = self._settings.keep ** np.arange(len(rows) - 1, -1, -1, dtype=np.float64)
            for at in range(self._variants):
                held = chosen == at
                weighted = contexts[held] * weights[held, None]
                self._products[at] = contexts[held].T @ weighted
                self._sums[at] = surprises[held] @ weighted
            self._contexts = weights @ contexts
            self._weight = float(weights.sum())
        for row in rows:
            self._learn_user(row)
        self._solve()

    def corrections(self, found: Vectors, user: str = "") -> Corrections:
        """What the lessons say about a prompt with this context."""
        settings = self._settings
        shift: list[float] = (self._slopes @ found).tolist()
        reached: Vectors = self._inverses @ found
        doubts: list[float] = (reached @ found).tolist()  # times `noise` squared: the variance of the quality
        squares: list[float] = np.einsum("ki,ki->k", reached, reached).tolist()
        own = self._users.get(user)
        beyond = [0.0] * self._variants if own is None else own.intercepts(self._slopes, settings.shrink)
        mean: list[float] = []
        low: list[float] = []
        spread: list[float] = []
        for change, doubt, square, mine in zip(shift, doubts, squares, beyond, strict=True):
            spread.append(settings.noise * sqrt(doubt))
            # Without the prior's part, of the correction: x' P S P x = x' P x - ridge * |P x|^2.
            wide = settings.noise * sqrt(max(doubt - self._ridge * square, 0.0))
            sure = max(0.0, abs(change) - settings.doubt * wide)
            mean.append((sure if change > 0.0 else -sure) + mine)
            fall = min(0.0, change - settings.caution * wide) + min(0.0, mine)
            low.append(fall + max(0.0, change - settings.proof * wide))
        return Corrections(mean, low, spread)

    def usual(self) -> Corrections:
        """The corrections for the mean of its lessons' contexts. A correction is linear in the context, so
        that is the mean correction over the prompts of the lessons, but for the doubt about it."""
        return self.corrections(self._contexts / max(self._weight, 1.0))

    def draw(
        self, feasible: Sequence[int], means: Sequence[float], corrections: Corrections
    ) -> ExploredChoice:
        """Draw one of the variants in `feasible`, whose corrected qualities are `means` in the same order.

        The propensities are exact: a number of draws of all qualities says how often each variant wins, and
        the choice is one draw from these shares, mixed with even ones. Until there are lessons, the best mean
        is certain. Raises ValueError when nothing is feasible.
        """
        count, settings = len(feasible), self._settings
        if count == 0:
            raise ValueError("no variant is feasible: there is nothing to draw from")
        if count == 1:
            return ExploredChoice(0, (1.0,))
        if not self.explores:
            return certain(means)
        doubts = [corrections.deviation[at] * settings.spread for at in feasible]
        qualities = self._rng.standard_normal((settings.draws, count)) * doubts + means
        wins: list[int] = np.bincount(qualities.argmax(1), minlength=count).tolist()
        even, share = settings.least / count, (1.0 - settings.least) / settings.draws
        propensities = tuple([even + share * won for won in wins])
        return ExploredChoice(_place_of(self._rng.random(), propensities), propensities)

    def _clear(self) -> None:
        self._products = np.zeros((self._variants, CONTEXT, CONTEXT))
        self._sums = np.zeros((self._variants, CONTEXT))
        self._contexts: Vectors = np.zeros(CONTEXT)
        self._weight = 0.0
        self._users.clear()

    def _learn_user(self, lesson: Lesson) -> None:
        if not lesson.user:
            return
        own = self._users.pop(lesson.user, None) or _UserSums(self._variants)
        self._users[lesson.user] = own
        own.learn(lesson, self._settings.keep_own)
        if len(self._users) > self._settings.users:
            self._users.popitem(last=False)

    def _solve(self) -> None:
        inverses = np.linalg.inv(self._products + np.eye(CONTEXT) * self._ridge)
        self._inverses: Vectors = inverses.astype(np.float64, copy=False)
        self._slopes: Vectors = np.einsum("kij,kj->ki", inverses, self._sums)


class _UserSums:
    """One user's lessons by variant: their weights, surprises and contexts, added up."""

    __slots__ = ("_contexts", "_surprises", "_weights")

    def __init__(self, variants: int) -> None:
        self._weights = np.zeros(variants)
        self._surprises = np.zeros(variants)
        self._contexts = np.zeros((variants, CONTEXT))

    def learn(self, lesson: Lesson, keep: float) -> None:
        for sums in (self._weights, self._surprises, self._contexts):
            sums *= keep
        self._weights[lesson.variant] += 1.0
        self._surprises[lesson.variant] += lesson.surprise
        self._contexts[lesson.variant] += lesson.context

    def intercepts(self, slopes: Vectors, shrink: float) -> list[float]:
        """By variant: what the user's surprises have beyond the tenant's on average, shrunken to none as the
        prediction of a random intercept is (G. Robinson, "That BLUP is a good thing: the estimation of random
        effects", Statistical Science 6, 1991)."""
        beyond: Vectors = (self._surprises - (self._contexts * slopes).sum(1)) / (self._weights + shrink)
        return beyond.tolist()


def corrected(estimates: Sequence[Quality], corrections: Corrections) -> list[Quality]:
    """The estimates of all variants after correction."""
    return [corrected_at(place, old, corrections) for place, old in enumerate(estimates)]


def corrected_at(place: int, old: Quality, corrections: Corrections) -> Quality:
    """The estimate of one variant after correction."""
    mean, low = old.mean + corrections.mean[place], old.low + corrections.low[place]
    return Quality(min(max(mean, 0.0), 1.0), min(max(low, 0.0), 1.0))


def certain(means: Sequence[float]) -> ExploredChoice:
    """The best mean, the first of equals, with probability 1."""
    best = max(range(len(means)), key=means.__getitem__)
    return ExploredChoice(best, tuple([float(place == best) for place in range(len(means))]))


def _place_of(number: float, propensities: Sequence[float]) -> int:
    """The place on which a number from 0 to 1 falls."""
    for place, share in enumerate(propensities):
        number -= share
        if number < 0.0:
            return place
    return max(range(len(propensities)), key=propensities.__getitem__)
