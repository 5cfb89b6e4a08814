"""A minute at twice the peak with the server's default objectives: what is kept, and what is told when."""

from __future__ import annotations

from functools import cache
from math import inf
from random import Random

from stretto.config import TIERS
from stretto.engine.core import LoadedModel
from stretto.engine.runners.null import NullRunner, VirtualClock, null_info
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.estimate import step_limit
from stretto.engine.scheduler.lateness import longest_wait_s
from stretto.engine.scheduler.types import Limits
from stretto.engine.step_time import StepTime
from stretto.simulator.overload import OverloadWorld
from stretto.simulator.setting import SMALL_CPU
from stretto.types import Reason, Request, Sampling

FULL, CALM = 2.25, 0.5  # requests per second that `fcfs` completes; load outside the overload
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
        at += rng.expovariate(FULL * (2.0 if BEGIN <= at < END else CALM))
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
    assert len(good) >= 0.6 * FULL * (END - BEGIN)
    assert all(one.good for one in played().outcomes() if one.request.tier == "priority")


def test_most_refusals_come_at_once_and_all_before_the_end_of_the_step_in_which_the_deadline_passes():
    refusals = list(played().refusals.values())
    assert len(refusals) >= 30, "this load was meant to be too much"
    assert sum(each.after_s == 0 for each in refusals) >= 0.5 * len(refusals)
    latest_ms = [(each.request.objective.ttft_ms or inf) + step_limit(SMALL_CPU) for each in refusals]
    assert all(each.after_s * 1e3 <= latest for each, latest in zip(refusals, latest_ms, strict=True))


def test_retry_after_is_right_within_a_factor_of_two():
    refusals = list(played().refusals.values())
    assert all(each.told_s > 0 for each in refusals)
    assert sum(each.right for each in refusals) >= 0.9 * len(refusals)


def test_all_is_normal_five_seconds_after_the_overload():
    assert all(one.good for one in played().outcomes() if one.request.arrival > END + 5.0)
