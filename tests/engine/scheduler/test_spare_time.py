"""Prompts that are computed without an answer, and requests that run in spare time only, in virtual time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.engine.core import LoadedModel
from stretto.engine.runners.null import NullRunner, VirtualClock, null_info
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.admission import predict, snapshot
from stretto.engine.scheduler.types import Limits
from stretto.engine.step_time import StepCost, StepTime
from stretto.simulator.harness import World
from stretto.simulator.setting import SMALL_CPU
from stretto.types import Objective, Reason, Request, Sampling

COST = StepCost(base=1.0, per_decode=0.1, per_prefill=0.05, per_key=1e-5, per_pair=1e-6)
READ = Sampling(max_tokens=0)
LATE = Objective(on_miss="late")
BOTH = pytest.mark.parametrize("name", ["fcfs", "deadline"])


class Engine(World):
    """Null models `a` and `b` under one schedule. Steps take exactly what the step-time model says."""

    def __init__(
        self,
        *,
        name: str = "deadline",
        cost: StepCost = COST,
        blocks: int = 1024,
        running: int = 32,
        depth: int = 0,
    ) -> None:
        clock = VirtualClock()
        infos = [null_info(name=model, context=blocks * 16, blocks=blocks) for model in "ab"]
        runners = [NullRunner(info, cost=cost, sleep=clock.sleep, depth=depth) for info in infos]
        models = [LoadedModel(each, StepTime(cost, [0.0] * 16)) for each in runners]
        super().__init__(clock, models, Limits(running, 512), SCHEDULES[name])

    def send(self, ident: int, prompt: list[int], *, model: str = "a", **rest: Any) -> None:
        rest = {"sampling": Sampling(max_tokens=20, seed=ident), "objective": LATE} | rest
        self.submit(Request(id=ident, model=model, prompt=tuple(prompt), arrival=self.clock(), **rest))

    def read(self, ident: int, prompt: list[int], **rest: Any) -> None:
        self.send(ident, prompt, sampling=READ, spare_time=True, **rest)

    @property
    def prefilled(self) -> int:
        return sum(step.prefill_tokens for step in self.steps)


@BOTH
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("spare", [True, False])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 700])
def test_a_prompt_without_an_answer_is_computed_once(name: str, depth: int, spare: bool, length: int):
    world = Engine(name=name, depth=depth)
    prompt = list(range(length))
    world.send(1, prompt, sampling=READ, spare_time=spare)
    world.run()
    end = world.ends[1]
    assert (end.reason, end.prompt_tokens, end.output_tokens) == (Reason.LENGTH, length, 0)
    assert world.tokens(1) == []
    assert world.prefilled == length
    assert not any(row.draw for plan in world.plans for row in plan.rows), "no logits are computed"
    world.send(2, [*prompt, 7, 8])
    world.run()
    assert world.ends[2].cached_tokens == length // 16 * 16, "its full blocks stay"


def test_a_prompt_without_an_answer_has_a_deadline_like_any_other():
    world = Engine()
    world.send(1, [1] * 400, sampling=READ, objective=Objective(ttft_ms=1000.0))
    world.send(2, [2] * 400, sampling=READ, objective=Objective(ttft_ms=1.0, on_miss="late"))
    world.run()
    assert (world.ends[1].late, world.ends[2].late) == (False, True)
    assert world.engine.models["a"].history.lengths.predict("default") == 256, "it is no short answer"


@BOTH
def test_what_runs_in_spare_time_delays_a_newcomer_by_one_short_step(name: str):
    world = Engine(name=name)
    world.read(1, [1] * 8000)
    world.run(until=0.0215)
    assert world.prefilled > 0
    longest = max(step.ms for step in world.steps)
    assert longest <= 6 * COST.base + 1e-6
    sent = world.clock()
    world.send(2, [2] * 100)
    world.run()
    alone = Engine(name=name)
    alone.send(2, [2] * 100)
    alone.run()
    delay = world.stamps[2][0] - sent - alone.stamps[2][0]
    assert delay <= longest / 1e3 + 1e-9
    assert world.ended_at[1] > world.ended_at[2]


@BOTH
@pytest.mark.parametrize("cost", [COST, SMALL_CPU, StepCost(base=5.0, per_decode=0.05, per_prefill=0.01)])
def test_streams_do_not_notice_what_runs_in_spare_time(name: str, cost: StepCost):
    gaps: list[list[float]] = []
    for reads in (0, 4):
        world = Engine(name=name, cost=cost)
        for ident in range(1, 5):
            world.send(ident, [ident] * 50, sampling=Sampling(max_tokens=200, seed=ident))
        world.run(until=10 * cost.base / 1e3)
        for ident in range(11, 11 + reads):
            world.read(ident, [ident] * 1000)
        world.run()
        gaps.append(
            [later - sooner for ident in range(1, 5) for sooner, later in pairwise(world.stamps[ident])]
        )
        assert len(world.ends) == 4 + reads
    assert max(gaps[1]) <= 1.02 * max(gaps[0]) + 1e-9
    assert sum(gaps[1]) <= 1.02 * sum(gaps[0]) + 1e-9


def test_a_fast_machine_reads_beside_streams():
    world = Engine(cost=StepCost(base=5.0, per_decode=0.05, per_prefill=0.01))
    world.send(1, [1] * 50, sampling=Sampling(max_tokens=500, seed=1))
    world.read(2, [2] * 1000)
    world.run()
    assert world.ended_at[2] < world.ended_at[1]


def test_no_step_with_a_prompt_is_shared_and_no_turn_of_another_model_is_taken():
    world = Engine()
    world.read(1, [1] * 3000)
    world.read(2, [2] * 3000, model="b")
    world.send(3, [3] * 2000)
    world.run()
    steps = [{row.seq.request.id for row in plan.rows} for plan in world.plans]
    prompts = [{row.seq.request.id for row in plan.rows if not row.decodes} for plan in world.plans]
    assert all(len(step) <= 1 for step in prompts)
    last = max(at for at, step in enumerate(steps) if 3 in step)
    assert min(at for at, step in enumerate(steps) if 2 in step) > last, "the machine was not idle before"
    assert len(world.ends) == 3


@BOTH
def test_blocks_and_slots_of_spare_time_go_to_whoever_needs_them(name: str):
    world = Engine(name=name, blocks=64, running=2)
    world.read(1, [1] * 400)
    world.read(2, [2] * 400)
    world.run(until=0.004)
    world.send(3, [3] * 500)
    world.send(4, [4] * 400)
    world.run()
    assert len(world.ends) == 4
    assert world.ends[3].preemptions == world.ends[4].preemptions == 0
    assert max(world.ended_at[3], world.ended_at[4]) < min(world.ended_at[1], world.ended_at[2])


@BOTH
def test_nobody_waits_for_a_block_that_spare_time_computes(name: str):
    world = Engine(name=name)
    world.read(1, [1] * 4000)
    world.run(until=0.02)
    world.send(2, [1] * 4000)
    world.send(3, [1] * 4000, objective=Objective(ttft_ms=1000.0))
    world.run()
    assert world.ended_at[2] < world.ended_at[1]
    assert 0 < world.ends[2].cached_tokens < 4000
    assert not world.ends[3].late


def test_spare_time_never_goes_first_however_long_it_waits():
    world = Engine()
    world.read(1, [1] * 100)
    for ident in range(2, 40):
        world.send(ident, [ident] * 1000, sampling=Sampling(max_tokens=1000, seed=ident))
    world.run(until=2000.0)
    assert world.ended_at[1] > max(world.ended_at[ident] for ident in range(2, 40)) - 3.0
    assert all(
        not row.seq.request.spare_time or row.seq.rank.group == 3 for p in world.plans for row in p.rows
    )


def test_a_prompt_that_was_read_can_keep_a_deadline_that_it_could_not_keep_whole():
    tight = Objective(ttft_ms=20.0, on_miss="reject")
    for read, cached in ((0, 0), (0, 976), (976, 0), (976, 976)):
        world = Engine()
        world.read(1, [1] * (read or 1))
        world.run()
        request = Request(
            id=2,
            model="a",
            prompt=(1,) * 1000,
            arrival=world.clock(),
            sampling=Sampling(max_tokens=3),
            objective=tight,
            cached=cached,
        )
        seen = snapshot(world.engine.context("a"), 1)
        assert predict(request, seen, 1.0, world.clock()).feasible == bool(cached)
        world.submit(request)
        world.run()
        # The engine looks into its cache itself, whatever was expected.
        reason = Reason.LENGTH if read else Reason.REFUSED
        assert (world.ends[2].reason, world.ends[2].late) == (reason, not read)


@BOTH
def test_a_cancelled_reading_costs_no_further_step(name: str):
    world = Engine(name=name)
    world.read(1, [1] * 5000)
    world.run(until=0.01)
    steps, prefilled = len(world.steps), world.prefilled
    world.cancel(1)
    world.run()
    assert (len(world.steps), world.prefilled) == (steps, prefilled)
    assert world.ends[1].reason == Reason.CANCELLED
    world.send(2, [1] * 5000)
    world.run()
    assert world.ends[2].cached_tokens == prefilled // 16 * 16, "what was read is kept"


@BOTH
def test_tenants_pay_nothing_for_spare_time(name: str):
    world = Engine(name=name)
    world.read(1, [1] * 1000)
    world.run()
    assert world.engine.models["a"].history.fairness.debts == {}
    assert world.engine.models["a"].history.arrivals.offered == 0.0


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 300), st.booleans(), st.booleans(), st.sampled_from("ab"), st.integers(0, 30)
        ),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from(["fcfs", "deadline"]),
    st.sampled_from([0, 1]),
)
def test_every_mixture_ends(load: list[tuple[int, bool, bool, str, int]], name: str, depth: int):
    world = Engine(name=name, blocks=32, running=3, depth=depth)
    for ident, (length, spare, reads, model, wait) in enumerate(load, 1):
        sampling = READ if reads else Sampling(max_tokens=10, seed=ident)
        world.send(ident, [ident % 3] * length, model=model, sampling=sampling, spare_time=spare)
        world.run(until=world.clock() + wait / 1e4)
    world.run()
    assert len(world.ends) == len(load)
    for ident, (_, _, reads, _, _) in enumerate(load, 1):
        assert len(world.tokens(ident)) == (0 if reads else 10)
