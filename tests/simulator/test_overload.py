"""A minute at twice the peak with the server's default objectives: what is kept, and what is told when."""

from __future__ import annotations

from functools import cache
from math import inf
from random import Random

from stretto.config import TIERS
from stretto.engine.core import LoadedModel
from stretto.engine.runners.null import NullRunner, VirtualClock, null_info
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.lateness import longest_wait_s
from stretto.engine.scheduler.types import Limits
from stretto.engine.step_time import StepTime
from stretto.simulator.overload import OverloadWorld
from stretto.simulator.setting import SMALL_CPU
from stretto.types import Reason, Request, Sampling

PEAK, CALM = 1.65, 1.12  # requests per second: on time at the best load, and outside the overload
BEGIN, END, LAST = 20.0, 80.0, 120.0  # seconds: of the overload, and of the arrivals
PROMPT, OUTPUT = 128, 32


@cache
def played() -> OverloadWorld:
    rng, clock = Random(3), VirtualClock()
    runner = NullRunner(null_info(context=16384, blocks=16384), cost=SMALL_CPU, sleep=clock.sleep)
    model = LoadedModel(runner, StepTime(SMALL_CPU, [0.02] * 16))
    world = OverloadWorld(clock, [model], Limits(256, 512, TIERS), SCHEDULES["deadline"])
    at, ident = 0.0, 0
    while at < LAST:
        at += rng.expovariate(2 * PEAK if BEGIN <= at < END else CALM)
        ident += 1
        tier = rng.choices(["priority", "default", "flex"], [0.2, 0.6, 0.2])[0]
        world.run(until=at)
        world.offer(
            Request(
                id=ident,
                model="null",
                prompt=(ident,) * PROMPT,
                arrival=at,
                sampling=Sampling(max_tokens=OUTPUT, seed=ident),
                objective=TIERS[tier].objective,
                tier=tier,
            )
        )
    world.run()
    return world


def test_nobody_who_is_admitted_waits_beyond_the_bound():
    for one in played().outcomes():
        if one.reason is not Reason.REFUSED:
            ttft_s = (one.request.objective.ttft_ms or inf) / 1e3
            alone_ms = SMALL_CPU.base + SMALL_CPU.prefill(0, PROMPT)
            assert one.first - one.request.arrival <= longest_wait_s(ttft_s, alone_ms) + 1.0


def test_the_machine_goes_on_answering_on_time():
    """`fcfs` has nearly nobody on time once its queue is longer than the objective."""
    good = [one for one in played().outcomes() if one.good and BEGIN <= one.last < END]
    assert len(good) >= 0.9 * PEAK * (END - BEGIN)
    assert all(one.good for one in played().outcomes() if one.request.tier == "priority")


def test_a_refusal_comes_at_once_and_whoever_is_admitted_is_served():
    """Once half of the refusals came after up to 19.8 s: the queue was as long as the objective allows, and
    each wrong estimate then displaced somebody."""
    refusals = list(played().refusals.values())
    assert len(refusals) >= 30, "this load was meant to be too much"
    assert sum(each.after_s == 0 for each in refusals) >= 0.99 * len(refusals)
    served = [one for one in played().outcomes() if one.request.id not in played().refusals]
    assert all(one.reason is Reason.LENGTH for one in served)
    assert sum(one.good for one in served) >= 0.97 * len(served)


def test_the_queue_is_short_once_newcomers_are_refused():
    """A long one would serve no more of them, and those who come after the overload would still find it."""
    first = min(each.at for each in played().refusals.values())
    begun = [one for one in played().outcomes() if one.request.arrival > first + 5.0 and one.count]
    waits = [one.first - one.request.arrival for one in begun if one.request.tier != "flex"]
    objective_s = (TIERS["default"].objective.ttft_ms or inf) / 1e3
    assert len(waits) > 50 and max(waits) < objective_s / 2
    after = [
        one.first - one.request.arrival
        for one in begun
        if END + 5.0 < one.request.arrival and one.request.tier != "flex"
    ]
    assert max(after) < 3.0, "an idle machine takes 0.4 s"


def test_the_engine_counts_what_was_refused_before_it_came():
    """Otherwise it would see only as much as it can do, and believe that all is well."""
    clock = VirtualClock()
    runner = NullRunner(null_info(), cost=SMALL_CPU, sleep=clock.sleep)
    model = LoadedModel(runner, StepTime(SMALL_CPU))
    world = OverloadWorld(clock, [model], Limits(256, 512, TIERS), SCHEDULES["deadline"])
    arrivals = world.engine.models["null"].history.arrivals
    assert not arrivals.turns_away(clock())
    world.engine.turn_away("null", 2.0, 5_000.0)
    recent = arrivals.recent((4.0, 2.0, 0.0))
    assert recent[2.0] == recent[0.0] > 0 == recent[4.0]
    assert arrivals.turns_away(clock()) == (2.0,)
    clock.sleep(60.0)
    arrivals.fade(clock())
    assert not arrivals.turns_away(clock()) and arrivals.recent((2.0,))[2.0] < 0.01


def test_retry_after_is_right_within_a_factor_of_two():
    refusals = list(played().refusals.values())
    assert all(each.told_s > 0 for each in refusals)
    assert sum(each.right for each in refusals) >= 0.9 * len(refusals)


def test_all_is_normal_five_seconds_after_the_overload():
    assert all(one.good for one in played().outcomes() if one.request.arrival > END + 5.0)
