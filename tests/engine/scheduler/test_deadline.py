"""The schedule that knows time, through the real loop over the null model in virtual time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from itertools import combinations, pairwise
from math import inf
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.config import Tier
from stretto.engine.core import LoadedModel
from stretto.engine.runners.null import Finished, NullRunner, VirtualClock, null_info
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler import deadline as schedule
from stretto.engine.scheduler.admission import Forecast, predict, snapshot
from stretto.engine.scheduler.estimate import step_limit
from stretto.engine.scheduler.moore_hodgson import tardy_jobs
from stretto.engine.scheduler.plan_builder import nearest_size
from stretto.engine.scheduler.types import Limits, Plan
from stretto.engine.sequence import BEST_EFFORT, TIMED
from stretto.engine.step_time import StepCost, StepTime
from stretto.simulator.harness import World
from stretto.simulator.setting import SMALL_CPU
from stretto.types import Objective, Reason, Request, Sampling

COST = StepCost(base=1.0, per_decode=0.1, per_prefill=0.05, per_key=1e-5, per_pair=1e-6)
TIERS = {
    "priority": Tier(objective=Objective(ttft_ms=100, itl_ms=20), weight=4.0),
    "default": Tier(objective=Objective(ttft_ms=400, itl_ms=40), weight=2.0),
    "flex": Tier(objective=Objective(), weight=1.0),
}


class TwoModels(World):
    """Null models `a` and `b` under one schedule."""

    def __init__(
        self,
        *,
        cost: StepCost = COST,
        blocks: int = 4096,
        running: int = 256,
        name: str = "deadline",
        depth: int = 0,
        runner: Callable[..., NullRunner] = NullRunner,
        saturating: int = 0,
    ) -> None:
        clock = VirtualClock()
        infos = [null_info(name=model, context=blocks * 16, blocks=blocks) for model in "ab"]
        runners = [runner(info, cost=cost, sleep=clock.sleep, depth=depth) for info in infos]
        models = [LoadedModel(each, StepTime(cost, [0.0] * 16, saturating=saturating)) for each in runners]
        super().__init__(clock, models, Limits(running, 512, TIERS), SCHEDULES[name])

    def send(
        self,
        ident: int,
        prompt: int,
        *,
        tier: str = "default",
        tokens: int = 5,
        objective: Objective | None = None,
        tenant: str = "local",
        first: int | None = None,
        expected: int = 0,
    ) -> Request:
        """A request for model `b` when its id is above 1,000, else for `a`. Prompts with one `first` token
        begin alike; those without share nothing."""
        return self.submit(
            Request(
                id=ident,
                model="b" if ident > 1000 else "a",
                prompt=(-ident if first is None else first, *range(prompt - 1)),
                arrival=self.clock(),
                sampling=Sampling(max_tokens=tokens, seed=ident),
                objective=TIERS[tier].objective if objective is None else objective,
                tier=tier,
                tenant=tenant,
                expected_tokens=expected,
            )
        )

    def gaps(self, ident: int) -> list[float]:
        return [(late - early) * 1e3 for early, late in pairwise(self.stamps[ident])]

    def reason(self, ident: int) -> Reason:
        return self.ends[ident].reason

    def late_by(self, ident: int) -> float:
        """Milliseconds by which its latest token was late (negative: early), reckoned from the objective."""
        request, stamps = self.requests[ident], self.stamps.get(ident, [])
        ttft, itl = request.objective.ttft_ms, request.objective.itl_ms
        first = inf if ttft is None else request.arrival * 1e3 + ttft
        dues = [
            first + index * (inf if itl is None else itl) if index else first for index in range(len(stamps))
        ]
        return max((stamp * 1e3 - due for stamp, due in zip(stamps, dues, strict=True)), default=inf)

    def on_time(self, ident: int) -> bool:
        finish = self.ends[ident]
        good = self.late_by(ident) <= 1e-6 and finish.reason is Reason.LENGTH
        assert finish.late is not good or finish.reason is Reason.CANCELLED, (
            "the engine's own verdict differs"
        )
        return good


def four_streams_and_a_long_prompt(name: str) -> World:
    world = TwoModels(cost=SMALL_CPU, name=name)
    objective = Objective(ttft_ms=3000, itl_ms=150)
    for ident in range(1, 5):
        world.send(ident, 40, tokens=150, objective=objective)
    world.run(until=1.5)
    world.send(5, 2000, objective=Objective(ttft_ms=30_000, itl_ms=500))
    world.run()
    return world


def test_a_long_prompt_never_makes_a_stream_pause_longer_than_its_objective():
    world = four_streams_and_a_long_prompt("deadline")
    assert max(max(world.gaps(ident)) for ident in range(1, 5)) <= 150.0 + 1e-6
    assert all(world.on_time(ident) for ident in range(1, 6))


def longest_step(world: World) -> int:
    return max(sum(row.count for row in plan.rows) for plan in world.plans)


def beside_streams(
    prompts: int, objective: Objective, *, cost: StepCost = COST, saturating: int = 128
) -> TwoModels:
    """Eight streams, then prompts of 480 tokens on a device that 128 tokens keep busy."""
    world = TwoModels(cost=cost, saturating=saturating)
    for ident in range(1, 9):
        world.send(ident, 16, tokens=600, objective=Objective(ttft_ms=5000, itl_ms=500), first=-1)
    world.run(until=0.1)
    world.plans.clear()
    for ident in range(11, 11 + prompts):
        world.send(ident, 480, tokens=256, objective=objective)
    world.run(until=world.clock() + 0.4)
    return world


def test_prompts_are_spread_over_steps_that_keep_the_device_busy():
    world = beside_streams(4, Objective(ttft_ms=5000, itl_ms=500))
    assert longest_step(world) == 128
    assert all(world.stamps[ident] for ident in range(11, 15))


@pytest.mark.parametrize(
    ("prompts", "ttft_ms"), [(4, 160), (60, 60_000)], ids=["their deadlines are near", "many wait"]
)
def test_prompts_are_not_spread_when(prompts: int, ttft_ms: float):
    world = beside_streams(prompts, Objective(ttft_ms=ttft_ms, itl_ms=500))
    assert longest_step(world) > 128


def test_prompts_are_read_as_fast_as_answers_end():
    """Prompts have four times as many tokens as answers, and a new one comes when an answer ends. So steps of
    16 streams are all about 64 tokens longer."""
    world = TwoModels(saturating=32)
    sent = 0
    while sent < 80 or not world.engine.idle:
        while sent < 80 and sent - len(world.ends) < 16:
            sent += 1
            world.send(sent, 240, tokens=60, objective=Objective(ttft_ms=60_000, itl_ms=500))
        world.step()
    steps = [sum(row.count for row in plan.rows) for plan in world.plans if plan.rows]
    middle = steps[len(steps) // 3 : -len(steps) // 3]
    assert max(steps) <= 128 and statistics.median(middle) in range(64, 97)
    assert statistics.mean(size < 32 for size in middle) < 0.05, "steps without prompts"


@pytest.mark.parametrize("ttft_ms", [60_000, None], ids=["with a deadline", "without"])
def test_a_longer_queue_is_read_faster(ttft_ms: float | None):
    cost, longest = msgspec.structs.replace(COST, base=10.0), list[int]()
    for prompts in (2, 24, 48):
        objective = Objective(ttft_ms=ttft_ms, itl_ms=500)
        longest.append(longest_step(beside_streams(prompts, objective, cost=cost, saturating=64)))
    assert longest[0] == 64 < longest[1] < longest[2] < 512


@given(tokens=st.floats(1, 1e5))
def test_a_step_of_the_nearest_size_needs_little_more_or_fewer_tokens(tokens: float):
    size = nearest_size(tokens)
    assert size >= 64 and size % 64 == 0
    assert abs(size - tokens) <= max(64, tokens / 8)


def test_a_prompt_alone_is_read_in_long_steps():
    world = TwoModels(saturating=128)
    world.send(1, 2000, tokens=1, objective=Objective(ttft_ms=60_000))
    world.run()
    assert longest_step(world) > 128


def test_first_come_first_served_does():
    world = four_streams_and_a_long_prompt("fcfs")
    assert min(max(world.gaps(ident)) for ident in range(1, 5)) > 1000.0


def test_a_stream_that_was_early_has_earned_slack_and_dues_do_not_move():
    world = TwoModels()
    world.send(1, 10, tokens=30)
    (seq,) = world.engine.models["a"].queues.waiting
    world.step()
    first, gap = seq.deadline.next - 0.04, 0.04
    while not world.engine.idle:
        assert seq.deadline.next == pytest.approx(first + gap * seq.output_len)
        world.step()
    assert world.late_by(1) < -300


def early_streams_and_a_pressed_prompt(ttft_ms: float) -> World:
    """Four streams whose first tokens are due in 40 s, and a prompt that takes 5.8 s alone."""
    world = TwoModels(cost=SMALL_CPU)
    early = Objective(ttft_ms=40_000, itl_ms=200)
    for ident in range(1, 5):
        world.send(ident, 20, tokens=120, objective=early)
    world.run(until=2.0)
    world.send(5, 2000, objective=Objective(ttft_ms=ttft_ms, itl_ms=400))
    world.run()
    return world


def test_streams_that_are_early_pause_longer_for_a_prompt_that_would_be_late():
    """With steps of 200 ms, each with a base of 38 ms, the prompt takes 7.4 s."""
    world = early_streams_and_a_pressed_prompt(6_900)
    assert all(world.on_time(ident) for ident in range(1, 6))
    longest = max(gap for ident in range(1, 5) for gap in world.gaps(ident))
    assert 200 < longest <= step_limit(SMALL_CPU) + 1e-6


def test_streams_that_are_early_keep_their_pace_for_a_prompt_that_has_time():
    world = early_streams_and_a_pressed_prompt(20_000)
    assert all(world.on_time(ident) for ident in range(1, 6))
    assert max(gap for ident in range(1, 5) for gap in world.gaps(ident)) <= 200 + 1e-6


def test_the_weightier_tier_goes_first_and_flex_takes_what_is_left():
    world = TwoModels()
    for ident, tier in ((1, "flex"), (2, "default"), (3, "priority")):
        world.send(ident, 500, tier=tier)
    world.run()
    assert world.stamps[3][0] < world.stamps[2][0] < world.stamps[1][0]


def test_refused_at_once_with_the_time_after_which_it_would_have_been_taken():
    def world_with_work() -> World:
        world = TwoModels()
        for ident in range(1, 9):
            world.send(ident, 800, objective=Objective(ttft_ms=365, itl_ms=40))
        return world

    tight = Objective(ttft_ms=370, itl_ms=40, on_miss="reject")
    world = world_with_work()
    world.run(until=0.005)
    world.send(9, 1000, objective=tight)
    world.run(until=0.05)
    finish = world.ends[9]
    assert finish.reason is Reason.REFUSED and 9 not in world.stamps
    assert finish.retry_after is not None and 0 < finish.retry_after < 1.0
    world.run()
    world = world_with_work()
    world.run(until=0.06 + finish.retry_after)
    world.send(9, 1000, objective=tight)
    world.run()
    assert world.on_time(9)


def test_a_forecast_is_close_to_what_happens_and_says_when_to_try_again():
    def seen(world: World):
        return snapshot(world.engine.context("a"), 0)

    def foretold(request: Request) -> Forecast:
        return predict(request, seen(world), TIERS[request.tier].weight, world.clock())

    world = TwoModels()
    for ident in range(1, 6):
        world.send(ident, 1000)
    world.run(until=0.005)
    asked = msgspec.structs.replace(world.requests[1], id=6, arrival=world.clock())
    told = foretold(asked)
    world.send(6, 1000)
    long = msgspec.structs.replace(asked, prompt=(0,) * 3000, objective=Objective(ttft_ms=200))
    refused = foretold(long)
    never = foretold(msgspec.structs.replace(asked, objective=Objective(ttft_ms=20)))
    short = foretold(msgspec.structs.replace(asked, objective=Objective(total_ms=55)))
    crowd = foretold(msgspec.structs.replace(asked, objective=Objective(itl_ms=1.05)))
    world.run()
    assert told.feasible and told.ttft_ms == pytest.approx(
        (world.stamps[6][0] - asked.arrival) * 1e3, rel=0.15
    )
    assert not refused.feasible and 0.05 <= refused.retry_after < 0.5
    assert not never.feasible and never.retry_after == inf
    assert not short.feasible and not crowd.feasible


def test_no_work_for_a_request_whose_time_is_over():
    world = TwoModels()
    world.send(1, 2000, objective=Objective(ttft_ms=10_000, itl_ms=1000))
    world.run(until=0.01)
    world.send(2, 4000, objective=Objective(total_ms=30))
    world.send(3, 50, tokens=500, objective=Objective(total_ms=60))
    world.run()
    assert world.reason(2) is Reason.DEADLINE and world.reason(3) is Reason.DEADLINE
    assert world.ended_at[2] <= 0.01 + 0.03 + 2 * step_limit(COST) / 1e3
    after = [plan for plan in world.plans if any(seq.request.id == 3 for seq in plan.end)]
    assert len(after) == 1 and not any(row.seq.request.id == 3 for row in after[0].rows)
    assert world.ends[3].output_tokens < 500


def test_a_total_is_kept_by_a_stream_without_other_dues():
    world = TwoModels()
    world.engine.models["a"].history.lengths.observe("default", 100)
    world.send(1, 100, tokens=100, objective=Objective(total_ms=400))
    for ident in range(2, 6):
        world.send(ident, 3000, tier="flex")
    world.run()
    assert world.ended_at[1] <= 0.4 and world.reason(1) is Reason.LENGTH


def test_the_pace_is_that_of_the_answer_that_the_maker_expects():
    world = TwoModels()
    world.engine.models["a"].history.lengths.observe("default", 5)
    world.send(1, 100, tokens=100, objective=Objective(total_ms=400), expected=100)
    for ident in range(2, 6):
        world.send(ident, 3000, tier="flex")
    world.run()
    assert world.ended_at[1] <= 0.4 and world.reason(1) is Reason.LENGTH


def test_what_has_no_due_still_progresses_when_the_rest_is_too_much(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schedule, "PATIENCE_S", 0.2)
    monkeypatch.setattr(schedule, "BREVITY", 1.0)
    world = TwoModels()
    world.send(1, 400, tier="flex", tokens=3)
    for ident in range(2, 400):
        world.run(until=0.02 * (ident - 1))
        world.send(ident, 600)
    assert 1 in world.ends, "a request without a due was starved"
    late = [ident for ident in range(2, 200) if ident not in world.ends or not world.on_time(ident)]
    assert late, "this load was meant to be too much"


def test_one_tenants_burst_does_not_spend_anothers_slack():
    def others(burst: int) -> list[bool]:
        world = TwoModels()
        sent: list[int] = []
        for turn in range(60):
            world.run(until=0.1 * turn)
            for index in range(burst):
                world.send(100 + 10 * turn + index, 700, tenant="greedy")
            world.send(turn + 1, 400, tenant="modest")
            sent.append(turn + 1)
        world.run()
        return [world.on_time(ident) for ident in sent]

    alone, beside = others(0), others(8)
    assert all(alone)
    assert sum(beside[30:]) >= 0.9 * len(beside[30:])


def test_when_streams_crowd_a_step_those_with_slack_wait():
    cost = StepCost(base=1.0, per_decode=1.0, per_prefill=0.01)
    world = TwoModels(cost=cost)
    tight, loose = Objective(ttft_ms=1000, itl_ms=8), Objective(ttft_ms=1000, itl_ms=80)
    for ident in range(1, 4):
        world.send(ident, 4, tokens=40, objective=tight)
    for ident in range(4, 24):
        world.send(ident, 4, tokens=40, objective=loose)
    world.run()
    assert all(max(world.gaps(ident)) <= 8.0 + 1e-6 for ident in range(1, 4))
    assert all(world.on_time(ident) for ident in range(1, 24))


def test_blocks_are_taken_from_the_loosest_never_from_a_tighter_one():
    world = TwoModels(blocks=24)
    preempted: list[tuple[int, int]] = []
    for ident, tier in ((1, "flex"), (2, "default"), (3, "priority")):
        world.send(ident, 100, tier=tier, tokens=60)
    while world.step() or not world.engine.idle:
        plan = world.plans[-1]
        for victim in plan.preempt:
            order = {"priority": 0, "default": 1, "flex": 2}
            running = [row.seq for row in plan.rows]
            preempted.append((victim.request.id, len(running)))
            assert all(order[seq.request.tier] <= order[victim.request.tier] for seq in running)
    assert preempted and all(ident != 3 for ident, _ in preempted)
    assert world.on_time(3) and all(world.reason(ident) is Reason.LENGTH for ident in (1, 2, 3))


def test_those_without_a_due_make_place_for_one_that_has_one():
    world = TwoModels(running=4)
    for ident in range(1, 9):
        world.send(ident, 50, tier="flex", tokens=400)
    world.run(until=0.05)
    world.send(9, 50, tier="priority")
    world.run()
    assert world.on_time(9) and {world.reason(ident) for ident in range(1, 9)} == {Reason.LENGTH}


def test_another_models_prompt_does_not_hold_up_a_stream():
    world = TwoModels(cost=SMALL_CPU)
    world.send(1, 20, tokens=60, objective=Objective(ttft_ms=2000, itl_ms=200))
    world.run(until=0.4)
    world.send(1001, 1500, objective=Objective(ttft_ms=60_000, itl_ms=2000))
    world.send(1002, 1500, tier="flex")
    world.run()
    assert max(world.gaps(1)) <= 200.0 + 1e-6
    assert {world.reason(ident) for ident in (1, 1001, 1002)} == {Reason.LENGTH}


def test_a_step_that_nobody_waits_for_is_short_enough_for_the_next_one():
    world = TwoModels()
    world.send(1, 4000, tier="flex")
    world.run(until=0.03)
    world.send(2, 10, tier="priority")
    sent = world.clock()
    world.run()
    assert world.stamps[2][0] - sent <= 2 * step_limit(COST) / 1e3


jobs = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 12), st.sampled_from([0.0, 1.0])), min_size=1, max_size=8
)


@given(jobs)
def test_as_many_jobs_as_can_be_are_on_time(drawn: list[tuple[int, int, float]]):
    def fits(chosen: tuple[tuple[float, float, float], ...]) -> bool:
        end = 0.0
        for due, seconds, _ in chosen:
            end += seconds
            if end > due:
                return False
        return True

    alike = sorted((float(due), float(seconds), 0.0) for due, seconds, _ in drawn)
    kept = len(alike) - len(tardy_jobs(alike, 0.0)[0])
    assert kept == max(n for n in range(len(alike) + 1) if any(map(fits, combinations(alike, n))))
    mixed = sorted((float(due), float(seconds), worth) for due, seconds, worth in drawn)
    out, _ = tardy_jobs(mixed, 0.0)
    rest = tuple(job for index, job in enumerate(mixed) if index not in out)
    assert fits(rest)


prompts = st.integers(2, 600)
moments = st.integers(0, 400)
loads = st.lists(st.tuples(moments, prompts, st.integers(1, 12)), min_size=1, max_size=12)


def play(load: list[tuple[int, int, int, str, Objective | None]]) -> World:
    world = TwoModels()
    for ident, (at, prompt, tokens, tier, objective) in enumerate(sorted(load, key=lambda one: one[0]), 1):
        world.run(until=at / 1e3)
        world.send(ident, prompt, tokens=tokens, tier=tier, objective=objective)
    world.run()
    return world


@settings(max_examples=60, deadline=None)
@given(loads, loads)
def test_a_hopeless_request_never_makes_another_late(
    good: list[tuple[int, int, int]], hopeless: list[tuple[int, int, int]]
):
    """Whoever was on time alone, with the time of three steps to spare, still is when hopeless ones come."""
    spare = 3 * step_limit(COST)
    sane = [(at, prompt, tokens, "default", None) for at, prompt, tokens in good]
    alone = play(sane)
    never = Objective(ttft_ms=0.5, itl_ms=40, on_miss="late")
    world = TwoModels()
    both = sorted(
        [(one[0], 0, index, one) for index, one in enumerate(sorted(sane, key=lambda one: one[0]), 1)]
    )
    both += [(at, 1, 500 + index, (at, p, n, "default", never)) for index, (at, p, n) in enumerate(hopeless)]
    for at, _, ident, (_, prompt, tokens, tier, objective) in sorted(both, key=lambda one: one[:3]):
        world.run(until=at / 1e3)
        world.send(ident, prompt, tokens=tokens, tier=tier, objective=objective)
    world.run()
    for ident in range(1, len(sane) + 1):
        if alone.on_time(ident) and alone.late_by(ident) < -spare:
            assert world.on_time(ident)
    assert len(world.ends) == len(both)


@settings(max_examples=60, deadline=None)
@given(loads, moments, prompts)
def test_a_priority_request_that_was_promised_is_not_late_for_looser_ones(
    looser: list[tuple[int, int, int]], at: int, prompt: int
):
    """Whatever of less weight is there or comes: admission's promise to the one priority request is kept."""
    load = sorted(looser)
    world = TwoModels()
    promised = False
    for ident, (moment, size, tokens) in enumerate([*load, (10**6, 0, 0)], 1):
        if 999 not in world.requests and moment >= at:
            world.run(until=at / 1e3)
            seen = snapshot(world.engine.context("a"), 0)
            request = world.send(999, prompt, tier="priority", tokens=10)
            promised = predict(request, seen, TIERS["priority"].weight, world.clock()).feasible
        if size:
            world.run(until=moment / 1e3)
            world.send(ident, size, tokens=tokens, tier=("default", "flex")[ident % 2])
    world.run()
    assert not promised or world.on_time(999)


