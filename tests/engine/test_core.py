"""The loop and its schedule over the null model, in virtual time."""

# pyright: reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.engine.core import LoadedModel
from stretto.engine.runners.null import Finished, NullRunner, VirtualClock, null_info
from stretto.engine.scheduler.admission import snapshot
from stretto.engine.scheduler.deadline import deadline
from stretto.engine.scheduler.fcfs import fcfs
from stretto.engine.scheduler.types import Limits, Plan
from stretto.engine.sequence import Drawn, Sequence
from stretto.engine.step_time import StepCost, StepTime
from stretto.simulator.harness import World
from stretto.types import Objective, Reason, Request, Sampling, cache_salt

COST = StepCost(base=1.0, per_decode=0.1, per_prefill=0.05)


class TwoModels(World):
    """Null models `a` and `b` under `fcfs`."""

    def __init__(
        self,
        *,
        blocks: int = 64,
        running: int = 8,
        step_tokens: int = 64,
        depth: int = 0,
        runner: type[NullRunner] = NullRunner,
    ) -> None:
        clock = VirtualClock()
        infos = [null_info(name=name, context=blocks * 16, blocks=blocks) for name in "ab"]
        models = [LoadedModel(runner(info, cost=COST, sleep=clock.sleep, depth=depth)) for info in infos]
        super().__init__(clock, models, Limits(running, step_tokens), fcfs)

    def send(self, ident: int, prompt: list[int], *, model: str = "a", **sampling: object) -> None:
        request = Request(
            id=ident,
            model=model,
            prompt=tuple(prompt),
            arrival=self.clock(),
            sampling=Sampling(**{"max_tokens": 5, "seed": ident, **sampling}),  # type: ignore[arg-type]
        )
        self.submit(request)


def test_a_request_runs_to_its_limit_and_says_what_it_used():
    world = TwoModels()
    world.send(1, list(range(40)), max_tokens=7)
    world.run()
    end = world.ends[1]
    assert (end.reason, end.prompt_tokens, end.output_tokens) == (Reason.LENGTH, 40, 7)
    assert len(world.tokens(1)) == 7
    assert world.engine.models["a"].pool.available == 64


@pytest.mark.parametrize("depth", [0, 1])
def test_tokens_do_not_depend_on_what_shares_the_step(depth: int):
    alone: dict[int, list[int]] = {}
    for ident in range(1, 7):
        world = TwoModels()
        world.send(ident, list(range(ident * 9)), max_tokens=20)
        world.run()
        alone[ident] = world.tokens(ident)
    world = TwoModels(blocks=8, running=4, step_tokens=16, depth=depth)
    for ident in range(1, 7):
        world.send(ident, list(range(ident * 9)), max_tokens=20)
    world.run()
    assert {ident: world.tokens(ident) for ident in alone} == alone
    assert any(plan.preempt for plan in world.plans)


def test_a_long_prompt_is_read_in_chunks_beside_running_decodes():
    world = TwoModels(step_tokens=32)
    world.send(1, [1] * 8, max_tokens=30)
    world.step()
    world.send(2, [2] * 200)
    while len(world.tokens(2)) == 0:
        before = len(world.tokens(1))
        world.step()
        assert len(world.tokens(1)) == before + 1
    assert all(step.decode_tokens + step.prefill_tokens <= 32 for step in world.steps)


def test_equal_prompts_that_arrive_together_are_read_once():
    world = TwoModels(running=8, step_tokens=512)
    for ident in range(1, 5):
        world.send(ident, list(range(100)))
    world.run()
    assert world.ends[1].cached_tokens == 0
    assert [world.ends[ident].cached_tokens for ident in (2, 3, 4)] == [96, 96, 96]
    assert sum(step.prefill_tokens for step in world.steps) == 100 + 3 * 4


