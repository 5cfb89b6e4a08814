"""The quality that was measured of a variant, for a request. `learning` corrects it with feedback."""

from __future__ import annotations

from stretto.ladder.estimate import Calibration, PromptFeatures, Quality
from stretto.ladder.registry import Variant


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
