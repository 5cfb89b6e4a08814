"""The quality that was measured of a variant, for a request. `learning` corrects it with feedback."""

from __future__ import annotations

from stretto.ladder.estimate import Quality, estimate
from stretto.ladder.registry import Variant

PromptFeatures = list[tuple[int, float]]


def measured(features: PromptFeatures, variant: Variant) -> Quality:
    """The chance of a right answer and the lower end of its interval, as measured when the ladder was made:
    by the prompt where that was fitted, else the same for all prompts."""
    if variant.estimate is not None:
        return estimate(variant.estimate, features)
    return Quality(variant.quality.mean, variant.quality.low)