def test_tenants_share_no_prefix():
    world = TwoModels()
    for ident, tenant in ((1, "x"), (2, "y"), (3, "x")):
        request = Request(
            id=ident,
            model="a",
            prompt=tuple(range(64)),
            arrival=0.0,
            tenant=tenant,
            sampling=Sampling(max_tokens=2),
        )
        world.submit(request)
        world.run()
    assert [world.ends[ident].cached_tokens for ident in (1, 2, 3)] == [0, 0, 48]


def test_models_take_turns():
    world = TwoModels()
    for ident in range(1, 9):
        world.send(ident, [ident] * 10, model="ab"[ident % 2], max_tokens=10)
    world.run()
    names = [step.model for step in world.steps]
    assert names[:8] == ["a", "b"] * 4 and {world.ends[ident].reason for ident in range(1, 9)} == {
        Reason.LENGTH
    }


def test_a_cancel_ends_a_request_within_a_step_and_frees_its_blocks():
    world = TwoModels()
    world.send(1, [1] * 40, max_tokens=500)
    world.send(2, [2] * 40, max_tokens=6)
    world.step()
    world.cancel(1)
    seen = len(world.tokens(1))
    world.cancel(1)
    world.run()
    assert world.ends[1].reason is Reason.CANCELLED and len(world.tokens(1)) == seen
    assert world.ends[2].reason is Reason.LENGTH


