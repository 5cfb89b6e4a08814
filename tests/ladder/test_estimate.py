"""The estimate of a request's quality: its features, its cost, and that it is calibrated."""

from __future__ import annotations

from random import Random
from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.ladder import estimate as estimates
from stretto.ladder.estimate import (
    FEATURES,
    MAX_CHARS,
    PLAIN_WORD,
    WORD,
    QualityBin,
    QualityModel,
    estimate,
    features,
    linear,
    prompt_text,
    raw,
)
from stretto.optimise.data import DataSample
from stretto.optimise.estimates.quality import (
    calibrated,
    fitted,
    smoothed,
)


def samples(count: int, seed: int) -> tuple[list[DataSample], list[bool]]:
    """Prompts of which the long sums are often wrong, and the greetings never."""
    rng = Random(seed)
    found: list[DataSample] = []
    rights: list[bool] = []
    for _ in range(count):
        terms = rng.randint(1, 6)
        text = "add " + " ".join(str(rng.randint(1, 99)) for _ in range(terms)) if terms > 1 else "say hello"
        found.append(DataSample(prompt=text, answer="x"))
        rights.append(rng.random() < (1.0 if terms == 1 else 1.1 - 0.17 * terms))
    return found, rights


@given(st.text())
def test_any_text_has_features_within_range(text: str) -> None:
    found = features(text).pairs()
    assert all(0 <= index < FEATURES for index, _ in found)
    assert len({index for index, _ in found}) == len(found)


@given(st.text(), st.integers(0, 2**16))
def test_the_score_is_the_sum_of_all_features_times_their_weights(text: str, seed: int) -> None:
    rng, found = Random(seed), features(text)
    weights = tuple(rng.uniform(-2, 2) for _ in range(FEATURES))
    plain = sum(weights[index] * value for index, value in found.pairs())
    assert linear(weights, found) == pytest.approx(plain, abs=1e-12)


@given(st.text(st.characters(max_codepoint=127)))
def test_plain_text_has_the_words_that_any_text_has(text: str) -> None:
    assert PLAIN_WORD.findall(text) == WORD.findall(text)


@given(st.text(), st.integers(0, 2**16))
def test_the_quick_estimate_is_that_of_the_score_between_its_bins(text: str, seed: int) -> None:
    rng, found = Random(seed), features(text)
    scores, lows = sorted(rng.random() for _ in range(4)), sorted(rng.random() for _ in range(4))
    bins = tuple(
        QualityBin(score, min(1.0, low + 0.1), low, 9) for score, low in zip(scores, lows, strict=True)
    )
    model = QualityModel(tuple(rng.uniform(-2, 2) for _ in range(FEATURES)), bins)
    score, quality = raw(model.weights, found), estimate(model, found)
    place = sum(each < score for each in scores)
    if place in (0, len(bins)):
        end = bins[min(place, len(bins) - 1)]
        assert quality == (end.mean, end.low)
    else:
        left, right = bins[place - 1], bins[place]
        share = (score - left.score) / (right.score - left.score)
        assert quality.low == pytest.approx(left.low + share * (right.low - left.low), abs=1e-9)
        assert quality.mean == pytest.approx(left.mean + share * (right.mean - left.mean), abs=1e-9)


def test_words_are_remembered_within_bounds_and_fall_into_the_same_buckets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [f"word{'x' * number} {number}" for number in range(60)]
    before = [features(text) for text in texts]
    monkeypatch.setattr(estimates, "KEPT_WORDS", 8)
    kept = estimates._INDICES  # pyright: ignore[reportPrivateUsage]
    kept.clear()
    for text, found in zip(texts, before, strict=True):
        assert features(text) == found
        assert len(kept) <= 8