def test_a_stream_that_could_wait_goes_on_with_the_last_block():
    """It leaves its time to prompts that are pressed; what it leaves of the pool is its own again."""
    world = TwoModels(blocks=8, running=1)
    world.send(1, 90, tokens=24, tier="priority", objective=Objective(ttft_ms=6), first=0)
    for ident in range(2, 8):
        world.send(ident, 2, tokens=1, tier="priority", objective=Objective(), first=0)
        if ident < 5:
            world.step()
    world.send(8, 2, tokens=1, tier="priority", objective=Objective(total_ms=23), first=0)
    world.run()
    assert len(world.ends) == 8


def test_tokens_that_take_longer_than_a_step_may_are_run_one_at_a_time():
    """What a step is wrongly believed to take must not keep it from being run."""
    world = TwoModels(cost=StepCost(base=0.5, per_decode=40.0, per_prefill=30.0))
    for ident, tier in enumerate(("default", "flex", "priority"), 1):
        world.send(ident, 4, tokens=3, tier=tier)
    world.run()
    assert len(world.ends) == 3


class Crashing(NullRunner):
    """Fails the steps of these numbers."""

    def __init__(self, *args: Any, failing: frozenset[int], **options: Any) -> None:
        super().__init__(*args, **options)
        self.failing = failing
        self.launched = 0

    def launch(self, plan: Plan) -> Finished:
        self.launched += 1
        if self.launched in self.failing:
            raise RuntimeError("the device is gone")
        return super().launch(plan)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_request_ends_and_no_block_is_lost(data: st.DataObject):
    """Random objectives, tenants, pools, cancels and crashes; the invariants are checked after every step."""
    world = TwoModels(
        blocks=data.draw(st.integers(8, 24)),
        running=data.draw(st.integers(1, 6)),
        depth=data.draw(st.integers(0, 1)),
        runner=partial(Crashing, failing=frozenset(data.draw(st.lists(st.integers(1, 40), max_size=3)))),
    )
    model = world.engine.models["a"]
    limit = st.one_of(st.none(), st.integers(1, 300).map(float))
    objectives = st.builds(
        Objective,
        ttft_ms=limit,
        itl_ms=limit,
        total_ms=limit,
        on_miss=st.sampled_from(["degrade", "reject", "late"]),
    )
    sent = data.draw(st.integers(1, 12))
    for ident in range(1, sent + 1):
        world.send(
            ident,
            data.draw(st.integers(2, 90)),
            tokens=data.draw(st.integers(1, 30)),
            objective=data.draw(objectives),
            tier=data.draw(st.sampled_from(list(TIERS))),
            tenant=data.draw(st.sampled_from(["x", "y"])),
            first=data.draw(st.integers(0, 1)),
        )
        dues: dict[tuple[int, int], float] = {}
        for _ in range(data.draw(st.integers(0, 4))):
            world.step()
            for seq in [*model.queues.running, *model.queues.waiting]:
                due = dues.setdefault((seq.request.id, seq.output_len), seq.deadline.next)
                assert seq.deadline.next <= due, "a due time moved later"
                assert seq.rank.group in (0, TIMED, BEST_EFFORT)
        if data.draw(st.booleans()):
            world.cancel(data.draw(st.integers(1, sent)))
    world.run()
    assert len(world.ends) == sent
    assert model.pool.available == model.pool.total and not model.queues.running and not model.queues.waiting


def test_a_tight_request_is_seen_behind_any_number_of_lighter_ones():
    world = TwoModels()
    for ident in range(1, 200):
        world.send(ident, 50, objective=Objective(ttft_ms=90, itl_ms=1000))
    world.run(until=0.002)
    world.send(999, 50, tier="priority")
    sent = world.clock()
    world.run()
    assert world.on_time(999) and world.stamps[999][0] - sent < 0.05


def test_in_an_overload_a_displaced_request_is_refused_at_once():
    world = TwoModels()
    for ident in (1, 2, 3):
        world.send(ident, 2400)
    world.step()
    assert not world.ends
    world.engine.models["a"].history.arrivals.offer(1.0, 1e6)
    came = world.send(4, 1500, tier="priority").arrival
    world.run()
    displaced = [ident for ident in world.ends if world.reason(ident) is Reason.REFUSED]
    assert displaced and all(world.ends[ident].retry_after for ident in displaced)
    assert all(world.ended_at[ident] - came <= 4 * step_limit(COST) / 1e3 for ident in displaced)
    assert all(world.on_time(ident) for ident in world.ends if ident not in displaced)
