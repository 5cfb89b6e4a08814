"""The bandit: what it may change, that its propensities are exact, and what it forgets."""

from __future__ import annotations

from collections import Counter
from random import Random
from time import process_time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from stretto.ladder.estimate import Quality, features
from stretto.ladder.learning.bandit import (
    SETTINGS,
    Bandit,
    BanditSettings,
    Lesson,
    certain,
    context,
    corrected,
)

ESTIMATES = [Quality(0.9, 0.85), Quality(0.8, 0.75), Quality(0.6, 0.5)]
SUM = context(features("What is the sum of 4 8 15?"))
GREETING = context(features("Hello, who are you?"))
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["add 1 2", "Hello", "Where is order 7?", ""]),
        st.integers(0, 2),
        st.floats(-1, 1),
        st.sampled_from(["", "ann", "bob"]),
    ),
    max_size=30,
)


def bandit(seed: int = 0, **changes: float) -> Bandit:
    settings = structs.replace(SETTINGS, **changes) if changes else SETTINGS
    return Bandit(len(ESTIMATES), np.random.default_rng(seed), settings)


def taught(*lessons: Lesson, seed: int = 0, **changes: float) -> Bandit:
    made = bandit(seed, **changes)
    for lesson in lessons:
        made.learn(lesson)
    return made


def qualities(made: Bandit, found: np.ndarray = SUM, user: str = "") -> list[Quality]:
    return corrected(ESTIMATES, made.corrections(found, user))


def test_without_lessons_every_estimate_stays_and_the_best_is_certain() -> None:
    made = bandit()
    changes = made.corrections(SUM)
    assert corrected(ESTIMATES, changes) == ESTIMATES
    drawn = made.draw([0, 1, 2], [0.9, 0.8, 0.6], changes)
    assert drawn == certain([0.9, 0.8, 0.6]) == (0, (1.0, 0.0, 0.0))


def test_a_variant_that_fails_at_one_kind_of_prompt_is_corrected_there_and_hardly_elsewhere() -> None:
    made = taught(*[Lesson(SUM, 0, -0.9)] * 20, *[Lesson(GREETING, 0, 0.1)] * 20)
    sums, greetings = qualities(made)[0], qualities(made, GREETING)[0]
    assert sums.mean < 0.4 and sums.low < 0.4
    assert greetings.mean > 0.85 and greetings.low > 0.8
    assert qualities(made)[1:] == ESTIMATES[1:]


def test_a_few_good_votes_do_not_lift_a_variant_over_a_floor() -> None:
    few, many = taught(*[Lesson(SUM, 2, 0.4)] * 3), taught(*[Lesson(SUM, 2, 0.4)] * 100)
    assert qualities(few)[2].low < ESTIMATES[2].low + 0.03
    assert qualities(many)[2].low > 0.7


def test_a_single_vote_moves_only_its_variant_and_not_far() -> None:
    found = qualities(taught(Lesson(SUM, 1, -0.8)))
    assert [found[0], found[2]] == [ESTIMATES[0], ESTIMATES[2]]
    assert 0.5 < found[1].mean < 0.8


@given(EVENTS)
def test_learning_one_by_one_is_rebuilding_at_once(events: list[tuple[str, int, float, str]]) -> None:
    lessons = [Lesson(context(features(text)), at, value, user) for text, at, value, user in events]
    slow, fast = taught(*lessons), bandit()
    fast.learn(Lesson(SUM, 0, 1.0, "eve"))  # what it knew before is forgotten
    fast.rebuild(lessons)
    assert fast.weight == pytest.approx(slow.weight)
    for user in ("", "ann", "eve"):
        for first, second in zip(slow.corrections(SUM, user), fast.corrections(SUM, user), strict=True):
            assert first == pytest.approx(second, abs=1e-9)
    for first, second in zip(slow.usual(), fast.usual(), strict=True):
        assert first == pytest.approx(second, abs=1e-7)  # the root of what is rounded


def test_the_usual_correction_lies_between_those_of_the_rated_prompts() -> None:
    made = taught(*[Lesson(SUM, 0, -0.9), Lesson(GREETING, 0, 0.1)] * 20)
    usual = made.usual()
    assert made.corrections(SUM).mean[0] < usual.mean[0] < made.corrections(GREETING).mean[0]
    assert usual.low[0] <= usual.mean[0] < -0.2, "the sums weigh in"
    assert usual.mean[1:] == usual.low[1:] == [0.0, 0.0]
    assert bandit().usual().mean == [0.0] * 3


