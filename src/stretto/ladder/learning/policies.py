"""What other ways to choose would have been worth, from the rewards that one tenant gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from stretto.ladder.learning.feedback import KeptChoice
from stretto.ladder.learning.off_policy import LoggedChoice, MissingOverlap, OffPolicyReport, evaluate

BEST = "best estimate"
FEWEST = 2  # rewards; an interval needs two at least


class EvaluatedPolicy(NamedTuple):
    """A policy, and its value; or why the rewards say nothing about it."""

    name: str
    report: OffPolicyReport | None
    refused: str = ""


def policies(rewarded: Iterable[KeptChoice]) -> dict[str, list[EvaluatedPolicy]]:
    """By model: taking each variant always, and the one with the best measured estimate.

    Only choices count whose probabilities are known, among the variants that are compared most often.
    """
    by_model: dict[str, list[KeptChoice]] = {}
    for kept in rewarded:
        choice = kept.choice
        if kept.reward is not None and choice.propensities and choice.variant in choice.variants:
            by_model.setdefault(choice.model, []).append(kept)
    found: dict[str, list[EvaluatedPolicy]] = {}
    for model, choices in by_model.items():
        ((names, _),) = Counter(kept.choice.variants for kept in choices).most_common(1)
        log = [_logged(kept) for kept in choices if kept.choice.variants == names]
        found[model] = [_evaluated(f"always {name}", log, [at] * len(log)) for at, name in enumerate(names)]
        best = [max(range(len(names)), key=row.expected.__getitem__) for row in log]
        found[model].append(_evaluated(BEST, log, best))
    return found


def _logged(kept: KeptChoice) -> LoggedChoice:
    choice, reward = kept.choice, kept.reward
    assert reward is not None
    place = choice.variants.index(choice.variant)
    return LoggedChoice(place, reward.value, choice.propensities, choice.expected)


def _evaluated(name: str, log: Sequence[LoggedChoice], chosen: Sequence[int]) -> EvaluatedPolicy:
    """The value of the policy that would have chosen these places."""
    if len(log) < FEWEST:
        return EvaluatedPolicy(name, None, f"{len(log)} rewards: an interval needs more")
    target = [[float(place == at) for place in range(len(log[0].propensities))] for at in chosen]
    try:
        return EvaluatedPolicy(name, evaluate(log, target))
    except MissingOverlap as error:
        return EvaluatedPolicy(name, None, str(error))
