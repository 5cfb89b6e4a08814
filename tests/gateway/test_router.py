"""Where requests go: by deadline, and by the baselines."""

from __future__ import annotations

from math import inf
from random import Random
from typing import cast

import pytest

from stretto.config import TIERS
from stretto.engine.scheduler.admission import Outlook, Snapshot
from stretto.engine.scheduler.estimate import Estimate
from stretto.engine.scheduler.lateness import Backlog
from stretto.engine.step_time import StepCost
from stretto.gateway.routing.router import STALE_S, Ask, Method, Router, WorkerView
from stretto.types import Objective, Request, Sampling

COST = StepCost(base=10.0, per_decode=0.5, per_prefill=0.5)  # ms


def snapshot(now: float, *, waiting_ms: float = 0.0, late_ms: float = 0.0) -> Snapshot:
    jobs = [(now + 0.9, waiting_ms, 0.0)] if waiting_ms else []
    estimate = Estimate(cost=COST, margin=1.0, streams=0, itl_ms=inf, load=0.0)
    return Snapshot(
        now=now,
        newest=0,
        estimate=estimate,
        context=0,
        prompts={4.0: [], 2.0: jobs, 1.0: [], 0.0: []},
        inflow={},
        lengths={"default": 10, "priority": 10, "flex": 10},
        backlog=Backlog(late_ms=late_ms),
    )


def view(name: str, now: float = 0.0, waiting_ms: float = 0.0) -> WorkerView:
    outlook = Outlook(TIERS)
    outlook.see(snapshot(now, waiting_ms=waiting_ms))
    return WorkerView(name, outlooks={"m": outlook}, seen=now)


def router(*views: WorkerView, method: Method = "deadline") -> Router:
    made = Router(method, Random(0).randrange)
    made.workers = {each.name: each for each in views}
    return made


def ask(tokens: int = 100, *, ttft_ms: float | None = 1000.0, keys: tuple[int, ...] = (), id: int = 1) -> Ask:
    request = Request(
        id=id,
        model="m",
        prompt=cast("tuple[int, ...]", range(tokens)),
        arrival=0.0,
        sampling=Sampling(max_tokens=10),
        objective=Objective(ttft_ms=ttft_ms),
    )
    return Ask(request, keys, piece=tokens / len(keys) if keys else 0.0)


def test_a_request_goes_where_its_first_token_is_on_time():
    placed = router(view("busy", waiting_ms=3000.0), view("idle")).place(ask(), 0.0)
    assert placed is not None and placed.worker.name == "idle" and placed.feasible


def test_a_burst_spreads_although_no_new_state_arrives():
    made = router(view("a"), view("b"), view("c"))
    for ident in range(30):
        made.place(ask(200, id=ident + 1), 0.0)
    assert [each.active for each in made.workers.values()] == [10, 10, 10]


def test_requests_with_the_same_cold_prefix_are_gathered():
    made = router(view("a"), view("b"), view("c"))
    names: set[str] = set()
    for ident in range(3):
        placed = made.place(ask(400, ttft_ms=5000.0, keys=(1, 2, 3, 4), id=ident + 1), 0.0)
        assert placed is not None
        names.add(placed.worker.name)
    assert len(names) == 1


def test_a_cached_prompt_does_not_hold_a_request_on_a_saturated_worker():
    a, b = view("a", waiting_ms=3000.0), view("b")
    made = router(a, b)
    made.prefixes.add("a", [1, 2, 3, 4], 100)
    placed = made.place(ask(400, keys=(1, 2, 3, 4)), 0.0)
    assert placed is not None and placed.worker is b


def test_prompts_that_are_late_already_burden_a_worker():
    behind, free = view("behind"), view("free", waiting_ms=20.0)
    behind.outlooks["m"].see(snapshot(0.0, late_ms=3000.0))
    placed = router(behind, free).place(ask(), 0.0)
    assert placed is not None and placed.worker is free


