"""Chooses the variant that answers a request: the best one that is predicted to be on time.

Pure, and cheap enough to be asked for every request. It knows numbers, and neither queues nor checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from msgspec import Struct, structs

from stretto.deadlines import excess_ms
from stretto.engine.step_time import StepCost
from stretto.types import Objective, Preference, VariantReason

ChoiceOutcome = Literal["on_time", "below_floor", "late", "refused"]
CROWDED_MS = 50.0  # a request that crowds out a stream is late by so much at least


class Takeover(Struct, frozen=True, kw_only=True):
    """The better variant of a cascade, which may go on with what another one began. `below`: from the first
    token of a smaller log-probability. `share`: of the answers it ends; `begun`: the share of their tokens
    that the other wrote. `loss`: of quality, beside the better one alone."""

    candidate: LadderCandidate
    below: float
    share: float
    begun: float
    loss: float


class LadderCandidate(Struct, frozen=True, kw_only=True):
    """A variant as one request would meet it now.

    `cost`: its step-time model. A prediction times `margin` holds for most steps. `queue_ms`: from now until
    its first step. `pace`: the share of the time that its prompts get. `streams` and `context`: the decodes
    that would share its steps, and the keys they read. `beside_ms`: the steps of other variants that come
    between two of its steps. `crowded`: whether one more stream would make others late.
    `quality`: the expected share of right answers; `quality_low`: the lower end of its confidence interval.
    `cached`: tokens of the prompt that it has computed already, while the prompt was typed. `takeover`: who
    goes on when it is not sure.
    """

    name: str
    cost: StepCost
    quality: float
    quality_low: float
    joules_per_token: float = 0.0
    margin: float = 1.0
    queue_ms: float = 0.0
    pace: float = 1.0
    streams: int = 0
    context: int = 0
    beside_ms: float = 0.0
    crowded: bool = False
    cached: int = 0
    takeover: Takeover | None = None


class Need(Struct, frozen=True, kw_only=True):
    """What a request needs. `output_tokens`: the 90 % quantile of the length of its answer. `longest_tokens`:
    a length that hardly any answer exceeds; 0: as `output_tokens`. `mean_tokens`: the mean of it, which says
    what machine time costs the others; 0: as `output_tokens`.

    `elapsed_ms`: since its arrival, from which its deadlines count.
    """

    prompt_tokens: int
    output_tokens: int
    longest_tokens: int = 0
    mean_tokens: int = 0
    objective: Objective = Objective()
    min_quality: float = 0.0
    preference: Preference = "quality"
    elapsed_ms: float = 0.0


class Prediction(NamedTuple):
    """What a variant would do for a request. Times count from the request's arrival. `work_ms`: the machine
    time that an answer of the mean length takes, with its share of each step's base."""

    candidate: LadderCandidate
    ttft_ms: float
    itl_ms: float
    total_ms: float
    energy_j: float
    excess_ms: float  # by how much it would miss the objective; 0: on time
    work_ms: float


class VariantChoice(NamedTuple):
    """The chosen variant; None when the request is refused. `feasible`: those that met time and floor.

    `predicted`: what each candidate would do, in their order.
    """

    outcome: ChoiceOutcome
    chosen: Prediction | None
    reason: VariantReason
    feasible: list[Prediction]
    predicted: list[Prediction]

    @property
    def name(self) -> str | None:
        return None if self.chosen is None else self.chosen.candidate.name


def choose(candidates: Sequence[LadderCandidate], need: Need, price: float = 0.0) -> VariantChoice:
    """The variant that answers.

    Among those that are on time and whose `quality_low` reaches the floor: the best by the preference. If
    some of them are so even with one of the longest answers, it is one of these. If
    there is none, the objective's `on_miss` decides. `reject`: none answers. `degrade`: the best quality that
    is on time, below the floor (`below_floor`); if none is, the one that ends soonest (`late`). `late`: of
    those that reach the floor, the one that is least late; if none does, the best quality (`below_floor`).
    `price`: quality that a millisecond of machine time must be worth (`price.TimePrice`). With the preference
    `quality`, a feasible variant that has read part of the prompt goes before the price, and before others
    that are not sure to be better. Raises ValueError when there are no candidates.
    """
    if not candidates:
        raise ValueError("there is no variant to choose from")
    predicted = [_foreseen(candidate, need) for candidate in candidates]
    floor, longest = need.min_quality, need.longest_tokens > need.output_tokens
    on_time = [each for each in predicted if each.excess_ms <= 0.0]
    feasible = [each for each in on_time if each.candidate.quality_low >= floor]
    safe = [each for each in feasible if _bears_the_longest(each, need)] if longest else feasible
    if feasible:
        tight = [each for each in feasible if each not in safe] if safe and safe is not feasible else []
        feasible = safe or feasible
        order = _ORDERS[need.preference]
        chosen = best = min(feasible, key=order)
        if price > 0.0 and need.preference == "quality":
            chosen = min(feasible, key=lambda each: _by_worth(each, price))
        first = best
        if len(feasible) < len(predicted):
            variants = [each for each in predicted if each.candidate.takeover is None or each is chosen]
            first = min(variants, key=order)
        reason = "load" if chosen is not best else "deadline" if first in tight else _reason(first, chosen)
        reader = next((each for each in feasible if each.candidate.cached), None)
        if reader is not None and reader is not chosen and need.preference == "quality":
            if reader.candidate.quality >= best.candidate.quality_low:
                chosen, reason = reader, "read_ahead"
        return VariantChoice("on_time", chosen, reason, feasible, predicted)
    # A cascade promises what its better variant has time for; here there is none.
    variants = [each for each in predicted if each.candidate.takeover is None]
    on_time = [each for each in on_time if each.candidate.takeover is None]
    able = [each for each in variants if each.candidate.quality_low >= need.min_quality]
    outcome: ChoiceOutcome = "late"
    match need.objective.on_miss:
        case "reject":
            return VariantChoice("refused", None, "late" if able else "below_floor", [], predicted)
        case "degrade":
            if on_time:
                outcome, chosen = "below_floor", min(on_time, key=lambda each: _by_worth(each, price))
            else:
                chosen = min(variants, key=_by_excess)
        case "late":
            if able:
                chosen = min(able, key=_by_excess)
            else:
                outcome, chosen = "below_floor", min(variants, key=_by_quality)
    return VariantChoice(outcome, chosen, outcome, [], predicted)


