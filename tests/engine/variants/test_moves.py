"""Degrade before late: requests that wait move to a lighter variant, once, and nothing is done twice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.engine.core import LoadedModel
from stretto.engine.runners.null import NullRunner, VirtualClock, null_info
from stretto.engine.scheduler.deadline import deadline
from stretto.engine.scheduler.types import Limits
from stretto.engine.step_time import StepCost, StepTime
from stretto.engine.variants.moves import MOST_MOVES
from stretto.simulator.harness import World
from stretto.types import Objective, Reason, Request, Sampling

COSTS = {
    "top": StepCost(20.0, 1.0, 1.0, 0.0, 0.0),  # 100 tokens of a prompt in 100 ms
    "mid": StepCost(8.0, 0.4, 0.4, 0.0, 0.0),
    "low": StepCost(2.0, 0.1, 0.1, 0.0, 0.0),
}
LIGHTER = ("mid", "low")


class CountingRunner(NullRunner):
    """A null model that counts the tokens that it computed, by request."""

    def __init__(self, name: str, cost: StepCost, clock: VirtualClock) -> None:
        super().__init__(null_info(name=name, context=4096, blocks=512), cost=cost, sleep=clock.sleep)
        self.computed: dict[int, int] = {}

    def launch(self, plan: Any) -> Any:
        for row in plan.rows:
            ident = row.seq.request.id
            self.computed[ident] = self.computed.get(ident, 0) + row.count
        return super().launch(plan)


class Ladders(World):
    """A ladder of three null models in virtual time."""

    def __init__(self) -> None:
        clock = VirtualClock()
        self.runners = {name: CountingRunner(name, cost, clock) for name, cost in COSTS.items()}
        models = [LoadedModel(runner, StepTime(COSTS[name])) for name, runner in self.runners.items()]
        super().__init__(clock, models, Limits(64, 512), deadline, share=False)

    def answered_by(self, ident: int) -> str:
        """The model that emitted the first token of a request."""
        began = next(event.began for event in self.events[ident] if event.began is not None)
        return began.moved.model if began.moved else self.requests[ident].model

    def late(self, ident: int) -> bool:
        due = self.requests[ident].arrival + (self.requests[ident].objective.ttft_ms or 0.0) / 1e3
        return self.stamps[ident][0] > due + 1e-9


def asked(ident: int, **fields: Any) -> Request:
    usual: dict[str, Any] = {
        "model": "top",
        "prompt": (1,) * 100,
        "arrival": 0.0,
        "sampling": Sampling(max_tokens=4, seed=1),
        "objective": Objective(ttft_ms=400, itl_ms=200),
        "lighter": LIGHTER,
    }
    return Request(id=ident, **(usual | fields))


def sent(world: Ladders, requests: Iterable[Request]) -> Ladders:
    for request in requests:
        world.submit(request)
    world.run()
    return world


def test_requests_that_would_be_late_move_to_the_best_variant_that_has_them_on_time() -> None:
    world = sent(Ladders(), (asked(ident) for ident in range(1, 6)))
    answered = [world.answered_by(ident) for ident in range(1, 6)]
    assert answered.count("top") >= 1 and set(answered) - {"top"}, "some stay, some move"
    assert not any(world.late(ident) for ident in range(1, 6))
    still = sent(Ladders(), (asked(ident, lighter=()) for ident in range(1, 6)))
    assert any(ident not in still.stamps or still.late(ident) for ident in range(1, 6)), "not without moves"


def test_no_token_is_computed_or_emitted_twice() -> None:
    world = sent(Ladders(), (asked(ident) for ident in range(1, 6)))
    for ident in range(1, 6):
        by = {name for name, runner in world.runners.items() if ident in runner.computed}
        assert by == {world.answered_by(ident)}
        assert sum(runner.computed.get(ident, 0) for runner in world.runners.values()) == 103
        assert len(world.tokens(ident)) == 4
        assert sum(event.began is not None for event in world.events[ident]) == 1
        assert sum(event.finish is not None for event in world.events[ident]) == 1


def test_the_deadlines_of_a_request_that_moves_count_from_its_arrival() -> None:
    world = Ladders()
    for ident in range(1, 6):
        world.submit(asked(ident))
    world.run()
    moved = next(ident for ident in range(1, 6) if world.answered_by(ident) != "top")
    first = next(event for event in world.events[moved] if event.began is not None)
    assert first.began is not None
    assert first.began.queue_ms <= (world.stamps[moved][0] - world.requests[moved].arrival) * 1e3
    assert world.ends[moved].late is False


def test_one_that_displaces_others_moves_those_that_wait() -> None:
    """Weightier requests that come later take the time that was promised to the first ones."""
    world = Ladders()
    first = Objective(ttft_ms=1500)
    world.submit(asked(1, tier="priority", prompt=(1,) * 1000, lighter=(), objective=first))
    world.step()
    for ident in (2, 3):
        world.submit(asked(ident, arrival=world.clock(), objective=Objective(ttft_ms=1500, itl_ms=200)))
    world.step()
    assert [seq.request.model for seq in world.engine.models["top"].queues.waiting] == ["top", "top"]
    for ident in range(4, 10):
        heavy = Objective(ttft_ms=1400, itl_ms=200)
        world.submit(asked(ident, tier="priority", arrival=world.clock(), objective=heavy, lighter=()))
    world.run()
    assert {world.answered_by(ident) for ident in (2, 3)} <= {"mid", "low"}
    assert not any(world.late(ident) for ident in range(1, 10))


def test_a_request_with_reject_moves_rather_than_being_refused() -> None:
    objective = Objective(ttft_ms=400, itl_ms=200, on_miss="reject")
    world = sent(Ladders(), (asked(ident, objective=objective) for ident in range(1, 6)))
    assert all(world.ends[ident].reason is Reason.LENGTH for ident in range(1, 6))
    assert not any(world.late(ident) for ident in range(1, 6))
    tight = Objective(ttft_ms=5, on_miss="reject")
    (refused,) = sent(Ladders(), [asked(1, objective=tight)]).ends.values()
    assert refused.reason is Reason.REFUSED, "no variant has it on time"


def overtaken(others: int, **fields: Any) -> Ladders:
    """A request of which a part of the prompt is computed when others of more weight come."""
    world = Ladders()
    world.submit(asked(1, prompt=(1,) * 1000, objective=Objective(ttft_ms=1500), **fields))
    world.step()
    for ident in range(2, 2 + others):
        world.submit(asked(ident, tier="priority", lighter=(), arrival=world.clock()))
    world.run()
    return world


def test_a_prompt_that_is_partly_computed_moves_when_the_rest_of_it_would_be_late() -> None:
    world = overtaken(6)
    assert world.answered_by(1) in LIGHTER and not world.late(1)
    stays = overtaken(6, lighter=())
    assert stays.answered_by(1) == "top" and stays.late(1)
    assert overtaken(0).answered_by(1) == "top", "it stays while the rest would be on time"
    assert all(world.answered_by(ident) == "top" for ident in world.stamps.keys() - {1}), (
        "they have no lighter variant"
    )


def test_names_that_the_engine_does_not_have_are_passed_over() -> None:
    world = sent(Ladders(), (asked(ident, lighter=("gone", "low")) for ident in range(1, 6)))
    assert {world.answered_by(ident) for ident in range(1, 6)} == {"top", "low"}


def test_a_cancelled_request_ends_where_it_moved_to() -> None:
    world = Ladders()
    for ident in range(1, 6):
        world.submit(asked(ident))
    world.step()
    moved = [seq.request.id for seq in world.engine.models["mid"].queues.waiting]
    moved += [seq.request.id for seq in world.engine.models["low"].queues.waiting]
    assert moved
    world.cancel(moved[0])
    world.run()
    assert world.ends[moved[0]].reason is Reason.CANCELLED
    assert world.engine.idle


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 2),
            st.integers(1, 800),
            st.integers(1, 20),
            st.sampled_from((50.0, 200.0, 1000.0, None)),
            st.sampled_from((100.0, None)),
            st.sampled_from((500.0, None)),
            st.sampled_from(("degrade", "reject", "late")),
            st.sampled_from(("priority", "default", "flex")),
            st.sampled_from((LIGHTER, ("low",), ())),
        ),
        max_size=40,
    )
)
def test_random_loads_end_each_request_once_and_compute_it_twice_only_when_it_moves(rows: list[Any]) -> None:
    world = Ladders()
    rows.sort(key=lambda row: row[0])
    for ident, (at, prompt, tokens, ttft, itl, total, on_miss, tier, lighter) in enumerate(rows, 1):
        world.run(until=at)
        objective = Objective(ttft_ms=ttft, itl_ms=itl, total_ms=total, on_miss=on_miss)
        sampling = Sampling(max_tokens=tokens, seed=ident)
        world.submit(
            asked(
                ident,
                prompt=(1,) * prompt,
                arrival=world.clock(),
                sampling=sampling,
                objective=objective,
                tier=tier,
                lighter=lighter,
            )
        )
    world.run()
    assert set(world.ends) == set(world.requests)
    for ident, request in world.requests.items():
        by = [name for name, runner in world.runners.items() if ident in runner.computed]
        moved = any(event.began is not None and event.began.moved for event in world.events[ident])
        assert len(by) <= (1 + MOST_MOVES if moved else 1), "a stream may move, which reads its tokens again"
        assert set(by) <= {request.model, *request.lighter}
        if ident in world.stamps:
            assert world.answered_by(ident) in by
    assert all(
        seq.moves <= MOST_MOVES for model in world.engine.models.values() for seq in model.queues.waiting
    )


@pytest.mark.parametrize("lighter", [LIGHTER, ()])
def test_a_request_without_a_deadline_never_moves(lighter: tuple[str, ...]) -> None:
    requests = [asked(ident, objective=Objective(), tier="flex", lighter=lighter) for ident in range(1, 30)]
    world = sent(Ladders(), requests)
    assert {world.answered_by(ident) for ident in range(1, 30)} == {"top"}


def test_a_stream_with_little_time_does_not_wait_for_steps_of_one_with_much() -> None:
    def ended(*others: Request) -> tuple[Ladders, float]:
        world = Ladders()
        for request in others:
            world.submit(request)
        while not all(world.tokens(request.id) for request in others):
            world.step()
        began = world.clock()
        tight = Objective(total_ms=300)
        world.submit(asked(9, model="low", lighter=(), arrival=began, objective=tight, sampling=many))
        world.run()
        return world, world.ended_at[9] - began

    many = Sampling(max_tokens=40)
    patient = asked(1, model="top", lighter=(), objective=Objective(total_ms=60_000), sampling=many)
    (_, alone), (world, beside) = ended(), ended(patient)
    assert beside < 2 * alone, "in turns, each of its steps would wait for one of the top, ten times as long"
    assert not world.ends[9].late and not world.ends[1].late
