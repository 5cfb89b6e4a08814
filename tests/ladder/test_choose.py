"""The choice of a variant: its promises, on random ladders and requests, and its cost."""

from __future__ import annotations

from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.deadlines import Deadline
from stretto.engine.step_time import StepCost
from stretto.ladder.choose import LadderCandidate, Need, Prediction, choose, predict
from stretto.types import Objective

MS = st.one_of(st.none(), st.floats(0.5, 5000))
COSTS = st.builds(
    StepCost,
    st.floats(0.01, 50),
    st.floats(0.001, 5),
    st.floats(0.001, 1),
    st.floats(0, 1e-3),
    st.floats(0, 1e-6),
)


@st.composite
def candidate(draw: st.DrawFn) -> LadderCandidate:
    quality, streams = draw(st.floats(0, 1)), draw(st.integers(0, 8))
    return LadderCandidate(
        name=f"v{draw(st.integers(0, 99))}",
        cost=draw(COSTS),
        quality=quality,
        quality_low=quality * draw(st.floats(0, 1)),
        joules_per_token=draw(st.floats(0, 5)),
        margin=1.1,
        queue_ms=draw(st.floats(0, 500)),
        streams=streams,
        context=100 * streams,
    )


CANDIDATES = st.lists(candidate(), min_size=1, max_size=6, unique_by=lambda each: each.name)


@st.composite
def needs(draw: st.DrawFn) -> Need:
    return Need(
        prompt_tokens=draw(st.integers(1, 2000)),
        output_tokens=draw(st.integers(1, 400)),
        objective=Objective(
            ttft_ms=draw(MS),
            itl_ms=draw(MS),
            total_ms=draw(MS),
            on_miss=draw(st.sampled_from(("degrade", "late", "reject"))),
        ),
        min_quality=draw(st.floats(0, 1)),
        preference=draw(st.sampled_from(("quality", "energy", "latency"))),
        elapsed_ms=draw(st.floats(0, 100)),
    )


def late_by_emitting(found: Prediction, need: Need) -> bool:
    """Whether a token would be late if they came as predicted, by the rule that the server uses."""
    deadline = Deadline.of(0.0, need.objective)
    for token in range(max(need.output_tokens, 1)):
        deadline.emit((found.ttft_ms + token * found.itl_ms) / 1e3)
    return deadline.slack < -1e-6


@given(CANDIDATES, needs())
def test_the_choice_is_the_best_of_those_that_keep_time_and_floor(
    candidates: list[LadderCandidate], need: Need
) -> None:
    choice = choose(candidates, need)
    predicted = [predict(each, need) for each in candidates]
    on_time = [each for each in predicted if each.excess_ms <= 0]
    feasible = [each for each in on_time if each.candidate.quality_low >= need.min_quality]
    assert choice.feasible == feasible
    if feasible:
        assert choice.outcome == "on_time" and choice.chosen is not None and choice.chosen in feasible
        best = {
            "quality": max(each.candidate.quality for each in feasible) == choice.chosen.candidate.quality,
            "energy": min(each.energy_j for each in feasible) == choice.chosen.energy_j,
            "latency": min(each.total_ms for each in feasible) == choice.chosen.total_ms,
        }
        assert best[need.preference]
    elif need.objective.on_miss == "reject":
        assert choice.outcome == "refused" and choice.chosen is None
    else:
        assert choice.chosen is not None and choice.outcome in ("below_floor", "late")


@given(CANDIDATES, needs())
def test_degrade_gives_up_quality_before_time_and_late_gives_up_time_before_quality(
    candidates: list[LadderCandidate], need: Need
) -> None:
    choice = choose(candidates, need)
    if choice.outcome in ("on_time", "refused"):
        return
    assert choice.chosen is not None
    predicted = [predict(each, need) for each in candidates]
    if need.objective.on_miss == "degrade" and any(each.excess_ms <= 0 for each in predicted):
        assert choice.chosen.excess_ms <= 0
    if need.objective.on_miss == "late" and any(
        each.candidate.quality_low >= need.min_quality for each in predicted
    ):
        assert choice.chosen.candidate.quality_low >= need.min_quality


@given(CANDIDATES, needs())
def test_excess_is_what_the_deadlines_of_the_server_would_find(
    candidates: list[LadderCandidate], need: Need
) -> None:
    for each in candidates:
        found = predict(each, need)
        if abs(found.excess_ms) > 1e-3:
            assert late_by_emitting(found, need)
        elif found.excess_ms == 0.0:
            assert not late_by_emitting(found, need)


@given(CANDIDATES, needs(), st.randoms())
def test_the_order_of_the_variants_does_not_matter(
    candidates: list[LadderCandidate], need: Need, random: object
) -> None:
    again = candidates[::-1]
    assert choose(candidates, need).name == choose(again, need).name


