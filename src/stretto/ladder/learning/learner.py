"""What the rewards of each tenant have taught about the variants of each ladder.

It joins the store of choices and the bandits, so that what a tenant votes and what it erases reaches its own
bandits at once, and nobody else's. It knows no HTTP, no clock and no engine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from typing import NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from stretto.ladder.estimate import Quality
from stretto.ladder.learning.bandit import Bandit, Corrections, ExploredChoice, Lesson, corrected_at
from stretto.ladder.learning.feedback import FeedbackStore, KeptChoice, MadeChoice, Reward

BANDITS = 128  # of tenants and ladders that voted last; each takes up to 1 MB
REBUILD_S = 1.0  # between two of one bandit, each of which takes up to 7 ms


class VariantRewards(Struct, frozen=True):
    """The rewards of one variant: how many, their mean, and the mean of what was expected; None: unknown."""

    count: int
    mean: float
    expected: float | None = None


class LearntCorrection(NamedTuple):
    """What rewards add to the estimated quality of a variant and to its lower bound, for the mean of the
    prompts that have rewards. Both are shares from -1 to 1."""

    mean: float
    low: float


class Guidance(NamedTuple):
    """What one tenant has taught about a ladder, for one prompt. `places`: of the variants in the bandit."""

    bandit: Bandit
    changes: Corrections
    places: Mapping[str, int]

    def corrected(self, variant: str, measured: Quality) -> Quality:
        """The quality of a variant after correction."""
        return corrected_at(self.places[variant], measured, self.changes)

    def draw(self, feasible: Sequence[str], means: Sequence[float]) -> ExploredChoice:
        """Draw one of the feasible variants, whose corrected qualities are `means`."""
        return self.bandit.draw([self.places[name] for name in feasible], means, self.changes)


class Learner:
    """Choices, rewards, and the bandits of all tenants. `ladders`: the variants of each, by its name; a model
    that is none has nothing to choose, and its rewards are only kept."""

    def __init__(
        self, store: FeedbackStore, ladders: Mapping[str, Sequence[str]], rng: np.random.Generator
    ) -> None:
        self._store, self._rng = store, rng
        self._variants = {
            model: {name: place for place, name in enumerate(names)}
            for model, names in ladders.items()
            if len(names) > 1
        }
        self._bandits: OrderedDict[tuple[str, str], Bandit] = OrderedDict()
        self._stale: dict[tuple[str, str], float] = {}  # bandits to rebuild, and when

    def bandit(self, tenant: str, model: str, now: float) -> Bandit | None:
        """What the tenant has taught about a ladder; None: nothing yet."""
        if now >= self._stale.get((tenant, model), inf):
            self._rebuild(tenant, model)
        return self._bandits.get((tenant, model))

    def guidance(
        self, tenant: str, model: str, context: NDArray[np.float64], user: str, now: float
    ) -> Guidance | None:
        """What the tenant has taught, for a prompt with this context; None: nothing yet."""
        bandit = self.bandit(tenant, model, now)
        if bandit is None:
            return None
        return Guidance(bandit, bandit.corrections(context, user), self._variants[model])

    def taught(self, tenant: str, model: str, now: float) -> dict[str, LearntCorrection]:
        """The corrections of a ladder's variants that the tenant has taught; empty: nothing yet."""
        bandit = self.bandit(tenant, model, now)
        if bandit is None:
            return {}
        usual = bandit.usual()
        return {
            name: LearntCorrection(usual.mean[place], usual.low[place])
            for name, place in self._variants[model].items()
        }

    def corrections(self) -> dict[str, dict[str, float]]:
        """By ladder and variant: the mean of what the tenants in memory have taught, by the weight of
        their lessons; 0 without any. It names no tenant."""
        found = {model: dict.fromkeys(places, 0.0) for model, places in self._variants.items()}
        weights = dict.fromkeys(found, 0.0)
        for (_, model), bandit in self._bandits.items():
            weights[model] += bandit.weight
        for (_, model), bandit in self._bandits.items():
            means, share = bandit.usual().mean, bandit.weight / weights[model]
            for name, place in self._variants[model].items():
                found[model][name] += share * means[place]
        return found

    def remember(
        self, tenant: str, request_id: str, choice: MadeChoice, now: float, names: tuple[str, ...] = ()
    ) -> None:
        """Keep a choice until its reward comes. `names`: other ids of its answer."""
        self._store.remember(tenant, request_id, choice, now, names)

    def reward(self, tenant: str, request_id: str, reward: Reward, now: float) -> KeptChoice:
        """Keep a reward and learn from it. A second one for the same choice takes the place of the first,
        within a second. Raises NoSuchChoice and NoPromptKept."""
        kept, replaced = self._store.reward(tenant, request_id, reward, now)
        key = tenant, kept.choice.model
        lesson = self._lesson(kept)
        if lesson is None:
            return kept
        if replaced:
            self._stale.setdefault(key, now + REBUILD_S)
        elif key in self._bandits:
            self._bandits.move_to_end(key)
            self._bandits[key].learn(lesson)
        elif key not in self._stale:
            self._rebuild(*key)
        return kept

    def teaches(self, kept: KeptChoice) -> bool:
        """Whether later choices depend on a reward."""
        return self._lesson(kept) is not None

    def erase(self, tenant: str, wanted: Callable[[KeptChoice], bool], now: float) -> int:
        """Drop a tenant's choices that are wanted, with their rewards. All that the tenant has taught is
        forgotten, and learnt again from the rest within a second. Returns how many choices there were."""
        gone = self._store.erase(tenant, wanted)
        for model in self._variants:
            if self._bandits.pop((tenant, model), None) is not None:
                self._stale.setdefault((tenant, model), now + REBUILD_S)
        return len(gone)

    def rewarded(self, tenant: str) -> list[KeptChoice]:
        """A tenant's choices that have a reward, in the order in which the rewards came."""
        return self._store.rewarded(tenant)

    def waiting(self, tenant: str) -> int:
        """How many of a tenant's choices have no reward yet."""
        return self._store.waiting(tenant)

    def _rebuild(self, tenant: str, model: str) -> None:
        """Learn again from the rewards that the store has."""
        self._bandits.pop((tenant, model), None)
        self._stale.pop((tenant, model), None)
        found = [self._lesson(kept) for kept in self._store.rewarded(tenant) if kept.choice.model == model]
        lessons = [lesson for lesson in found if lesson is not None]
        if not lessons:
            return
        bandit = Bandit(len(self._variants[model]), self._rng)
        bandit.rebuild(lessons)
        self._bandits[tenant, model] = bandit
        if len(self._bandits) > BANDITS:
            self._bandits.popitem(last=False)

    def _lesson(self, kept: KeptChoice) -> Lesson | None:
        """What a reward teaches; None where nothing could be chosen, or of a variant that is not served."""
        choice = kept.choice
        place = self._variants.get(choice.model, {}).get(choice.variant)
        expected = _expected(choice)
        if kept.reward is None or place is None or expected is None or choice.context is None:
            return None
        return Lesson(choice.context, place, kept.reward.value - expected, choice.user)


def summary(rewarded: Iterable[KeptChoice]) -> dict[str, dict[str, VariantRewards]]:
    """The rewards by model, then by variant."""
    found: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for kept in rewarded:
        choice = kept.choice
        if kept.reward is not None:
            rows = found.setdefault(choice.model, {}).setdefault(choice.variant, [])
            rows.append((kept.reward.value, _expected(choice)))
    return {
        model: {variant: _rewards(rows) for variant, rows in variants.items()}
        for model, variants in found.items()
    }


def _expected(choice: MadeChoice) -> float | None:
    """The quality that was measured of the variant that answered."""
    places = {name: place for place, name in enumerate(choice.variants)}
    place = places.get(choice.variant)
    return None if place is None else choice.expected[place]


def _rewards(rows: Sequence[tuple[float, float | None]]) -> VariantRewards:
    expected = [each for _, each in rows if each is not None]
    return VariantRewards(
        count=len(rows),
        mean=sum(reward for reward, _ in rows) / len(rows),
        expected=sum(expected) / len(expected) if expected else None,
    )