def test_what_a_worker_refused_is_not_believed_to_be_in_its_cache():
    a, b = view("a"), view("b")
    made = router(a, b)
    made.prefixes.add("a", [1, 2], 100)
    long = ask(400, ttft_ms=5000.0, keys=(1, 2, 3, 4))
    placed = made.place(long, 0.0)
    assert placed is not None and placed.worker is a and placed.cached == 200
    assert made.prefixes.match(long.keys) == {"a": 4}
    made.refused(long, placed)
    assert made.prefixes.match(long.keys) == {"a": 2}


def test_a_far_worker_counts_its_round_trip():
    near, far = view("near", waiting_ms=20.0), view("far")
    far.round_trip = 0.15
    assert router(near, far).place(ask(), 0.0).worker is near  # type: ignore[union-attr]
    near, far = view("near", waiting_ms=400.0), view("far")
    far.round_trip = 0.15
    assert router(near, far).place(ask(), 0.0).worker is far  # type: ignore[union-attr]


def test_of_many_workers_an_idle_one_and_one_that_holds_the_prompt_are_not_missed():
    views = [view(f"w{number}", waiting_ms=500.0) for number in range(64)]
    for number, each in enumerate(views):
        each.active = 50 + number
    idle = views[40] = view("w40")
    made = router(*views)
    assert made.place(ask(), 0.0).worker is idle  # type: ignore[union-attr]
    made = router(*views)
    made.prefixes.add("w63", [1, 2, 3, 4], 100)
    views[63].outlooks["m"].see(snapshot(0.0))
    idle.active = 0
    placed = made.place(ask(4000, ttft_ms=9000.0, keys=(1, 2, 3, 4)), 0.0)
    assert placed is not None and placed.worker is views[63] and placed.cached == 3999


def test_the_best_variant_that_is_on_time_answers():
    small, large = view("small"), view("large", waiting_ms=300.0)
    small.quality = 0.7
    assert router(small, large).place(ask(), 0.0).worker is large  # type: ignore[union-attr]
    late = view("large")
    late.quality, late.round_trip = 1.0, 2.0
    assert router(small, late).place(ask(), 0.0).worker is small  # type: ignore[union-attr]
    assert router(small, late).place(ask(ttft_ms=None), 0.0).worker is late  # type: ignore[union-attr]


def test_a_worker_with_another_clock_is_predicted_the_same():
    here, there = view("here"), view("there", now=5000.0)
    there.seen, there.offset = 0.0, 5000.0
    made = router(here, there)
    first, second = made.predictions(ask(), [here, there], 0.0)
    assert first.ttft_s == pytest.approx(second.ttft_s)


def test_stale_states_are_not_believed():
    a, b = view("a", waiting_ms=0.0), view("b", waiting_ms=5000.0)
    a.active = 3
    made = router(a, b)
    placed = made.place(ask(), STALE_S + 1.0)
    assert placed is not None and placed.worker is b and placed.ttft_s == inf


def test_no_worker_takes_what_none_can():
    a = view("a")
    made = router(a)
    assert made.place(ask(), 0.0, avoid=["a"]) is None
    a.usable = False
    assert made.place(ask(), 0.0) is None


def test_the_least_late_worker_gets_a_request_that_cannot_be_on_time():
    made = router(view("a", waiting_ms=4000.0), view("b", waiting_ms=2500.0))
    placed = made.place(ask(1000, ttft_ms=100.0), 0.0)
    assert placed is not None and placed.worker.name == "b" and not placed.feasible


@pytest.mark.parametrize("method", ["round-robin", "least-load", "two-choices"])
def test_the_baselines_spread_a_burst(method: Method):
    made = router(view("a"), view("b"), method=method)
    for ident in range(40):
        made.place(ask(id=ident + 1), 0.0)
    assert all(15 <= each.active <= 25 for each in made.workers.values())


def test_sticky_stays_until_its_worker_is_saturated():
    made = router(view("a"), view("b"), method="sticky")
    names = [made.place(ask(keys=(1, 2), id=ident + 1), 0.0).worker.name for ident in range(30)]  # type: ignore[union-attr]
    assert names[:9] == [names[0]] * 9
    assert set(names) == {"a", "b"}