def test_the_estimate_is_calibrated_on_prompts_it_has_not_seen() -> None:
    model = fitted(*samples(4000, 1))
    assert model is not None
    held, rights = samples(4000, 2)
    guesses = [estimate(model, features(sample.question)) for sample in held]
    order = sorted(range(len(held)), key=lambda place: guesses[place].mean)
    error = 0.0
    for first in range(0, len(order), 500):
        places = order[first : first + 500]
        error += abs(sum(guesses[place].mean - rights[place] for place in places)) / len(order)
    assert error < 0.04
    brier = sum((guess.mean - good) ** 2 for guess, good in zip(guesses, rights, strict=True)) / len(held)
    share = sum(rights) / len(rights)
    assert brier < 0.9 * share * (1 - share)  # it knows more than the mean
    assert all(guess.low <= guess.mean for guess in guesses)


def test_bins_rise_and_hold_every_prompt() -> None:
    rng = Random(3)
    scores = [rng.random() for _ in range(400)]
    rights = [rng.random() < 0.5 for _ in scores]
    bins = calibrated(scores, rights)
    assert sum(each.count for each in bins) == 400
    assert [each.mean for each in bins] == sorted(each.mean for each in bins)
    assert [each.score for each in bins] == sorted(each.score for each in bins)


def test_a_bound_holds_for_most_kinds_of_prompts_that_look_alike() -> None:
    rng = Random(5)
    kinds = [f"kind {number % 60}" for number in range(1800)]
    shares = {kind: min(1.0, max(0.0, rng.gauss(0.8, 0.12))) for kind in kinds}
    scores = [0.8 + 0.001 * rng.random() for _ in kinds]  # they look alike
    rights = [rng.random() < shares[kind] for kind in kinds]
    (narrow,), (wide,) = calibrated(scores, rights)[:1], calibrated(scores, rights, kinds)[:1]
    above = [sum(share >= each.low for share in shares.values()) for each in (narrow, wide)]
    assert above[0] < 45, "a bound for the mean holds for too few kinds"
    assert above[1] >= 54
    assert wide.low < narrow.low < wide.mean == narrow.mean
    assert calibrated(scores, rights, ["one"] * len(kinds)) == calibrated(scores, rights)


def test_no_bound_exceeds_that_of_a_better_score() -> None:
    rng = Random(6)
    kinds = [f"kind {number % 40}" for number in range(1200)]
    level = {kind: rng.random() for kind in kinds}
    scores = [min(1.0, 0.5 + 0.4 * rng.random() + 0.1 * level[kind]) for kind in kinds]
    rights = [rng.random() < score for score in scores]
    lows = [each.low for each in calibrated(scores, rights, kinds)]
    assert len(lows) > 4
    assert lows == sorted(lows)


def test_an_answer_counts_half_as_its_kind_if_there_are_enough_kinds() -> None:
    kinds = [f"kind {number % 10}" for number in range(30)]
    rights = [kind == "kind 0" or number < 10 for number, kind in enumerate(kinds)]
    found = smoothed(rights, kinds)
    usual = sum(rights) / len(rights)
    assert found[0] == pytest.approx((1.0 + (3 + usual) / 4) / 2)
    assert found[11] == pytest.approx((0.0 + (1 + usual) / 4) / 2), (
        "one of three is right, and the usual share"
    )
    assert smoothed(rights, [f"kind {number % 9}" for number in range(30)]) == rights


def test_a_prompt_is_its_last_message_and_then_the_others_as_far_as_there_is_room() -> None:
    assert prompt_text("and the city?", ["records", "of orders"]) == "and the city?\nrecords\nof orders"
    assert prompt_text("x" * 5000, ["y"]) == "x" * MAX_CHARS
    assert prompt_text("ask", ["y" * 5000, "z"]) == "ask\n" + "y" * (MAX_CHARS - 3)


def test_too_few_prompts_give_no_model() -> None:
    assert fitted(*samples(30, 1)) is None


def test_five_estimates_of_one_prompt_take_microseconds() -> None:
    model = QualityModel((0.1,) * FEATURES, (QualityBin(0.5, 0.4, 0.3, 50), QualityBin(1.0, 0.9, 0.8, 50)))
    text = "What is the total of order A-1042 with three lamps at 12.50 and the usual discount of 10 %? " * 3
    best = 1.0
    for _ in range(20):
        started = process_time()
        for _ in range(20):
            found = features(text)
            for _ in range(5):
                estimate(model, found)
        best = min(best, (process_time() - started) / 20)
    assert best < 500e-6