@given(CANDIDATES, needs(), st.floats(1.0, 10.0))
def test_more_time_never_lowers_the_quality(
    candidates: list[LadderCandidate], need: Need, factor: float
) -> None:
    def looser(limit: float | None) -> float | None:
        return None if limit is None else limit * factor

    tight = need.objective
    loose = Objective(
        ttft_ms=looser(tight.ttft_ms), itl_ms=looser(tight.itl_ms), total_ms=looser(tight.total_ms)
    )
    before = choose(candidates, _by_quality(need, tight))
    after = choose(candidates, _by_quality(need, loose))
    if before.outcome == "on_time":
        assert before.chosen is not None and after.chosen is not None
        assert after.chosen.candidate.quality >= before.chosen.candidate.quality


def _by_quality(need: Need, objective: Objective) -> Need:
    return Need(
        prompt_tokens=need.prompt_tokens,
        output_tokens=need.output_tokens,
        objective=objective,
        min_quality=need.min_quality,
    )


def test_nothing_to_choose_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="no variant"):
        choose([], Need(prompt_tokens=1, output_tokens=1))


def test_a_decision_among_eight_variants_is_no_burden_to_a_request() -> None:
    """`benchmarks/decision.py` measures it: 49 us. A machine that others use is several times slower."""
    candidates = [
        LadderCandidate(
            name=f"v{number}",
            cost=StepCost(1.0 + number, 0.1, 0.05, 1e-4, 1e-7),
            quality=0.5 + number / 20,
            quality_low=0.4 + number / 20,
            joules_per_token=0.1,
        )
        for number in range(8)
    ]
    need = Need(
        prompt_tokens=300,
        output_tokens=120,
        objective=Objective(ttft_ms=200, itl_ms=20, total_ms=2000),
        min_quality=0.5,
    )
    best = 1.0
    for _ in range(20):
        started = process_time()
        for _ in range(100):
            choose(candidates, need)
        best = min(best, (process_time() - started) / 100)
    assert best < 500e-6


def test_of_variants_that_would_crowd_others_out_the_one_that_ends_first_answers() -> None:
    full = LadderCandidate(
        name="full", cost=StepCost(20.0, 1.0, 1.0), quality=0.9, quality_low=0.8, crowded=True
    )
    small = LadderCandidate(
        name="small", cost=StepCost(2.0, 0.1, 0.1), quality=0.5, quality_low=0.4, crowded=True
    )
    choice = choose([full, small], Need(prompt_tokens=10, output_tokens=10))
    assert (choice.name, choice.outcome, choice.reason) == ("small", "late", "late")


def _two(quality: float) -> list[LadderCandidate]:
    """A slow variant on an idle machine, and a fast one of this quality with a queue."""
    slow, fast = StepCost(2, 0.5, 0.2, 0, 0), StepCost(0.2, 0.05, 0.02, 0, 0)
    return [
        LadderCandidate(name="slow", cost=slow, quality=0.9, quality_low=0.8),
        LadderCandidate(name="fast", cost=fast, quality=quality, quality_low=0.8 * quality, queue_ms=5e3),
    ]


def test_of_equals_the_one_that_takes_less_of_the_machine_answers_although_it_ends_later() -> None:
    assert choose(_two(0.9), Need(prompt_tokens=100, output_tokens=10)).name == "fast"


def test_below_the_floor_machine_time_has_its_price_too() -> None:
    need = Need(prompt_tokens=100, output_tokens=10, min_quality=0.95)
    assert choose(_two(0.8), need).name == "slow"
    choice = choose(_two(0.8), need, price=0.01)
    assert (choice.outcome, choice.name) == ("below_floor", "fast")


def test_machine_time_is_that_of_an_answer_of_the_mean_length() -> None:
    need = Need(prompt_tokens=100, output_tokens=100, mean_tokens=10)
    usual, long = (predict(_two(0.9)[0], each) for each in (need, Need(prompt_tokens=100, output_tokens=100)))
    assert usual.work_ms == pytest.approx(20 + 10 * 2.5) and long.work_ms == pytest.approx(20 + 100 * 2.5)
    assert usual.total_ms == long.total_ms, "what is promised holds for a long answer"


def test_a_better_variant_must_have_time_for_one_of_the_longest_answers_if_another_has() -> None:
    slow = LadderCandidate(name="slow", cost=StepCost(2.0, 0.0, 0.0, 0.0, 0.0), quality=0.9, quality_low=0.8)
    fast = LadderCandidate(name="fast", cost=StepCost(1.0, 0.0, 0.0, 0.0, 0.0), quality=0.7, quality_low=0.6)

    def chosen(total_ms: float, longest: int, floor: float = 0.0) -> tuple[str | None, str, str]:
        objective = Objective(total_ms=total_ms, on_miss="reject")
        need = Need(
            prompt_tokens=10,
            output_tokens=100,
            longest_tokens=longest,
            objective=objective,
            min_quality=floor,
        )
        found = choose([slow, fast], need)
        return found.name, found.reason, found.outcome

    assert chosen(210, 0) == ("slow", "best", "on_time")
    assert chosen(210, 150) == ("fast", "deadline", "on_time")
    assert chosen(320, 150) == ("slow", "best", "on_time")
    assert chosen(210, 300) == ("slow", "best", "on_time"), "none has time for it, so nothing changes"
    assert chosen(210, 150, floor=0.75) == ("slow", "best", "on_time"), "the other does not reach the floor"
