"""Chooses the variant of a ladder that answers a request, from what was measured and what the engine reports.

The choice itself is `ladder.choose`; this collects what it needs. It knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from stretto.config import Tier
from stretto.engine.scheduler.admission import Outlook
from stretto.ladder.choose import (
    LadderCandidate,
    Need,
    Prediction,
    Takeover,
    VariantChoice,
    cascade,
    choose,
)
from stretto.ladder.estimate import Quality, features
from stretto.ladder.learning.bandit import context
from stretto.ladder.learning.feedback import MadeChoice
from stretto.ladder.learning.learner import Guidance, Learner
from stretto.ladder.lengths import AnswerTokens, OutputLengths
from stretto.ladder.price import TimePrice, WorkOption
from stretto.ladder.quality import measured_qualities
from stretto.ladder.registry import Variant
from stretto.ladder.serving import ServedLadder
from stretto.server.variants.prospects import Prospects
from stretto.types import Cascade, ModelInfo, Objective, Preference, VariantReason

SOONEST_S = 0.05  # the shortest time after which a client is told to try again


class LadderRequest(Struct, frozen=True, kw_only=True):
    """A request for a ladder. `question`: its text, as `estimate.prompt_text`. `only`: the variant it names.

    `prompt_tokens`: of all its prompts together; `longest_prompt`: of the longest. `user`: whom it is for.
    `cascade`: whether a small variant may begin the answer.
    `cached`: by variant, in the engine's names, the tokens of the prompt that were computed ahead.
    """

    question: str
    prompt_tokens: int
    longest_prompt: int
    arrival: float
    max_tokens: int | None = None
    objective: Objective = Objective()
    tier: str = "default"
    tenant: str = "local"
    prefer: Preference = "quality"
    user: str = ""
    only: str | None = None
    cascade: bool = False
    cached: Mapping[str, int] = {}


class VariantPlacement(NamedTuple):
    """Where a request goes: the engine's model, why, and the models that it may move to while it waits.

    `reason` is None when nothing was chosen. `model` is None when the request is refused; `best_quality` is
    then the lower bound of the best variant, `late` says whether one would have been good enough, and
    `retry_after` after how many seconds it might be on time. `made`: the choice, for those who give feedback.
    `cascade`: who goes on when the model is not sure. `expected_tokens`: of the answer, 0 if nothing was
    predicted; `fitted`: what the ladder's own model expects of its length.
    """

    model: str | None
    reason: VariantReason | None = None
    lighter: tuple[str, ...] = ()
    best_quality: float = 1.0
    late: bool = False
    retry_after: float | None = None
    made: MadeChoice | None = None
    cascade: Cascade | None = None
    expected_tokens: int = 0
    fitted: AnswerTokens | None = None


class Expectation(NamedTuple):
    """What is expected of the variants, by the engine's names, for a prompt with this context.

    `measured`: when the ladder was made. `corrected`: by what `guidance`, the tenant's feedback, has taught.
    `fitted`: the tokens of its answer, as measured then; `tokens`: as they are with this tenant.
    """

    context: NDArray[np.float64]
    measured: dict[str, Quality]
    corrected: dict[str, Quality]
    guidance: Guidance | None
    fitted: AnswerTokens | None
    tokens: AnswerTokens


class VariantRouter:
    """The choice among one ladder's variants. `outlooks`: of the engine's models; `infos`: of
    those that are loaded. `learner`: what feedback has taught.
    """

    def __init__(
        self,
        ladder: ServedLadder,
        tiers: Mapping[str, Tier],
        outlooks: Callable[[], Mapping[str, Outlook]],
        infos: Callable[[], Mapping[str, ModelInfo]],
        learner: Learner,
    ) -> None:
        self.ladder = ladder
        self._learner = learner
        prior = max(each.lengths.p90 for each in ladder.variants)
        self.lengths = OutputLengths(prior, ladder.ladder.lengths)
        self._tiers = tiers
        self._infos = infos
        self._prospects = Prospects(outlooks)
        self._price = TimePrice()
        self._variants = {ladder.models[each.name].name: each for each in ladder.variants}
        self._cascades = {
            ladder.models[each.name].name: (ladder.models[each.cascade.begins].name, each.cascade)
            for each in ladder.variants
            if each.cascade is not None and each.cascade.begins in ladder.models
        }
        measured = measured_qualities(ladder.variants, ladder.ladder.top)
        self._measured = {model: measured[variant.name] for model, variant in self._variants.items()}

    @property
    def measures_cascade(self) -> bool:
        """Whether a cascade was measured that pays off, among the variants that are served."""
        return bool(self._cascades)

    @property
    def measures_energy(self) -> bool:
        """Whether the energy of every variant is known."""
        return all(each.energy is not None for each in self.ladder.variants)

    def place(self, asked: LadderRequest, now: float) -> VariantPlacement:
        """The variant that answers, by `ladder.choose`; the top while nothing is known of the queues."""
        models = self._able(asked)
        expected = self._expectation(asked, models, now)
        floor = asked.objective.min_quality or 0.0
        choice = self._choice(asked, models, expected, now)
        if choice is None:
            placed = self._unforeseen(asked, expected, floor)
        else:
            self._price.offer(now, _options(choice, floor), _patience_ms(asked.objective))
            placed = self._placed(asked, choice, expected, floor)
        return placed._replace(expected_tokens=int(expected.tokens.mean), fitted=expected.fitted)

    def foresee(self, asked: LadderRequest, now: float) -> str:
        """The variant that would answer if this were asked now; the top if none would. Nothing is drawn, and
        no price follows."""
        models = self._able(asked)
        expected = self._expectation(asked, models, now)
        choice = self._choice(asked, models, expected, now)
        if choice is None:
            found = self._unforeseen(asked, expected, asked.objective.min_quality or 0.0).model
        else:
            found = None if choice.chosen is None else choice.chosen.candidate.name
        return found or self.ladder.top.name

    def _choice(
        self, asked: LadderRequest, models: Mapping[str, Variant], expected: Expectation, now: float
    ) -> VariantChoice | None:
        """The choice by what is predicted; None while nothing is known of the queues."""
        tier = self._tiers.get(asked.tier)
        weight = 0.0 if tier is None else tier.weight
        standings = self._prospects.standings(
            models, asked.objective, weight, asked.arrival, asked.prompt_tokens, asked.cached
        )
        candidates: list[LadderCandidate] = []
        for model, standing in standings.items():
            variant, seen = models[model], standing.seen
            quality = expected.corrected[model]
            candidates.append(
                LadderCandidate(
                    name=model,
                    cost=seen.estimate.cost,
                    quality=quality.mean,
                    quality_low=quality.low,
                    joules_per_token=0.0 if variant.energy is None else variant.energy.joules_per_token,
                    margin=seen.estimate.margin,
                    queue_ms=standing.queue_ms,
                    pace=standing.pace,
                    streams=seen.estimate.streams,
                    context=seen.context,
                    beside_ms=standing.beside_ms,
                    crowded=standing.crowded,
                    cached=asked.cached.get(model, 0),
                )
            )
        if len(candidates) < len(models):
            return None
        if asked.cascade and asked.prefer == "quality" and asked.only is None:
            candidates += self._begun(candidates)
        need = Need(
            prompt_tokens=asked.prompt_tokens,
            output_tokens=int(expected.tokens.long),
            longest_tokens=int(expected.tokens.longest),
            mean_tokens=int(expected.tokens.mean),
            objective=asked.objective,
            min_quality=asked.objective.min_quality or 0.0,
            preference=asked.prefer,
            elapsed_ms=(now - asked.arrival) * 1e3,
        )
        return choose(candidates, need, self._price.value())

    def _begun(self, candidates: Sequence[LadderCandidate]) -> list[LadderCandidate]:
        """The cascades among these variants, each as one more candidate."""
        known = {each.name: each for each in candidates}
        return [
            cascade(
                known[begins],
                Takeover(
                    candidate=known[better],
                    below=found.below,
                    share=found.escalated,
                    begun=found.begun,
                    loss=found.loss,
                ),
            )
            for better, (begins, found) in self._cascades.items()
            if better in known and begins in known and not known[better].cached
        ]

    def _expectation(self, asked: LadderRequest, models: Mapping[str, Variant], now: float) -> Expectation:
        found = features(asked.question)
        described = context(found)
        quality = {model: self._measured[model].of(found) for model in models}
        fitted = self.lengths.fitted(found)
        tokens = self.lengths.expect(asked.tenant, fitted, asked.max_tokens)
        guidance = self._learner.guidance(asked.tenant, self.ladder.name, described, asked.user, now)
        better = quality
        if guidance is not None:
            better = {model: guidance.corrected(model, each) for model, each in quality.items()}
        return Expectation(described, quality, better, guidance, fitted, tokens)

    def reprice(self, now: float) -> None:
        """Let the price of machine time follow the load. To be called after a choice, when nobody waits."""
        self._price.update(now, self._prospects.backlog_ms())

    def _able(self, asked: LadderRequest) -> dict[str, Variant]:
        """The variants that may answer, by the engine's names: their context holds prompt and answer."""
        if asked.only is not None:
            return {asked.only: self._variants[asked.only]}
        needed = asked.longest_prompt + (asked.max_tokens or 1)
        infos = self._infos()
        able = {
            model: variant
            for model, variant in self._variants.items()
            if model in infos and infos[model].context >= needed
        }
        top = self.ladder.top.name
        return able or {top: self._variants[top]}

    def _unforeseen(self, asked: LadderRequest, expected: Expectation, floor: float) -> VariantPlacement:
        """The placement by quality alone."""
        found = expected.corrected
        best = max(found, key=lambda model: (found[model].low >= floor, found[model].mean))
        low = max(each.low for each in found.values())
        if low < floor and asked.objective.on_miss == "reject":
            return VariantPlacement(None, "below_floor", best_quality=low)
        if asked.prefer == "quality":
            least = found[best].low
            for model in asked.cached.keys() & found.keys():
                if found[model].low >= floor and found[model].mean >= least:
                    best = model
        made = self._made(expected, best, {best: 1.0})
        return VariantPlacement(best, "no_forecast" if low >= floor else "below_floor", made=made)

    def _placed(
        self, asked: LadderRequest, choice: VariantChoice, expected: Expectation, floor: float
    ) -> VariantPlacement:
        low = max([each.candidate.quality_low for each in choice.predicted])
        if choice.chosen is None:
            after = min(each.excess_ms for each in choice.predicted) / 1e3
            return VariantPlacement(None, choice.reason, (), low, low >= floor, max(after, SOONEST_S))
        chosen, reason = choice.chosen, choice.reason
        if (takeover := chosen.candidate.takeover) is not None:
            # Answers that it keeps are those of which it is sure: rewards for them say little of others.
            name, better = chosen.candidate.name, Cascade(takeover.candidate.name, takeover.below)
            made = MadeChoice(self.ladder.name, name)
            return VariantPlacement(name, "cascade", (), low, made=made, cascade=better)
        propensities = {chosen.candidate.name: 1.0}
        guidance = expected.guidance
        # A preference for energy or latency, and a load that has a price, have decided already.
        if (
            guidance is not None
            and guidance.bandit.explores
            and asked.prefer == "quality"
            and reason != "load"
            and not chosen.candidate.cached  # what is read would be read again
            and len(feasible := [each for each in choice.feasible if not each.candidate.takeover]) > 1
        ):
            names = [each.candidate.name for each in feasible]
            drawn = guidance.draw(names, [each.candidate.quality for each in feasible])
            propensities = dict(zip(names, drawn.propensities, strict=True))
            if feasible[drawn.place] is not chosen:
                chosen, reason = feasible[drawn.place], "explored"
        name = chosen.candidate.name
        return VariantPlacement(
            name,
            None if asked.only else reason,
            _lighter(choice, chosen, asked, floor),
            low,
            made=self._made(expected, name, propensities),
        )

    def _made(self, expected: Expectation, model: str, propensities: Mapping[str, float]) -> MadeChoice:
        return MadeChoice(
            model=self.ladder.name,
            variant=model,
            variants=tuple(expected.measured),
            propensities=tuple([propensities.get(name, 0.0) for name in expected.measured]),
            expected=tuple([each.mean for each in expected.measured.values()]),
            context=expected.context,
        )


