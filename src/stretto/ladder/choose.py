"""Chooses the variant that answers a request: the best one that is predicted to be on time.

Pure, and cheap enough to be asked for every request. It knows numbers, and neither queues nor checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from msgspec import Struct

from stretto.deadlines import Deadline
from stretto.engine.step_time import StepCost
from stretto.types import Objective

Preference = Literal["quality", "energy", "latency"]
ChoiceOutcome = Literal["on_time", "below_floor", "late", "refused"]


class LadderCandidate(Struct, frozen=True, kw_only=True):
    """A variant as one request would meet it now.

    `cost`: its step-time model. A prediction times `margin` holds for most steps. `queue_ms`: from now until
    its first step. `streams` and `context`: the decodes that would share its steps, and the keys they read.
    `quality`: the expected share of right answers; `quality_low`: the lower end of its confidence interval.
    """

    name: str
    cost: StepCost
    quality: float
    quality_low: float
    joules_per_token: float = 0.0
    margin: float = 1.0
    queue_ms: float = 0.0
    streams: int = 0
    context: int = 0


class Need(Struct, frozen=True, kw_only=True):
    """What a request needs. `output_tokens`: the 90 % quantile of the length of its answer.

    `elapsed_ms`: since its arrival, from which its deadlines count.
    """

    prompt_tokens: int
    output_tokens: int
    objective: Objective = Objective()
    min_quality: float = 0.0
    preference: Preference = "quality"
    elapsed_ms: float = 0.0


class Prediction(NamedTuple):
    """What a variant would do for a request. Times count from the request's arrival."""

    candidate: LadderCandidate
    ttft_ms: float
    itl_ms: float
    total_ms: float
    energy_j: float
    excess_ms: float  # by how much it would miss the objective; 0: on time


class VariantChoice(NamedTuple):
    """The chosen variant; None when the request is refused. `feasible`: how many met time and floor."""

    outcome: ChoiceOutcome
    chosen: Prediction | None
    feasible: int

    @property
    def name(self) -> str | None:
        return None if self.chosen is None else self.chosen.candidate.name


def choose(candidates: Sequence[LadderCandidate], need: Need) -> VariantChoice:
    """The variant that answers.

    Among those that are on time and whose `quality_low` reaches the floor: the best by the preference. If
    there is none, the objective's `on_miss` decides. `reject`: none answers. `degrade`: the best quality that
    is on time, below the floor (`below_floor`); if none is, the one that ends soonest (`late`). `late`: of
    those that reach the floor, the one that is least late; if none does, the best quality (`below_floor`).
    Raises ValueError when there are no candidates.
    """
    if not candidates:
        raise ValueError("there is no variant to choose from")
    predicted = [predict(candidate, need) for candidate in candidates]
    on_time = [each for each in predicted if each.excess_ms <= 0.0]
    feasible = [each for each in on_time if each.candidate.quality_low >= need.min_quality]
    if feasible:
        return VariantChoice("on_time", min(feasible, key=_ORDERS[need.preference]), len(feasible))
    match need.objective.on_miss:
        case "reject":
            return VariantChoice("refused", None, 0)
        case "degrade":
            if on_time:
                return VariantChoice("below_floor", min(on_time, key=_by_quality), 0)
            return VariantChoice("late", min(predicted, key=_by_excess), 0)
        case "late":
            able = [each for each in predicted if each.candidate.quality_low >= need.min_quality]
            if able:
                return VariantChoice("late", min(able, key=_by_excess), 0)
            return VariantChoice("below_floor", min(predicted, key=_by_quality), 0)


def predict(candidate: LadderCandidate, need: Need) -> Prediction:
    """What the candidate would do: queue + prefill, then `output_tokens` steps of its usual duration."""
    cost, margin, objective = candidate.cost, candidate.margin, need.objective
    length, tokens = need.prompt_tokens, max(need.output_tokens, 1)
    ttft = need.elapsed_ms + candidate.queue_ms + margin * (cost.base + cost.prefill(0, length))
    keys = candidate.context + length + tokens // 2
    step = cost.decodes(candidate.streams + 1, keys)
    itl = margin * step
    total = ttft + (tokens - 1) * itl
    # Tokens come evenly, so if the first and the last are on time, all are.
    deadline = Deadline.of(0.0, objective)
    late_s = ttft / 1e3 - deadline.of_token(0)
    deadline.emit(ttft / 1e3)
    excess = max(0.0, late_s, total / 1e3 - deadline.of_token(tokens - 1)) * 1e3
    return Prediction(candidate, ttft, itl, total, candidate.joules_per_token * tokens, excess)


def _by_quality(each: Prediction) -> tuple[float, float, str]:
    """The best quality; of equals, the one that ends first."""
    return -each.candidate.quality, each.total_ms, each.candidate.name


def _by_energy(each: Prediction) -> tuple[float, float, str]:
    return each.energy_j, -each.candidate.quality, each.candidate.name


def _by_latency(each: Prediction) -> tuple[float, float, str]:
    return each.total_ms, -each.candidate.quality, each.candidate.name


def _by_excess(each: Prediction) -> tuple[float, float, str]:
    """The least late; of equals, the best quality."""
    return each.excess_ms, -each.candidate.quality, each.candidate.name


_ORDERS = {"quality": _by_quality, "energy": _by_energy, "latency": _by_latency}
