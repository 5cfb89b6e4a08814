"""The 90 % quantile of answers, by tenant."""

from __future__ import annotations

from stretto.ladder.lengths import ENOUGH, MOST_TENANTS, UNKNOWN, OutputLengths


def test_the_prior_counts_until_enough_answers_have_ended() -> None:
    lengths = OutputLengths(40)
    assert lengths.predict("a") == 40
    assert lengths.predict("a", 10) == 10
    for _ in range(ENOUGH - 1):
        lengths.observe("a", 5, cut=False)
    assert lengths.predict("a") == 40
    lengths.observe("a", 5, cut=False)
    assert lengths.predict("a") == 5
    assert OutputLengths().predict("a") == UNKNOWN


def test_the_mean_is_of_the_same_answers_and_that_of_long_ones_until_there_are_enough() -> None:
    lengths = OutputLengths(40)
    assert lengths.mean("a") == 40
    for tokens in (*[10] * 9, 110):
        lengths.observe("a", tokens, cut=False)
    assert lengths.mean("a") == 20 and lengths.mean("a", 7) == 7


def test_one_of_the_longest_answers_is_longer_than_a_long_one() -> None:
    lengths = OutputLengths(40)
    assert lengths.longest("a") == 40
    for tokens in range(1, 101):
        lengths.observe("a", tokens, cut=False)
    assert lengths.predict("a") < 95 < lengths.longest("a") <= 100
    assert lengths.longest("a", 50) == 50


def test_a_tenant_has_its_own_quantile_and_strangers_that_of_all() -> None:
    lengths = OutputLengths(40)
    for tokens in range(1, 101):
        lengths.observe("long", 1000 + tokens, cut=False)
        lengths.observe("short", tokens, cut=False)
    assert 1085 <= lengths.predict("long") <= 1095
    assert 85 <= lengths.predict("short") <= 95
    assert 100 < lengths.predict("nobody") <= 1095


def test_answers_that_were_cut_say_only_that_answers_may_be_as_long() -> None:
    lengths = OutputLengths(40)
    for _ in range(50):
        lengths.observe("a", 4, cut=True)
    assert lengths.predict("a") == 40, "a short limit does not make answers short"
    for _ in range(50):
        lengths.observe("a", 100, cut=True)
    assert lengths.predict("a") == 100


def test_tenants_are_bounded() -> None:
    lengths = OutputLengths()
    for number in range(MOST_TENANTS + 100):
        lengths.observe(f"t{number}", 5, cut=False)
    assert len(lengths) == MOST_TENANTS