def _patience_ms(objective: Objective) -> float:
    """How long after its arrival the first token of a request is due."""
    first, whole = objective.ttft_ms, objective.total_ms
    return min(inf if first is None else first, inf if whole is None else whole)


def _options(choice: VariantChoice, floor: float) -> list[WorkOption]:
    """What the choice could have taken of the machine's time: the variants that reach the floor, or all."""
    able = [each for each in choice.predicted if each.candidate.quality_low >= floor]
    return [(each.work_ms, each.candidate.quality) for each in able or choice.predicted]


def _lighter(
    choice: VariantChoice, chosen: Prediction, asked: LadderRequest, floor: float
) -> tuple[str, ...]:
    """The variants that the request may move to while it waits, the best first: those that take less time and
    reach the floor, and with `degrade` then those below it. None if nothing is ever due."""
    if not asked.objective.timed:
        return ()
    lighter = [
        each for each in choice.predicted if each.work_ms < chosen.work_ms and not each.candidate.takeover
    ]
    able = [each for each in lighter if each.candidate.quality_low >= floor]
    able.sort(key=_quality, reverse=True)
    if asked.objective.on_miss == "degrade":
        able += sorted((each for each in lighter if each not in able), key=_quality, reverse=True)
    return tuple(each.candidate.name for each in able)


_quality = attrgetter("candidate.quality")
