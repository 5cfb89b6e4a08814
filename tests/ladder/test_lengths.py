"""The tokens of an answer: by the prompt, and by what has ended, for each tenant."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.ladder.estimate import BUCKETS, FEATURES, features
from stretto.ladder.lengths import (
    ENOUGH,
    MOST_TENANTS,
    UNKNOWN,
    AnswerTokens,
    FittedLengths,
    LengthBin,
    LengthModel,
    OutputLengths,
    _loss,  # pyright: ignore[reportPrivateUsage]
)
from stretto.optimise.data import DataSample
from stretto.optimise.estimates.lengths import fitted_lengths
from stretto.statistics import quantile

WORDS = "red blue green lamp chair table desk shelf sofa bed rug vase clock mirror plant".split()


def answers(count: int, seed: int) -> tuple[list[DataSample], list[int]]:
    """Prompts of which the sums have longer answers the more terms they have, and the others short ones."""
    rng = Random(seed)
    samples: list[DataSample] = []
    tokens: list[int] = []
    for _ in range(count):
        items = rng.choices(WORDS, k=rng.randint(2, 20))
        if rng.random() < 0.5:
            samples.append(DataSample(prompt=f"add the prices of {' '.join(items)} in steps", answer=""))
            tokens.append(round(12 * len(items) * rng.lognormvariate(0.0, 0.1)))
        else:
            samples.append(DataSample(prompt=f"which is the first of {' '.join(items)}", answer=""))
            tokens.append(rng.randint(3, 5))
    return samples, tokens


def test_long_answers_are_told_by_the_prompt_and_one_in_ten_is_longer() -> None:
    model = fitted_lengths(*answers(600, 1))
    assert model is not None
    samples, tokens = answers(600, 2)
    found = [FittedLengths(model).of(features(sample.question)) for sample in samples]
    longer = [count > each.long for count, each in zip(tokens, found, strict=True)]
    assert 0.05 <= sum(longer) / len(longer) <= 0.15
    longest = [count > each.longest for count, each in zip(tokens, found, strict=True)]
    assert sum(longest) / len(longest) <= 0.05
    all_alike = quantile(sorted(tokens), 0.9)
    loss = sum(_loss(count, each.long) for count, each in zip(tokens, found, strict=True))
    assert loss < 0.5 * sum(_loss(count, all_alike) for count in tokens)


def test_too_few_prompts_fit_no_model() -> None:
    assert fitted_lengths(*answers(59, 1)) is None


def model(*bins: LengthBin) -> LengthModel:
    """A model whose score is the constant 1."""
    return LengthModel((1.0, *[0.0] * (FEATURES - 1)), (0.0,) * BUCKETS, bins)


def test_the_table_is_linear_between_two_bins_and_flat_beyond() -> None:
    found = features("any prompt")
    low, high = LengthBin(0.0, 1.0, 10.0, 20.0, 9), LengthBin(4.0, 5.0, 50.0, 100.0, 9)
    assert FittedLengths(model(low, high)).of(found) == AnswerTokens(2.0, 20.0, 40.0)
    assert FittedLengths(model(low)).of(found) == AnswerTokens(1.0, 10.0, 20.0)
    assert FittedLengths(model(high)).of(found) == AnswerTokens(5.0, 50.0, 100.0)
    with pytest.raises(ValueError, match="must rise"):
        model(high, low)


def test_the_prior_counts_until_enough_answers_have_ended() -> None:
    lengths = OutputLengths(40)
    assert lengths.expect("a").long == 40
    assert lengths.expect("a", max_tokens=10).long == 10
    for _ in range(ENOUGH - 1):
        lengths.observe("a", 5)
    assert lengths.expect("a").long == 40
    lengths.observe("a", 5)
    assert lengths.expect("a").long == 5
    assert OutputLengths().expect("a").long == UNKNOWN
    assert OutputLengths(40).expect("a", max_tokens=0) == (1, 1, 1)


def test_the_mean_is_of_the_same_answers_and_that_of_long_ones_until_there_are_enough() -> None:
    lengths = OutputLengths(40)
    assert lengths.expect("a").mean == 40
    for tokens in (*[10] * 9, 110):
        lengths.observe("a", tokens)
    assert lengths.expect("a").mean == 20 and lengths.expect("a", max_tokens=7).mean == 7


def test_one_of_the_longest_answers_is_longer_than_a_long_one() -> None:
    lengths = OutputLengths(40)
    assert lengths.expect("a").longest == 40
    for tokens in range(1, 101):
        lengths.observe("a", tokens)
    found = lengths.expect("a")
    assert found.long < 95 < found.longest <= 100
    assert lengths.expect("a", max_tokens=50).longest == 50


def test_a_tenant_has_its_own_quantile_and_strangers_that_of_all() -> None:
    lengths = OutputLengths(40)
    for tokens in range(1, 101):
        lengths.observe("long", 1000 + tokens)
        lengths.observe("short", tokens)
    assert 1085 <= lengths.expect("long").long <= 1095
    assert 85 <= lengths.expect("short").long <= 95
    assert 100 < lengths.expect("nobody").long <= 1095


def test_a_tenant_whose_answers_are_twice_as_long_scales_what_the_model_expects() -> None:
    lengths, rng = OutputLengths(40), Random(0)
    for _ in range(200):
        expected = rng.choice((10.0, 100.0))
        lengths.observe("a", round(2 * expected), AnswerTokens(expected / 2, expected, expected))
    assert lengths.expect("a", AnswerTokens(5.0, 10.0, 15.0)) == (10, 20, 30)
    assert lengths.expect("a", AnswerTokens(50.0, 100.0, 150.0)) == (100, 200, 300)


@given(seed=st.integers(0, 99))
def test_a_model_that_knows_nothing_of_a_tenants_prompts_does_not_count(seed: int) -> None:
    lengths, rng = OutputLengths(40), Random(seed)
    for _ in range(200):
        guess = rng.choice((5.0, 50.0, 500.0))
        lengths.observe("a", rng.randint(90, 110), AnswerTokens(guess, guess, guess))
    assert 100 <= lengths.expect("a", AnswerTokens(5.0, 5.0, 5.0)).long <= 110
    assert 100 <= lengths.expect("a", AnswerTokens(500.0, 500.0, 500.0)).long <= 110


def test_answers_that_were_cut_say_only_that_answers_may_be_as_long() -> None:
    lengths = OutputLengths(40)
    for _ in range(50):
        lengths.observe("a", 4, cut=True)
    assert lengths.expect("a").long == 40, "a short limit does not make answers short"
    for _ in range(50):
        lengths.observe("a", 100, cut=True)
    assert lengths.expect("a").long == 100


def test_tenants_are_bounded() -> None:
    lengths = OutputLengths()
    for number in range(MOST_TENANTS + 100):
        lengths.observe(f"t{number}", 5)
    assert len(lengths) == MOST_TENANTS
