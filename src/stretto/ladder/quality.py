"""The quality that was measured of a variant, for a request. `learning` corrects it with feedback."""

from __future__ import annotations

from collections.abc import Sequence

from stretto.ladder.estimate import Calibration, PromptFeatures, Quality
from stretto.ladder.registry import Variant

ALIKE = 0.01  # of the prompts may have an answer that only one of two like variants has right
SIGNIFICANT = 1.96  # standard deviations


class MeasuredQuality:
    """The chance of a right answer and the lower end of its interval, as measured when the ladder was made:
    by the prompt where that was fitted, else the same for all prompts."""

    __slots__ = ("_fitted", "_usual")

    def __init__(self, variant: Variant) -> None:
        self._usual = Quality(variant.quality.mean, variant.quality.low)
        self._fitted = None if variant.estimate is None else Calibration(variant.estimate)

    def of(self, found: PromptFeatures) -> Quality:
        """For a prompt with these features."""
        return self._usual if self._fitted is None else self._fitted.quality(found)


def measured_qualities(variants: Sequence[Variant], top: str) -> dict[str, MeasuredQuality]:
    """What was measured of each of these variants, by name.

    Variants that answer as the top does have one estimate with it: that of the smallest of them. Otherwise
    chance would say which is better, and differently with each fit. Of equals the choice takes the cheapest.
    """
    known = {variant.name: variant for variant in variants}
    best = known.get(top)
    like = [each for each in variants if best is not None and (each is best or _answers_alike(each, best))]
    smallest = min(like, key=lambda each: each.bytes, default=None)
    found = {variant.name: MeasuredQuality(variant) for variant in variants if variant not in like}
    shared = None if smallest is None else MeasuredQuality(smallest)
    return found | {each.name: shared for each in like if shared is not None}


def _answers_alike(variant: Variant, top: Variant) -> bool:
    """Whether hardly any answer is right of one alone, and not significantly more of the top (Q. McNemar,
    Psychometrika 12, 1947). Flips that were not measured do not explain the difference of the means."""
    worse, better = variant.flips.worse, variant.flips.better
    lost, count = worse - better, variant.quality.count
    explained = abs(top.quality.mean - variant.quality.mean - lost) * count < 0.5
    chance = SIGNIFICANT * ((worse + better) / max(count, 1)) ** 0.5
    return explained and worse + better <= ALIKE and lost <= chance