class BrokenRunner(NullRunner):
    """Fails every step that holds request 13; answers NaN for request 14; ends request 15 with its EOS."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.eos = frozenset({3})

    def launch(self, plan: Plan) -> Finished:
        idents = [row.seq.request.id for row in plan.rows if row.draw]
        if 13 in idents:
            raise RuntimeError("no more memory")
        drawn = super().launch(plan).drawn
        special = {14: Drawn(-1), 15: Drawn(3), 17: Drawn(-1, embedding=(1.0, float("nan")))}
        return Finished([special.get(ident, result) for ident, result in zip(idents, drawn, strict=True)])


def test_a_failing_step_ends_only_its_requests(caplog: pytest.LogCaptureFixture):
    world = TwoModels(runner=BrokenRunner)
    world.send(13, [1] * 4)
    world.run()
    world.send(14, [1] * 4)
    world.send(15, [1] * 4)
    world.send(16, [1] * 4)
    world.send(17, [1] * 4)
    world.run()
    assert world.ends[17].reason is Reason.ERROR and "NaN" in world.ends[17].error, "an embedding"
    assert world.ends[13].reason is Reason.ERROR and "no more memory" in world.ends[13].error
    assert world.ends[14].reason is Reason.ERROR and "NaN" in world.ends[14].error
    assert (world.ends[15].reason, world.ends[15].stop_token) == (Reason.STOP, 3)
    assert world.ends[16].reason is Reason.LENGTH
    assert "a step of a failed" in caplog.text


class BrokenGrammar:
    """A grammar whose `accept` has a bug."""

    error = None
    finished = False

    def accept(self, token: int) -> bool:
        raise RuntimeError("a bug")


def test_an_exception_for_one_sequence_ends_it_alone(caplog: pytest.LogCaptureFixture):
    world = TwoModels()
    world.send(1, [1] * 4)
    request = Request(id=2, model="a", prompt=(1, 2), arrival=0.0, sampling=Sampling(max_tokens=5))
    world.engine.submit(Sequence.of(request, 100, BrokenGrammar()))
    world.send(3, [1] * 4)
    world.run()
    assert world.ends[2].reason is Reason.ERROR and "a bug" in world.ends[2].error
    assert world.ends[1].reason is world.ends[3].reason is Reason.LENGTH


def test_min_tokens_and_ignore_eos_hold_back_the_end():
    for sampling, reason, count in (
        ({"min_tokens": 3}, Reason.STOP, 3),
        ({"ignore_eos": True}, Reason.LENGTH, 5),
        ({"ignore_eos": True, "stop_token_ids": (3,)}, Reason.STOP, 0),
    ):
        world = TwoModels(runner=BrokenRunner)
        world.send(15, [1] * 4, **sampling)
        world.run()
        assert (world.ends[15].reason, len(world.tokens(15))) == (reason, count)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_request_ends_and_no_block_is_lost(data: st.DataObject):
    """Random arrivals, cancels and pool sizes; the invariants are checked after every step."""
    depth = data.draw(st.integers(0, 1))
    world = TwoModels(
        blocks=data.draw(st.integers(8, 24)),
        running=data.draw(st.integers(1, 6)),
        step_tokens=data.draw(st.integers(1, 50)),
        depth=depth,
    )
    sent = data.draw(st.integers(1, 12))
    for ident in range(1, sent + 1):
        start = data.draw(st.integers(0, 1))
        length = data.draw(st.integers(1, 90))
        world.send(
            ident,
            list(range(start, start + length)),
            model="ab"[ident % 2],
            max_tokens=data.draw(st.integers(1, 30)),
        )
        for _ in range(data.draw(st.integers(0, 4))):
            world.step()
        if data.draw(st.booleans()):
            world.cancel(data.draw(st.integers(1, sent)))
    world.run()
    for ident in range(1, sent + 1):
        end = world.ends[ident]
        assert end.reason in (Reason.LENGTH, Reason.CANCELLED)
        if end.reason is Reason.LENGTH:
            assert end.output_tokens == len(world.tokens(ident))
    for model in world.engine.models.values():
        assert model.pool.available == model.pool.total


def test_a_tenants_cached_prompts_are_dropped_by_subject():
    world = TwoModels()
    prompt = list(range(40))

    def send(ident: int, tenant: str, user: str | None) -> int:
        """Runs a request; returns how many tokens of its prompt were cached."""
        request = Request(
            id=ident,
            model="a",
            prompt=tuple(prompt),
            arrival=world.clock(),
            sampling=Sampling(max_tokens=2, seed=1),
            tenant=tenant,
            salt=cache_salt(user, None),
        )
        world.submit(request)
        world.run()
        return world.ends[ident].cached_tokens

    owners = [("ann", "u1"), ("ann", "u2"), ("ann", None), ("bob", "u1")]
    assert [send(ident, *owner) for ident, owner in enumerate(owners)] == [0, 0, 0, 0]
    assert list(world.engine.erase("ann", "u1")) == [(2, 0), (0, 0)]
    assert [send(10 + ident, *owner) for ident, owner in enumerate(owners)] == [0, 32, 32, 32]
    assert list(world.engine.erase("ann", None)) == [(6, 0), (0, 0)]
    assert [send(20 + ident, *owner) for ident, owner in enumerate(owners)] == [0, 0, 0, 32]
    world.send(30, prompt, max_tokens=3)
    world.engine.step()
    world.engine.step()
    assert next(world.engine.erase("local", None))[1] == 2  # a running sequence keeps its blocks
    world.run()
    assert world.ends[30].reason is Reason.LENGTH
    world.engine.check()
    assert world.engine.models["a"].pool.available == 64


def calls_of(work: Callable[[], object]) -> int:
    """The calls of functions, Python's and C's, that some work makes."""
    calls = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def test_a_first_token_and_a_snapshot_take_few_calls():
    """Time depends on the machine, calls do not. A prompt of 466 tokens has 29 blocks."""
    clock = VirtualClock()
    models = [LoadedModel(NullRunner(null_info(), sleep=clock.sleep), StepTime(StepCost(base=0.05)))]
    world = World(clock, models, Limits(256, 512), deadline)
    objective = Objective(ttft_ms=20_000, itl_ms=250)
    request = Request(
        id=1, model="null", prompt=tuple(range(466)), arrival=0.0, objective=objective, admitted=True
    )
    engine, seq = world.engine, Sequence.of(request, 8192)
    assert calls_of(lambda: (engine.submit(seq), engine.step())) < 600
    assert calls_of(lambda: snapshot(engine.context("null"), 1)) < 115
