"""How many tokens an answer has: by the prompt, as `stretto.optimise.estimates` fitted it, and by what has
ended lately, for each ladder and tenant.

Bounded: the tenants that asked last are remembered. It knows no clock and no request.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from itertools import pairwise
from typing import Annotated, NamedTuple

from msgspec import Meta, Struct

from stretto.engine.step_time import Window
from stretto.ladder.estimate import BUCKETS, FEATURES, NUMBERS, PromptFeatures

LONG = 0.9  # the quantile that stands for a long answer
LONGEST = 0.98  # that for one of the longest
KEPT = 256  # answers of a tenant
ENOUGH = 8  # answers of a tenant before its own quantile counts
MOST_TENANTS = 512
UNKNOWN = 256  # tokens, before anything is known
FADING = 0.98  # of what is known of how well the model predicts, with each answer
USUAL_LENGTH = 0.75  # of a prompt, as `PromptFeatures` has it: 400 characters
LengthAmount = Annotated[float, Meta(ge=0)]


class LengthBin(Struct, frozen=True, forbid_unknown_fields=True):
    """Prompts with a raw estimate near `score`, their mean: the mean tokens of their answers, those of a long
    one (90 %) and of one of the longest (98 %), and how many prompts there were."""

    score: float
    mean: LengthAmount
    long: LengthAmount
    longest: LengthAmount
    count: Annotated[int, Meta(ge=0)]


class LengthModel(Struct, frozen=True, forbid_unknown_fields=True):
    """A linear regression of the logarithm of the tokens, then a table whose bins rise by `score`.

    `weights`: of the features. `slopes`: what is added to the weight of each bucket of words for each unit of
    `slope_of`, because a longer prompt has a longer answer with some tasks and not with others.
    """

    weights: Annotated[tuple[float, ...], Meta(min_length=FEATURES, max_length=FEATURES)]
    slopes: Annotated[tuple[float, ...], Meta(min_length=BUCKETS, max_length=BUCKETS)]
    bins: Annotated[tuple[LengthBin, ...], Meta(min_length=1)]

    def __post_init__(self) -> None:
        if any(first.score >= second.score for first, second in pairwise(self.bins)):
            raise ValueError("the bins must rise by `score`")


class AnswerTokens(NamedTuple):
    """The tokens of an answer: the mean, those of a long one, and of one of the longest."""

    mean: float
    long: float
    longest: float

    def within(self, most: int | None) -> AnswerTokens:
        """Whole tokens, at least one and at most `most`."""
        mean, long, longest = round(self.mean) or 1, round(self.long) or 1, round(self.longest) or 1
        if most is None:
            return AnswerTokens(mean, long, longest)
        most = most or 1
        return AnswerTokens(min(mean, most), min(long, most), min(longest, most))


def slope_of(found: PromptFeatures) -> float:
    """How far a prompt's length is from a usual one, by its logarithm."""
    return 4.0 * (found.numbers[1] - USUAL_LENGTH)


class FittedLengths:
    """A fitted model, ready for quick questions: the score, then the line between two bins."""

    __slots__ = ("_bins", "_numbers", "_scores", "_words")

    def __init__(self, model: LengthModel) -> None:
        self._numbers = model.weights[:NUMBERS]
        # Weight and slope of a bucket as one complex number, so that one sum adds up both.
        pairs = zip(model.weights[NUMBERS:], model.slopes, strict=True)
        self._words = [0j] * NUMBERS + [complex(weight, slope) for weight, slope in pairs]
        self._bins = [AnswerTokens(each.mean, each.long, each.longest) for each in model.bins]
        self._scores = [each.score for each in model.bins]

    def of(self, found: PromptFeatures) -> AnswerTokens:
        """For a prompt with these features."""
        (one, length, digits, question), buckets, share = found
        first, second, third, fourth = self._numbers
        words = sum(map(self._words.__getitem__, buckets))
        score = first * one + second * length + third * digits + fourth * question
        score += share * (words.real + slope_of(found) * words.imag)
        scores, bins = self._scores, self._bins
        place = bisect_left(scores, score)
        if place == 0 or place == len(bins):
            return bins[place and place - 1]
        (mean, long, longest), (next_mean, next_long, next_longest) = bins[place - 1], bins[place]
        part = (score - scores[place - 1]) / (scores[place] - scores[place - 1])
        return AnswerTokens(
            mean + part * (next_mean - mean),
            long + part * (next_long - long),
            longest + part * (next_longest - longest),
        )