@given(EVENTS, st.floats(0, 1), st.floats(0, 1))
def test_corrected_qualities_are_qualities(
    events: list[tuple[str, int, float, str]], mean: float, share: float
) -> None:
    made = taught(*[Lesson(context(features(text)), at, value, user) for text, at, value, user in events])
    found = corrected([Quality(mean, mean * share)] * 3, made.corrections(SUM, "ann"))
    assert all(0.0 <= each.low <= 1.0 and 0.0 <= each.mean <= 1.0 for each in found)


def test_propensities_are_those_with_which_variants_are_drawn() -> None:
    lessons = [Lesson(SUM, at % 3, (-0.1, 0.0, 0.1)[at % 3]) for at in range(30)]
    counts: Counter[int] = Counter()
    expected = np.zeros(3)
    made = taught(*lessons, spread=1.0, least=0.1)
    for _ in range(4000):
        changes = made.corrections(SUM)
        drawn = made.draw([0, 1, 2], [each.mean for each in corrected(ESTIMATES, changes)], changes)
        assert sum(drawn.propensities) == pytest.approx(1.0)
        assert min(drawn.propensities) >= 0.1 / 3 - 1e-12
        counts[drawn.place] += 1
        expected += drawn.propensities
    for place in range(3):
        deviation = (expected[place] * (1 - expected[place] / 4000)) ** 0.5
        assert abs(counts[place] - expected[place]) < 4 * deviation


def test_only_what_is_feasible_is_drawn() -> None:
    made = taught(*[Lesson(SUM, 0, 0.1)] * 20, spread=1.0, least=0.5)
    changes = made.corrections(SUM)
    assert made.draw([2], [0.6], changes) == (0, (1.0,))
    drawn = made.draw([1, 2], [0.8, 0.6], changes)
    assert len(drawn.propensities) == 2
    with pytest.raises(ValueError, match="no variant is feasible"):
        made.draw([], [], changes)


def test_old_lessons_are_forgotten() -> None:
    made = taught(*[Lesson(SUM, 0, -0.8)] * 50)
    assert qualities(made)[0].mean < 0.3
    for _ in range(2000):
        made.learn(Lesson(GREETING, 1, 0.0))
    assert qualities(made)[0].mean == pytest.approx(0.9, abs=0.01)


def test_what_is_better_again_is_found_again() -> None:
    made = taught(*[Lesson(SUM, 0, -0.8)] * 50, *[Lesson(SUM, 0, 0.1)] * 200)
    assert qualities(made)[0].mean > 0.8


def test_a_user_with_few_votes_is_moved_little_and_with_many_votes_far() -> None:
    others = [Lesson(SUM, 0, 0.0, f"user {at}") for at in range(60)]
    few, many = (
        taught(*others, *[Lesson(SUM, 0, -0.6, "ann")] * count).corrections(SUM, "ann").mean[0]
        - taught(*others, *[Lesson(SUM, 0, -0.6, "ann")] * count).corrections(SUM, "bob").mean[0]
        for count in (1, 12)
    )
    assert -0.1 < few < 0.0
    assert many < 2 * few
    assert -0.6 < many < -0.15


def test_users_are_bounded_and_the_least_recent_is_dropped() -> None:
    made = bandit(users=2)
    for user in ("ann", "bob", "eve"):
        made.learn(Lesson(SUM, 0, -0.9, user))
    assert made.corrections(SUM, "ann") == made.corrections(SUM, "nobody")
    assert made.corrections(SUM, "eve") != made.corrections(SUM, "nobody")


def test_the_same_seed_draws_the_same() -> None:
    def run() -> list[int]:
        made = taught(*[Lesson(SUM, 0, -0.1)] * 20, seed=7, spread=1.0)
        changes = made.corrections(SUM)
        return [made.draw([0, 1, 2], [0.8, 0.8, 0.8], changes).place for _ in range(50)]

    assert run() == run()
    assert len(set(run())) > 1


def test_any_text_has_a_context() -> None:
    assert len(context(features(""))) == len(context(features("a 1 ? " * 500)))
    assert np.isfinite(context(features("\ud800 \0 ß 漢字" * 99))).all()


def test_a_correction_and_a_draw_take_microseconds() -> None:
    rng = Random(0)
    made = Bandit(8, np.random.default_rng(0), BanditSettings())
    for _ in range(30):
        made.learn(Lesson(SUM, rng.randrange(8), rng.uniform(-0.2, 0.2), "ann"))
    estimates, feasible = [Quality(0.8, 0.7)] * 8, list(range(8))
    best = 1.0
    for _ in range(20):
        started = process_time()
        for _ in range(20):
            changes = made.corrections(SUM, "ann")
            made.draw(feasible, [each.mean for each in corrected(estimates, changes)], changes)
        best = min(best, (process_time() - started) / 20)
    assert best < 500e-6
