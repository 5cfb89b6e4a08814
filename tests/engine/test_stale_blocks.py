"""NaN that nobody has noticed reaches no other sequence: blocks that no result has judged are zeroed."""

# pyright: reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.engine.core import LoadedModel
from stretto.engine.runners.null import Finished, NullRunner, VirtualClock, null_info
from stretto.engine.scheduler.deadline import deadline
from stretto.engine.scheduler.fcfs import fcfs
from stretto.engine.scheduler.types import Limits, Plan, Row
from stretto.engine.sequence import Drawn
from stretto.engine.step_time import StepCost, StepTime
from stretto.simulator.harness import World
from stretto.types import Objective, Reason, Request, Sampling

SIZE = 16
POISON = 4000  # its keys and values are NaN
STOP = 7
COST = StepCost(base=1.0, per_prefill=0.05)


class Attention(NullRunner):
    """Knows which slots of its KV cache hold NaN, and spreads it as attention does.

    A token is NaN if any slot of the blocks up to its own is: attention multiplies what lies beyond the token
    by zero. `poisoned`: further tokens whose keys and values are NaN, as request and position.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, span=1000, **options)
        self.nan: set[tuple[int, int]] = set()
        self.poisoned: set[tuple[int, int]] = set()
        self.erased: list[list[int]] = []

    def launch(self, plan: Plan) -> Finished:
        sound = [self._write(row) for row in plan.rows]
        drawing = [good for good, row in zip(sound, plan.rows, strict=True) if row.draw]
        drawn = super().launch(plan).drawn
        return Finished([one if good else Drawn(-1) for one, good in zip(drawn, drawing, strict=True)])

    def erase(self, blocks: list[int]) -> None:
        self.erased.append(blocks)
        self.nan -= {(block, slot) for block in blocks for slot in range(SIZE)}

    def _write(self, row: Row) -> bool:
        """Write the tokens of a row -> whether the last of them is no NaN."""
        blocks, tokens, ident = row.seq.kv.blocks, row.seq.tokens, row.seq.request.id
        positions = range(row.start, row.start + row.count)
        places = [(position, (blocks[position // SIZE], position % SIZE)) for position in positions]
        for position, slot in places:
            bad = tokens[position : position + 1] == [POISON] or (ident, position) in self.poisoned
            (self.nan.add if bad else self.nan.discard)(slot)
        for position, slot in places:
            read = blocks[: position // SIZE + 1]
            if any((block, other) in self.nan for block in read for other in range(SIZE)):
                self.nan.add(slot)
        return places[-1][1] not in self.nan


class Blocks(World):
    """One model of `blocks` blocks of 16 tokens, whose runner is an `Attention`."""

    def __init__(
        self, *, blocks: int = 12, step_tokens: int = 32, depth: int = 0, schedule: Any = fcfs
    ) -> None:
        clock = VirtualClock()
        info = null_info(context=blocks * SIZE, blocks=blocks)
        self.runner = Attention(info, cost=COST, sleep=clock.sleep, depth=depth)
        super().__init__(clock, [LoadedModel(self.runner, StepTime(COST))], Limits(4, step_tokens), schedule)

    def send(
        self, ident: int, prompt: list[int], objective: Objective | None = None, **sampling: Any
    ) -> None:
        made = Sampling(**{"max_tokens": 5, "seed": ident, **sampling})
        chosen = {} if objective is None else {"objective": objective}
        self.submit(
            Request(
                id=ident, model="null", prompt=tuple(prompt), arrival=self.clock(), sampling=made, **chosen
            )
        )

    def assert_others_are_sound(self) -> None:
        """Requests that get each block in turn, and fill a part of it, are answered."""
        for ident in range(100, 130):
            self.send(ident, [ident] * (1 + ident % 20))
            self.run()
            assert self.ends[ident].reason is Reason.LENGTH, self.ends[ident].error


def poisoned(length: int, at: int) -> list[int]:
    return [*range(at), POISON, *range(at + 1, length)]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_prompt_that_is_cancelled_leaves_no_nan_to_others(depth: int):
    world = Blocks(depth=depth)
    world.send(1, poisoned(100, 5))
    world.step()
    world.step()
    world.cancel(1)
    assert world.runner.nan, "nobody has noticed"
    world.assert_others_are_sound()
    assert world.ends[1].reason is Reason.CANCELLED and not world.runner.nan


@pytest.mark.parametrize("depth", [0, 1])
def test_a_prompt_whose_time_is_over_leaves_no_nan_to_others(depth: int):
    world = Blocks(depth=depth, schedule=deadline)
    world.send(1, poisoned(180, 5), Objective(total_ms=4.0, on_miss="late"))
    world.run()
    assert world.ends[1].reason is Reason.DEADLINE and world.runner.nan
    world.assert_others_are_sound()
    assert not world.runner.nan


@pytest.mark.parametrize("depth", [0, 1])
def test_a_prompt_that_is_preempted_leaves_no_nan_to_others(depth: int):
    world = Blocks(blocks=8, step_tokens=20, depth=depth)
    world.send(1, list(range(500, 560)), max_tokens=60)
    world.step()
    world.send(2, poisoned(110, 3))
    world.run()
    assert any(plan.preempt for plan in world.plans)
    assert (world.ends[1].reason, world.ends[2].reason) == (Reason.LENGTH, Reason.ERROR)
    world.assert_others_are_sound()


def test_the_step_in_flight_at_the_end_of_an_answer_leaves_no_nan_to_others():
    """The token that ends the answer was drawn from numbers, but is NaN itself."""
    world = Blocks(depth=1)
    world.runner.eos = frozenset(range(1000))
    world.runner.poisoned = {(1, 30)}
    world.send(1, list(range(30)))
    world.run()
    assert world.ends[1].reason is Reason.STOP and world.runner.nan
    world.runner.eos = frozenset()
    world.assert_others_are_sound()


@pytest.mark.parametrize("depth", [0, 1])
def test_answers_that_end_as_usual_cost_no_zeroing(depth: int):
    """In a full pool, where blocks are used again at once. Nor does a cancel, after the step in flight."""
    world = Blocks(blocks=21, depth=depth)
    for ident in range(1, 60):
        world.send(ident, list(range(ident, ident + 40)), max_tokens=1 + ident % 30, stop_token_ids=(STOP,))
        world.step()
    world.run()
    assert world.runner.erased == []
    for ident in range(60, 80):
        world.send(ident, list(range(ident, ident + 40)), max_tokens=100)
        while len(world.tokens(ident)) < 1 + ident % 17:
            world.step()
        world.cancel(ident)
        world.run()
    assert world.runner.erased == [] and not any(plan.preempt for plan in world.plans)
    assert world.engine.models["null"].pool.available == 21


def test_what_a_cancelled_prompt_left_is_read_anew_but_not_what_was_read_ahead():
    """A prompt without an answer is read for a later one, which judges it."""
    for most, cached in ((5, 0), (0, 32)):
        world = Blocks()
        world.send(1, list(range(100)), max_tokens=most)
        world.step()
        world.cancel(1)
        world.send(2, list(range(100)))
        world.run()
        assert world.ends[2].cached_tokens == cached


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_only_poisoned_requests_fail(data: st.DataObject):
    """Random prompts, pools, cancels and preemptions."""
    world = Blocks(
        blocks=data.draw(st.integers(6, 16)),
        step_tokens=data.draw(st.integers(5, 60)),
        depth=data.draw(st.integers(0, 1)),
    )
    bad: set[int] = set()
    sent = data.draw(st.integers(2, 12))
    for ident in range(1, sent + 1):
        length, first = data.draw(st.integers(1, 60)), data.draw(st.integers(0, 1))
        prompt = list(range(first, first + length))
        if data.draw(st.booleans()):
            bad.add(ident)
            prompt[data.draw(st.integers(0, length - 1))] = POISON
        world.send(ident, prompt, max_tokens=data.draw(st.integers(1, 30)))
        for _ in range(data.draw(st.integers(0, 4))):
            world.step()
        if data.draw(st.booleans()):
            world.cancel(data.draw(st.integers(1, sent)))
    world.run()
    for ident in range(1, sent + 1):
        wanted = Reason.ERROR if ident in bad else Reason.LENGTH
        assert world.ends[ident].reason in (wanted, Reason.CANCELLED)
    world.assert_others_are_sound()