class OutputLengths:
    """The lengths of recent answers of one ladder. `prior`: of a long answer before any has ended. `model`:
    what was fitted when the ladder was made.

    What has ended scales what the model expects: so much longer were a tenant's answers. For a tenant with
    whom the model is worse than none, only the lengths count.
    """

    def __init__(self, prior: int = 0, model: LengthModel | None = None) -> None:
        self._prior = AnswerTokens(*[prior or UNKNOWN] * 3)
        self._model = None if model is None else FittedLengths(model)
        self._all = _RecentLengths()
        self._tenants: OrderedDict[str, _RecentLengths] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tenants)

    def fitted(self, found: PromptFeatures) -> AnswerTokens | None:
        """What the model expects for a prompt with these features; None without a model."""
        return None if self._model is None else self._model.of(found)

    def expect(
        self, tenant: str, fitted: AnswerTokens | None = None, max_tokens: int | None = None
    ) -> AnswerTokens:
        """The tokens of an answer to this tenant, at most `max_tokens`. `fitted`: what the model expects."""
        own = self._tenants.get(tenant, self._all)
        known = own if len(own) >= ENOUGH else self._all
        found = known.expect(fitted) if len(known) >= ENOUGH else fitted or self._prior
        return found.within(max_tokens)

    def observe(
        self, tenant: str, tokens: int, fitted: AnswerTokens | None = None, *, cut: bool = False
    ) -> None:
        """Record an answer. `fitted`: what the model expected. `cut`: it reached its limit of tokens, so it
        says only that answers may be as long; one that is shorter than a long answer says nothing."""
        if cut and tokens < self.expect(tenant, fitted).long:
            return
        self._all.add(tokens, fitted)
        own = self._tenants.get(tenant)
        if own is None:
            own = self._tenants[tenant] = _RecentLengths()
            if len(self._tenants) > MOST_TENANTS:
                self._tenants.popitem(last=False)
        self._tenants.move_to_end(tenant)
        own.add(tokens, fitted)


class _RecentLengths:
    """The last answers of one tenant, or of all. `_gain`: how much less the model was wrong lately, in tokens
    of the pinball loss, than the quantile of the lengths alone."""

    __slots__ = ("_gain", "_ratios", "_tokens", "_usual")

    def __init__(self) -> None:
        self._tokens, self._ratios = Window(KEPT), Window(KEPT)
        self._gain = 0.0
        self._usual: AnswerTokens | None = None

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, tokens: int, fitted: AnswerTokens | None) -> None:
        if fitted is not None:
            if len(self._ratios) >= ENOUGH:
                plain, scaled = self._tokens.quantile(LONG, 0.0), fitted.long * self._scale()
                self._gain = FADING * self._gain + _loss(tokens, plain) - _loss(tokens, scaled)
            self._ratios.add(tokens / max(fitted.long, 1.0))
        self._tokens.add(tokens)
        self._usual = None

    def expect(self, fitted: AnswerTokens | None) -> AnswerTokens:
        if fitted is not None and self._gain >= 0.0:
            scale = self._scale()
            return AnswerTokens(fitted.mean * scale, fitted.long * scale, fitted.longest * scale)
        if self._usual is None:
            tokens = self._tokens
            mean = sum(tokens) / len(tokens)
            self._usual = AnswerTokens(mean, tokens.quantile(LONG, mean), tokens.quantile(LONGEST, mean))
        return self._usual

    def _scale(self) -> float:
        """How much longer long answers are than the model expects."""
        return self._ratios.quantile(LONG, 1.0) if len(self._ratios) >= ENOUGH else 1.0


def _loss(tokens: float, long: float) -> float:
    """The pinball loss of the quantile `LONG`."""
    return (tokens - long) * (LONG if tokens > long else LONG - 1.0)
