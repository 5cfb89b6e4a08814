"""The quality that a variant is expected to have for a request, and what is recorded of a choice.

`QualityEstimate` and `VariantDraw` are where learning from use takes part: the first corrects what was
measured, the second may explore. Both see variants that keep time and floor, or decide nothing about those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from stretto.ladder.choose import Prediction
from stretto.ladder.estimate import Quality, estimate
from stretto.ladder.registry import Variant

PromptFeatures = list[tuple[int, float]]


class QualityEstimate(Protocol):
    """The chance that a variant answers a prompt right, and the lower end of its 95 % interval."""

    def __call__(self, features: PromptFeatures, variant: Variant, tenant: str) -> Quality: ...


class DrawnVariant(NamedTuple):
    """The place of a variant among those that were feasible, and the probability that it had."""

    place: int
    propensity: float


class VariantDraw(Protocol):
    """Draws among feasible variants. `best`: the place of the one that the estimates favour."""

    def __call__(
        self, features: PromptFeatures, tenant: str, feasible: Sequence[Prediction], best: int
    ) -> DrawnVariant: ...


class ChoiceRecord(NamedTuple):
    """A choice as it was made: what a correction can be learnt from when a reward comes.

    `feasible`: the names of the variants that could be chosen; `propensity`: the probability with which this
    one was, 1 when nothing was drawn.
    """

    request_id: str
    ladder: str
    tenant: str
    features: PromptFeatures
    feasible: tuple[str, ...]
    variant: str
    propensity: float


def measured(features: PromptFeatures, variant: Variant, tenant: str) -> Quality:
    """As measured when the ladder was made, the same for all tenants: by the prompt where that was fitted,
    else the same for all prompts."""
    if variant.estimate is not None:
        return estimate(variant.estimate, features)
    return Quality(variant.quality.mean, variant.quality.low)
