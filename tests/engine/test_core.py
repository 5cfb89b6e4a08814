"""The loop and its schedule over the null model, in virtual time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.engine.core import EngineCore, LoadedModel
from stretto.engine.runners.null import Finished, NullRunner, VirtualClock, null_info
from stretto.engine.scheduler.fcfs import fcfs
from stretto.engine.scheduler.types import Limits, Plan
from stretto.engine.sequence import Drawn, Sequence
from stretto.engine.step_time import StepCost
from stretto.types import Reason, Request, Sampling, StepStats, TokenEvent

COST = StepCost(base=1.0, per_decode=0.1, per_prefill=0.05)


class World:
    """An engine of null models, its clock, and everything it said."""

    def __init__(self, *, blocks: int = 64, running: int = 8, step_tokens: int = 64, depth: int = 0) -> None:
        self.clock = VirtualClock()
        self.events: list[TokenEvent] = []
        self.steps: list[StepStats] = []
        self.plans: list[Plan] = []
        self.engine = EngineCore(
            [LoadedModel(self._runner(name, blocks, depth)) for name in ("a", "b")],
            limits=Limits(running, step_tokens),
            schedule=self._schedule,
            clock=self.clock,
            emit=self._heard,
        )

    def _runner(self, name: str, blocks: int, depth: int) -> NullRunner:
        info = null_info(name=name, context=blocks * 16, blocks=blocks)
        return NullRunner(info, cost=COST, sleep=self.clock.sleep, depth=depth)

    def _schedule(self, *args: object) -> Plan:
        plan = fcfs(*args)  # type: ignore[arg-type]
        self.plans.append(plan)
        return plan

    def _heard(self, events: list[TokenEvent], stats: StepStats | None) -> None:
        self.events += events
        if stats is not None:
            self.steps.append(stats)

    def submit(self, ident: int, prompt: list[int], *, model: str = "a", **sampling: object) -> None:
        request = Request(
            id=ident,
            model=model,
            prompt=tuple(prompt),
            arrival=self.clock(),
            sampling=Sampling(**{"max_tokens": 5, "seed": ident, **sampling}),  # type: ignore[arg-type]
        )
        self.engine.submit(Sequence.of(request, self.engine.models[model].runner.info.context))

    def finish(self) -> None:
        while self.engine.step() or not self.engine.idle:
            self.engine.check()

    def tokens(self, ident: int) -> list[int]:
        return [event.token for event in self.events if event.id == ident and event.token is not None]

    def end(self, ident: int):
        (event,) = [event for event in self.events if event.id == ident and event.finish is not None]
        return event.finish


def test_a_request_runs_to_its_limit_and_says_what_it_used():
    world = World()
    world.submit(1, list(range(40)), max_tokens=7)
    world.finish()
    end = world.end(1)
    assert (end.reason, end.prompt_tokens, end.output_tokens) == (Reason.LENGTH, 40, 7)
    assert len(world.tokens(1)) == 7
    assert world.engine.models["a"].pool.available == 64


@pytest.mark.parametrize("depth", [0, 1])
def test_tokens_do_not_depend_on_what_shares_the_step(depth: int):
    alone: dict[int, list[int]] = {}
    for ident in range(1, 7):
        world = World()
        world.submit(ident, list(range(ident * 9)), max_tokens=20)
        world.finish()
        alone[ident] = world.tokens(ident)
    world = World(blocks=8, running=4, step_tokens=16, depth=depth)
    for ident in range(1, 7):
        world.submit(ident, list(range(ident * 9)), max_tokens=20)
    world.finish()
    assert {ident: world.tokens(ident) for ident in alone} == alone
    assert any(plan.preempt for plan in world.plans)


def test_a_long_prompt_is_read_in_chunks_beside_running_decodes():
    world = World(step_tokens=32)
    world.submit(1, [1] * 8, max_tokens=30)
    world.engine.step()
    world.submit(2, [2] * 200)
    while len(world.tokens(2)) == 0:
        before = len(world.tokens(1))
        world.engine.step()
        assert len(world.tokens(1)) == before + 1
    assert all(step.decode_tokens + step.prefill_tokens <= 32 for step in world.steps)


def test_equal_prompts_that_arrive_together_are_read_once():
    world = World(running=8, step_tokens=512)
    for ident in range(1, 5):
        world.submit(ident, list(range(100)))
    world.finish()
    assert world.end(1).cached_tokens == 0
    assert [world.end(ident).cached_tokens for ident in (2, 3, 4)] == [96, 96, 96]
    assert sum(step.prefill_tokens for step in world.steps) == 100 + 3 * 4


def test_tenants_share_no_prefix():
    world = World()
    for ident, tenant in ((1, "x"), (2, "y"), (3, "x")):
        request = Request(
            id=ident,
            model="a",
            prompt=tuple(range(64)),
            arrival=0.0,
            tenant=tenant,
            sampling=Sampling(max_tokens=2),
        )
        world.engine.submit(Sequence.of(request, 1024))
        world.finish()
    assert [world.end(ident).cached_tokens for ident in (1, 2, 3)] == [0, 0, 48]


def test_models_take_turns():
    world = World()
    for ident in range(1, 9):
        world.submit(ident, [ident] * 10, model="ab"[ident % 2], max_tokens=10)
    world.finish()
    names = [step.model for step in world.steps]
    assert names[:8] == ["a", "b"] * 4 and {world.end(ident).reason for ident in range(1, 9)} == {
        Reason.LENGTH
    }


def test_a_cancel_ends_a_request_within_a_step_and_frees_its_blocks():
    world = World()
    world.submit(1, [1] * 40, max_tokens=500)
    world.submit(2, [2] * 40, max_tokens=6)
    world.engine.step()
    world.engine.cancel(1)
    seen = len(world.tokens(1))
    world.engine.cancel(1)
    world.finish()
    assert world.end(1).reason is Reason.CANCELLED and len(world.tokens(1)) == seen
    assert world.end(2).reason is Reason.LENGTH


class BrokenRunner(NullRunner):
    """Fails every step that holds request 13; answers NaN for request 14; ends request 15 with its EOS."""

    def launch(self, plan: Plan) -> Finished:
        idents = [row.seq.request.id for row in plan.rows if row.draw]
        if 13 in idents:
            raise RuntimeError("no more memory")
        drawn = super().launch(plan).drawn
        special = {14: Drawn(-1), 15: Drawn(3)}
        return Finished([special.get(ident, result) for ident, result in zip(idents, drawn, strict=True)])


def test_a_failing_step_ends_only_its_requests(caplog: pytest.LogCaptureFixture):
    world = World()
    lane = world.engine.models["a"]
    lane.runner = BrokenRunner(lane.runner.info, sleep=world.clock.sleep)
    lane.runner.eos = frozenset({3})
    world.submit(13, [1] * 4)
    world.finish()
    world.submit(14, [1] * 4)
    world.submit(15, [1] * 4)
    world.submit(16, [1] * 4)
    world.finish()
    assert world.end(13).reason is Reason.ERROR and "no more memory" in world.end(13).error
    assert world.end(14).reason is Reason.ERROR and "NaN" in world.end(14).error
    assert (world.end(15).reason, world.end(15).stop_token) == (Reason.STOP, 3)
    assert world.end(16).reason is Reason.LENGTH
    assert "a step of a failed" in caplog.text


def test_min_tokens_and_ignore_eos_hold_back_the_end():
    for sampling, reason, count in (
        ({"min_tokens": 3}, Reason.STOP, 3),
        ({"ignore_eos": True}, Reason.LENGTH, 5),
        ({"ignore_eos": True, "stop_token_ids": (3,)}, Reason.STOP, 0),
    ):
        world = World()
        lane = world.engine.models["a"]
        lane.runner = BrokenRunner(lane.runner.info, sleep=world.clock.sleep)
        lane.runner.eos = frozenset({3})
        world.submit(15, [1] * 4, **sampling)
        world.finish()
        assert (world.end(15).reason, len(world.tokens(15))) == (reason, count)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_request_ends_and_no_block_is_lost(data: st.DataObject):
    """Random arrivals, cancels and pool sizes; the invariants are checked after every step."""
    depth = data.draw(st.integers(0, 1))
    world = World(blocks=data.draw(st.integers(8, 24)), running=data.draw(st.integers(1, 6)), depth=depth)
    world.engine._limits = Limits(world.engine._limits.max_running, data.draw(st.integers(1, 50)))
    sent = data.draw(st.integers(1, 12))
    for ident in range(1, sent + 1):
        start = data.draw(st.integers(0, 1))
        length = data.draw(st.integers(1, 90))
        world.submit(
            ident,
            list(range(start, start + length)),
            model="ab"[ident % 2],
            max_tokens=data.draw(st.integers(1, 30)),
        )
        for _ in range(data.draw(st.integers(0, 4))):
            world.engine.step()
            world.engine.check()
        if data.draw(st.booleans()):
            world.engine.cancel(data.draw(st.integers(1, sent)))
            world.engine.check()
    world.finish()
    for ident in range(1, sent + 1):
        end = world.end(ident)
        assert end.reason in (Reason.LENGTH, Reason.CANCELLED)
        if end.reason is Reason.LENGTH:
            assert end.output_tokens == len(world.tokens(ident))
    for lane in world.engine.models.values():
        assert lane.pool.available == lane.pool.total
