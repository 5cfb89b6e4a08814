"""Draft tokens where a step is otherwise launched before the result of the previous one is known."""

from __future__ import annotations

from math import inf

import pytest

from stretto.engine.core import LoadedModel
from stretto.engine.runners.null import NullRunner, VirtualClock, null_info
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.types import Limits, Plan
from stretto.engine.sequence import Drawn
from stretto.engine.speculative.policy import Speculation, Verification, any_sequence
from stretto.engine.step_time import StepCost, StepTime
from stretto.simulator.harness import World
from stretto.types import Request, Sampling

COST = StepCost(base=10.0, per_decode=0.1, per_prefill=0.1)
RULES = Verification(any_sequence, rows=32, pipelined=True)


class Device(NullRunner):
    """A null model on a device that runs beside the host. The host takes `host_ms` for each launch."""

    def __init__(self, clock: VirtualClock, host_ms: float, span: int) -> None:
        info = null_info(name="a", context=4096, blocks=256)
        super().__init__(info, cost=COST, sleep=clock.sleep, span=span, depth=1)
        self.clock = clock
        self.host_ms = host_ms
        self.free = 0.0
        self.depths: list[int] = []

    def launch(self, plan: Plan) -> Running:  # type: ignore[override]
        assert not any(row.draft and row.seq.in_flight for row in plan.rows), "its own token is unknown"
        self.clock.sleep(self.host_ms / 1e3)
        self.depth = 0 if any(row.draft for row in plan.rows) else 1
        self.depths.append(self.depth)
        drawn = [self._result(row) for row in plan.rows if row.draw]
        self.free = max(self.free, self.clock()) + self.step_ms(plan.load) / 1e3
        return Running(self.clock, self.free, drawn)


class Running:
    def __init__(self, clock: VirtualClock, until: float, drawn: list[Drawn]) -> None:
        self.clock, self.until, self.drawn = clock, until, drawn

    def wait(self) -> list[Drawn]:
        self.clock.sleep(max(self.until - self.clock(), 0.0))
        return self.drawn


class Pipelined(World):
    """A device with a model whose answers repeat every `span` tokens."""

    def __init__(self, speculation: Speculation | None, *, host_ms: float, span: int) -> None:
        clock = VirtualClock()
        self.device = Device(clock, host_ms, span)
        models = [LoadedModel(self.device, StepTime(COST), speculation)]
        super().__init__(clock, models, Limits(8, 64), SCHEDULES["deadline"])

    def answers(self, count: int, tokens: int) -> dict[int, list[int]]:
        for ident in range(count):
            sampling = Sampling(max_tokens=tokens, seed=ident)
            prompt = tuple(range(100, 120))
            self.submit(Request(id=ident, model="a", prompt=prompt, arrival=self.clock(), sampling=sampling))
        self.run()
        return {ident: self.tokens(ident) for ident in self.events}

    def total(self, name: str) -> int:
        return sum(getattr(step, name) for step in self.steps)


def speculation() -> Speculation:
    return Speculation(device=RULES)


@pytest.mark.parametrize("count", [1, 3])
def test_a_text_that_repeats_itself_is_quicker_although_the_device_waits(count: int):
    plain, quick = (Pipelined(each, host_ms=1.0, span=5) for each in (None, speculation()))
    assert plain.answers(count, 200) == quick.answers(count, 200)
    assert quick.total("accepted") > 150 and quick.clock() < plain.clock() / 3
    assert {0, 1} == set(quick.device.depths)


def test_a_text_that_never_repeats_is_left_to_the_pipeline():
    plain, quick = (Pipelined(each, host_ms=5.0, span=4093) for each in (None, speculation()))
    assert plain.answers(2, 100) == quick.answers(2, 100)
    assert quick.total("proposed") == 0 and quick.clock() == pytest.approx(plain.clock())


@pytest.mark.parametrize(("host_ms", "worth"), [(1.0, True), (9.5, False)])
def test_a_device_waits_for_its_host_only_where_that_costs_less_than_it_saves(host_ms: float, worth: bool):
    """With room for one draft token, a step saves at most another one of 10 ms. The device would be idle for
    as long as the host takes."""
    rules = Verification(any_sequence, rows=2, pipelined=True)
    plain, quick = (Pipelined(each, host_ms=host_ms, span=5) for each in (None, Speculation(device=rules)))
    assert plain.answers(1, 200) == quick.answers(1, 200)
    assert (quick.total("accepted") > 80) is worth
    assert quick.clock() < plain.clock() * (0.7 if worth else 1.01)


def test_no_draft_token_is_verified_before_the_host_was_timed():
    """The quantile of no measurement must not look like a host that takes no time."""
    quick = Pipelined(speculation(), host_ms=1.0, span=5)
    history = quick.engine.models["a"].history
    assert history.turnarounds.quantile(0.5, inf) == inf
    quick.answers(1, 50)
    assert history.turnarounds.quantile(0.5, inf) == pytest.approx(1.0)


def test_a_step_keeps_to_the_rows_of_the_device():
    rules = Verification(any_sequence, rows=8, pipelined=True)
    quick = Pipelined(Speculation(device=rules), host_ms=0.1, span=3)
    quick.answers(5, 80)
    assert quick.total("accepted") > 0
    assert max(sum(1 + len(row.draft) for row in plan.rows) for plan in quick.plans) <= 8


def test_sequences_that_the_device_cannot_verify_get_no_draft_tokens():
    odd = Verification(lambda seq: seq.request.id % 2 == 1, rows=32, pipelined=True)
    quick = Pipelined(Speculation(device=odd), host_ms=0.1, span=3)
    quick.answers(4, 60)
    drafted = {row.seq.request.id for plan in quick.plans for row in plan.rows if row.draft}
    assert drafted == {1, 3}


def test_keys_of_draft_tokens_are_counted_for_each_where_each_reads_them():
    quick = Pipelined(speculation(), host_ms=0.1, span=3)
    quick.answers(1, 60)
    rows = [(plan, row) for plan in quick.plans for row in plan.rows if row.draft]
    assert rows
    for plan, row in rows:
        assert plan.load.decode == 1 + len(row.draft) and plan.load.reading == 0
        assert plan.load.context == sum(row.start + 1 + ahead for ahead in range(1 + len(row.draft)))