def cascade(begins: LadderCandidate, takeover: Takeover) -> LadderCandidate:
    """The candidate that begins with one variant and has another one for the tokens that it is not sure of.

    Who asks for a cascade accepts the loss that was measured, so it has the better one's expected quality.
    """
    better = takeover.candidate
    low = max(better.quality_low - takeover.loss, 0.0)
    return structs.replace(begins, quality=better.quality, quality_low=low, takeover=takeover)


def _foreseen(candidate: LadderCandidate, need: Need) -> Prediction:
    takeover, begun = candidate.takeover, predict(candidate, need)
    return begun if takeover is None else _with_takeover(begun, takeover, need)


def _with_takeover(begun: Prediction, takeover: Takeover, need: Need) -> Prediction:
    """What a cascade would do. It is on time if it is so however late the better variant takes over: at the
    first token or at the last. Time, work and energy are those that are expected."""
    tokens, share = max(need.output_tokens, 1), takeover.share
    whole = predict(takeover.candidate, need)
    waits = whole.ttft_ms - need.elapsed_ms  # until it has computed what there is
    at_once, at_last = begun.ttft_ms + whole.total_ms - need.elapsed_ms, begun.total_ms + waits
    excess = max(begun.excess_ms, excess_ms(need.objective, begun.ttft_ms, max(at_once, at_last), tokens))
    if takeover.candidate.crowded:
        excess = max(excess, CROWDED_MS)
    written = takeover.begun * (tokens - 1)
    handed = begun.ttft_ms + written * begun.itl_ms + waits + (tokens - 1 - written) * whole.itl_ms
    kept, left = 1.0 - share + share * takeover.begun, share * (1.0 - takeover.begun)
    decoded = whole.work_ms - takeover.candidate.cost.prefill(0, need.prompt_tokens)
    reading = takeover.candidate.cost.prefill(0, need.prompt_tokens + round(written))
    return begun._replace(
        total_ms=(1.0 - share) * begun.total_ms + share * handed,
        energy_j=kept * begun.energy_j + left * whole.energy_j,
        excess_ms=excess,
        work_ms=kept * begun.work_ms + share * reading + left * max(decoded, 0.0),
    )


def predict(candidate: LadderCandidate, need: Need) -> Prediction:
    """What the candidate would do: queue + prefill, then `output_tokens` steps of its usual duration."""
    cost, margin, streams = candidate.cost, candidate.margin, candidate.streams + 1
    length, cached, tokens = need.prompt_tokens, candidate.cached, need.output_tokens
    if tokens < 1:
        tokens = 1
    prefill, keys = cost.prefill(cached, length - cached), length + tokens // 2
    ttft = need.elapsed_ms + candidate.queue_ms + margin * (cost.base + prefill) / candidate.pace
    itl = margin * cost.decodes(streams, candidate.context + keys) + candidate.beside_ms
    total = ttft + (tokens - 1) * itl
    excess = excess_ms(need.objective, ttft, total, tokens)
    if candidate.crowded and excess < CROWDED_MS:
        excess = CROWDED_MS
    usual = need.mean_tokens or tokens
    work = prefill + usual * (cost.row(length + usual // 2) + cost.base / streams)
    return Prediction(candidate, ttft, itl, total, candidate.joules_per_token * tokens, excess, work)


def _bears_the_longest(each: Prediction, need: Need) -> bool:
    """Whether a variant would be on time even with one of the longest answers. In the middle of one it is
    hard to replace: a lighter variant would have to compute all of it again."""
    tokens = need.longest_tokens
    if tokens <= need.output_tokens or each.candidate.takeover is not None:
        return True
    return excess_ms(need.objective, each.ttft_ms, each.ttft_ms + (tokens - 1) * each.itl_ms, tokens) <= 0.0


def _reason(best: Prediction, chosen: Prediction) -> VariantReason:
    """Why the chosen one is not the best of all by the preference."""
    if best is chosen:
        return "best"
    return "deadline" if best.excess_ms > 0.0 else "floor"


def _by_worth(each: Prediction, price: float) -> tuple[float, float, str]:
    """The most quality, less what its machine time is worth."""
    return price * each.work_ms - each.candidate.quality, each.total_ms, each.candidate.name


def _by_quality(each: Prediction) -> tuple[float, float, str]:
    """The best quality; of equals, the one that takes the least machine time."""
    return -each.candidate.quality, each.work_ms, each.candidate.name


def _by_energy(each: Prediction) -> tuple[float, float, str]:
    return each.energy_j, -each.candidate.quality, each.candidate.name


def _by_latency(each: Prediction) -> tuple[float, float, str]:
    return each.total_ms, -each.candidate.quality, each.candidate.name


def _by_excess(each: Prediction) -> tuple[float, float, str]:
    """The least late; of equals, as when all would crowd others out, the one that ends first."""
    return each.excess_ms, each.total_ms, each.candidate.name


_ORDERS = {"quality": _by_quality, "energy": _by_energy, "latency": _by_latency}
