"""Which variants earn their place."""

from __future__ import annotations

from stretto.engine.step_time import StepCost
from stretto.ladder.registry import Flips, Lengths
from stretto.optimise.evaluate import Measured, bootstrap, difference, interval
from stretto.optimise.frontier import flips, keep, request_ms

PROMPTS = 200


def variant(name: str, right: int, ms: float) -> Measured:
    """A variant with `right` of 200 answers right, and steps of `ms`. The first prompts are the easy ones."""
    rights = [number < right for number in range(PROMPTS)]
    return Measured(
        key="",
        name=name,
        bytes=1,
        rights=rights,
        similar=[],
        replies=[],
        quality=interval(rights),
        tasks={},
        kl=0.0,
        same_top1=1.0,
        perplexity=None,
        machine="here",
        cost=StepCost(base=ms),
        energy=None,
        lengths=Lengths(50, 20, 40),
        estimate=None,
        seconds=0.0,
    )


def names(*variants: Measured, top: str = "top", faster: float = 1.2) -> tuple[str, ...]:
    return keep(variants, top, faster).names


def test_faster_and_worse_variants_stay_in_the_order_of_quality() -> None:
    found = names(variant("small", 120, 2.0), variant("top", 190, 10.0), variant("mid", 170, 5.0))
    assert found == ("top", "mid", "small")


def test_a_dominated_variant_goes_and_the_reason_names_the_fastest_better_one() -> None:
    kept = keep(
        [
            variant("top", 190, 10.0),
            variant("mid", 170, 5.0),
            variant("slow", 160, 6.0),
            variant("quick", 180, 4.0),
        ],
        "top",
        1.2,
    )
    assert kept.names == ("top", "quick")
    assert {each.name: each.why for each in kept.dropped} == {
        "mid": "quick is at least as good and as fast",
        "slow": "quick is at least as good and as fast",
    }


def test_the_top_stays_even_if_another_is_better_and_faster() -> None:
    assert names(variant("top", 180, 10.0), variant("lucky", 185, 5.0)) == ("top", "lucky")


def test_of_two_that_are_about_equal_the_faster_one_stays() -> None:
    top = variant("top", 195, 20.0)
    assert names(top, variant("a", 150, 5.0), variant("b", 151, 5.5)) == ("top", "a")
    assert names(top, variant("a", 150, 5.0), variant("b", 151, 6.5)) == ("top", "b", "a")
    assert names(top, variant("a", 150, 5.0), variant("b", 175, 5.5)) == ("top", "b", "a")
    assert names(top, variant("a", 150, 5.0), variant("b", 151, 5.5), faster=1.05) == ("top", "b", "a")


def test_a_variant_about_equal_to_the_top_goes() -> None:
    kept = keep([variant("top", 190, 10.0), variant("int8", 190, 9.5)], "top", 1.2)
    assert kept.names == ("top",)
    assert kept.dropped[0].why == "it is about as fast as top and about as good"


def test_flips_count_both_ways() -> None:
    top, other = variant("top", 100, 1.0), variant("other", 90, 1.0)
    other.rights[150] = True
    assert flips(other, top) == Flips(worse=0.05, better=0.005)


def test_a_difference_is_certain_only_with_enough_prompts() -> None:
    low, high = difference([1.0] * 30 + [0.0] * 10, [0.0] * 40)
    assert 0.5 < low < 0.75 < high < 0.95
    low, high = difference([1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0])
    assert low < 0 < high
    assert difference([1.0, 0.5], [1.0, 0.5]) == (0.0, 0.0)


def test_the_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    from_uniform = [(number * 7919 % 1000) / 1000 for number in range(1000)]
    hits = 0
    for sample in range(100):
        values = from_uniform[sample * 10 : sample * 10 + 10] + from_uniform[(sample * 37) % 960 :][:30]
        found = bootstrap(values, seed=sample)
        hits += found.low <= 0.4995 <= found.high
    assert hits >= 85
    assert bootstrap([]).high == 1.0


def test_a_request_takes_its_prompt_and_one_step_for_each_token() -> None:
    cost = StepCost(base=2.0, per_decode=1.0, per_prefill=0.5, per_key=0.01)
    assert request_ms(cost, 10, 1) == 2.0 + 5.0
    assert request_ms(cost, 10, 5) == 7.0 + 4 * (2.0 + 1.0 + 0.01 * 12)
