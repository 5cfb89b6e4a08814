"""A peak in virtual time: the choice among all variants against each variant alone."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from benchmarks.feedback import drawn
from benchmarks.known import Asked, KnownLadder, asked_of, by_chance, scaled, tight_tiers
from benchmarks.ladder import OURS, Tally, Trial

PROMPT, TOKENS = 1000, 60


def peak(ladder: KnownLadder) -> list[Asked]:
    """Long prompts: first some that the top can do, then more than all but two variants can."""
    rng, tiers = Random("peak"), tight_tiers(list(ladder.costs.values())[1])
    prompt_s = [cost.prefill(0, PROMPT) / 1e3 for cost in ladder.costs.values()]
    at, made = 0.0, list[Asked]()
    for number in range(140):
        at += rng.expovariate(0.3 / prompt_s[0] if number < 20 else 0.7 / prompt_s[-2])
        tier = "priority" if number % 4 == 0 else "default"
        one = asked_of(ladder, number, at, tiers[tier].objective, tier)
        made.append(replace(one, prompt_tokens=PROMPT, tokens=(TOKENS,) * len(ladder.costs)))
    return made


def test_at_a_peak_the_choice_has_nearly_the_goodput_of_the_best_variant_at_more_quality() -> None:
    slow = by_chance(drawn())
    ladder = replace(slow, costs={name: scaled(cost, 0.02) for name, cost in slow.costs.items()})
    tiers, load = tight_tiers(list(ladder.costs.values())[1]), peak(ladder)
    found: dict[str, Tally] = {
        policy: Trial(policy, ladder, tiers, 0.05, TOKENS).run(load) for policy in (OURS, *ladder.costs)
    }
    ours = found.pop(OURS)
    best = max(found.values(), key=lambda each: each.goodput)
    assert ours.goodput >= 0.92 * best.goodput, (ours, best)
    assert ours.quality > best.quality
    assert min(each.goodput for each in found.values()) < 0.7 * best.goodput, "it is an overload for the top"
