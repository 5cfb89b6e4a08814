"""A waiting prompt counts as the work that is left of it: what the prefix cache holds is not read again."""

from __future__ import annotations

import pytest

from stretto.engine.scheduler.admission import snapshot
from tests.engine.scheduler.test_deadline import TIERS, TwoModels

LONG = 4000  # tokens: 208 ms, where `priority` has 100 ms


@pytest.mark.parametrize(("first", "on_time"), [(7, True), (None, False)])
def test_a_long_prompt_is_on_time_when_it_is_cached(first: int | None, on_time: bool):
    world = TwoModels()
    world.send(1, LONG, tier="flex", first=first)
    world.run()
    world.send(2, 6000)
    world.send(3, LONG, tier="priority", first=first)
    world.run()
    assert world.on_time(2)
    assert world.on_time(3) is on_time


def test_what_a_running_prompt_computes_is_not_counted_for_the_next():
    world = TwoModels()
    world.send(1, LONG, first=7)
    world.step()
    world.send(2, LONG, first=7)
    world.send(3, LONG)
    (second,), (third,) = (
        [seq for seq in world.engine.models["a"].queues.waiting if seq.request.id == id] for id in (2, 3)
    )
    assert (second.done, third.done) == (LONG - 16, 0)
    works = [ms for _, ms, _ in snapshot(world.engine.context("a"), 3).prompts[TIERS["default"].weight]]
    assert len(works) == 3 and min(works) < 2.0 and max(works) > 200.0
    world.run()
    assert world.ends[2].cached_tokens == LONG - 16


def test_another_tenants_prompt_is_not_expected():
    world = TwoModels()
    world.send(1, LONG, first=7, tenant="ann")
    world.run()
    world.send(2, LONG, first=7, tenant="bob")
    (seq,) = world.engine.models["a"].queues.waiting
    assert seq.done == 0
