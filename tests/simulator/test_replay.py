"""Whole loads in virtual time: the figures are right, repeatable, and what the schedule is for."""

from __future__ import annotations

import os
from functools import cache
from itertools import combinations
from math import inf
from pathlib import Path
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.bench.traces import read
from stretto.config import Tier
from stretto.engine.scheduler.estimate import step_limit
from stretto.engine.scheduler.lateness import FLEX_WAIT_S, PAUSE_S, longest_wait_s
from stretto.engine.step_time import StepCost
from stretto.errors import InvalidRequest
from stretto.simulator.replay import capacity, replay, replayed
from stretto.simulator.report import ReplayReport
from stretto.simulator.setting import CPU_TIERS, Arrival, Setting
from stretto.simulator.upper_bound import Work, bound, most_on_time, with_base
from stretto.types import Objective, Reason, Request

DATA = Path(os.environ.get("STRETTO_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "traces"
COST = StepCost(base=5.0, per_decode=0.2, per_prefill=0.2, per_key=1e-4)
TIERS = {
    "priority": Tier(objective=Objective(ttft_ms=1500, itl_ms=40), weight=4.0),
    "default": Tier(objective=Objective(ttft_ms=4000, itl_ms=80), weight=2.0),
    "flex": Tier(objective=Objective(), weight=1.0),
}
SETTING = Setting(cost=COST, tiers=TIERS)


@cache
def arrivals(count: int = 250) -> tuple[Arrival, ...]:
    """A bursty load of made-up lengths."""
    rng, at, made = Random(7), 0.0, list[Arrival]()
    for _ in range(count):
        at += rng.gammavariate(0.6, 1.0)
        made.append(Arrival(at, int(rng.lognormvariate(6.0, 0.8)) + 1, int(rng.lognormvariate(3.5, 0.7)) + 1))
    return tuple(made)


@cache
def full() -> float:
    return capacity(arrivals(), SETTING)


@cache
def played(schedule: str, load: float, noise: float = 0.0) -> ReplayReport:
    setting = msgspec.structs.replace(SETTING, schedule=schedule, load=load, noise=noise)
    return replay(arrivals(), setting, rate=full())


def test_the_same_seed_gives_the_same_report_and_another_another():
    setting = msgspec.structs.replace(SETTING, load=1.2, noise=0.1)
    first = replay(arrivals()[:80], setting, rate=full())
    assert first == replay(arrivals()[:80], setting, rate=full())
    assert first != replay(arrivals()[:80], msgspec.structs.replace(setting, seed=1), rate=full())
    assert msgspec.json.decode(msgspec.json.encode(first), type=ReplayReport) == first


def test_load_one_is_the_rate_of_a_backlog():
    report = played("fcfs", 1.0)
    assert report.rate == pytest.approx(full(), rel=0.02) and report.capacity == full()
    lengths = [COST.prefill(0, one.prompt_tokens) / 1e3 for one in arrivals()]
    assert full() < len(lengths) / sum(lengths)


def test_every_request_is_accounted_for():
    for schedule in ("fcfs", "deadline"):
        report = played(schedule, 1.5)
        whole = report.tiers["all"]
        assert whole.sent == len(arrivals()) == sum(report.tiers[name].sent for name in TIERS)
        assert report.tiers["timed"].sent == whole.sent - report.tiers["flex"].sent
        flex = report.tiers["flex"]
        assert flex.on_time == flex.sent - flex.refused
        assert not whole.refused or (schedule == "deadline" and flex.refused <= 0.15 * flex.sent)
        assert whole.refused or report.tokens >= sum(
            one.prompt_tokens + one.output_tokens - 1 for one in arrivals()
        )
        assert whole.goodput <= report.best_goodput["all"] + 1e-9
        assert report.tiers["timed"].goodput <= report.best_goodput["timed"] + 1e-9
        assert report.weighted_goodput <= report.best_goodput["weighted"] + 1e-9


def test_nobody_without_an_objective_is_refused_while_the_machine_can_do_all_work():
    """Beyond load 1 some must be: a wait that has a bound cannot hold work that never gets its turn."""
    for load in (0.7, 1.0):
        flex = played("deadline", load).tiers["flex"]
        assert flex.refused == 0 and flex.attainment == 1.0


def test_more_are_on_time_than_first_come_first_served_at_every_load():
    for load, least in ((0.7, 1.0), (1.0, 1.15), (2.0, 1.5)):
        ours, plain = played("deadline", load), played("fcfs", load)
        assert ours.tiers["all"].goodput >= least * plain.tiers["all"].goodput
        assert ours.tiers["timed"].on_time >= plain.tiers["timed"].on_time
    assert played("deadline", 1.5).tiers["priority"].attainment >= 0.97
    assert played("deadline", 0.7).tiers["timed"].attainment >= 0.97
    assert (
        played("deadline", 0.7).tiers["flex"].completed >= 0.97 * played("fcfs", 0.7).tiers["flex"].completed
    )


def test_a_request_on_time_pauses_no_longer_than_its_objective_or_under_pressure_than_a_step():
    for name, itl_ms in (("priority", 40.0), ("default", 80.0)):
        assert played("deadline", 0.3).tiers[name].longest_gap_ms <= itl_ms + 1e-3
        for load in (0.7, 1.5):
            assert played("deadline", load).tiers[name].longest_gap_ms <= step_limit(COST) + 1e-3
    assert played("fcfs", 1.5).tiers["all"].longest_gap_ms > 80.0


def test_a_model_that_is_not_exactly_right_will_do():
    known = StepCost(base=8.0, per_decode=0.1, per_prefill=0.3)
    setting = msgspec.structs.replace(SETTING, load=0.7, noise=0.1, known=known)
    report = replay(arrivals(), setting, rate=full())
    assert 0.02 < report.model_error < 0.15
    assert report.tiers["timed"].attainment >= 0.95 * played("deadline", 0.7).tiers["timed"].attainment


@pytest.mark.parametrize("tier", ["flex", "default"])
@pytest.mark.parametrize("load", [0.3, 0.6])
def test_an_undemanding_load_is_served_no_worse_than_first_come_first_served(tier: str, load: float):
    """What lets it be the default: with one tier for all, and time enough, nothing is lost to caution."""
    setting = msgspec.structs.replace(SETTING, load=load, mix={tier: 1.0})
    ours, plain = (
        replay(arrivals(), msgspec.structs.replace(setting, schedule=name), rate=full()).tiers["all"]
        for name in ("deadline", "fcfs")
    )
    assert ours.completed >= 0.99 * plain.completed and ours.attainment >= plain.attainment
    assert ours.ttft_ms is not None and plain.ttft_ms is not None
    assert ours.ttft_ms.p50 <= 1.1 * plain.ttft_ms.p50 and ours.ttft_ms.p90 <= 1.1 * plain.ttft_ms.p90
    assert ours.tpot_ms is not None and plain.tpot_ms is not None
    assert ours.tpot_ms.p50 <= (1.1 if tier == "default" else 1.25) * plain.tpot_ms.p50


def test_less_is_wasted_on_what_is_late_anyway():
    assert played("deadline", 1.0).wasted < 0.5 * played("fcfs", 1.0).wasted


def test_shared_beginnings_are_read_once():
    shared = [Arrival(index * 5.0, 1100, 3, (1, 2)) for index in range(4)]
    report = replay(shared, SETTING, rate=0.2)
    assert report.tokens == 1100 + 3 * (1100 - 1024) + 4 * 2
    apart = [msgspec.structs.replace(one, prefix=()) for one in shared]
    assert replay(apart, SETTING, rate=0.2).tokens == 4 * (1100 + 2)


def test_an_answer_longer_than_the_context_is_refused():
    with pytest.raises(InvalidRequest, match="exceeds a context"):
        replay([Arrival(0.0, 10, 99_999)], SETTING, rate=1.0)


works = st.lists(
    st.tuples(
        st.integers(0, 12), st.integers(1, 8), st.integers(1, 5), st.sampled_from([1.0, 1.0, 2.0, 4.0])
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(works)
def test_nobody_beats_the_oracle(drawn: list[tuple[int, int, int, float]]):
    """The best of all subsets, by interval sums (exact for one preemptive machine), is within the bound."""
    made = [
        Work(float(start), float(start + max(span, size)), float(size), worth=worth)
        for start, span, size, worth in drawn
    ]

    def fits(chosen: tuple[Work, ...]) -> bool:
        return all(
            sum(
                one.seconds for one in chosen if one.arrival >= begin.arrival and one.deadline <= end.deadline
            )
            <= end.deadline - begin.arrival
            for begin in chosen
            for end in chosen
        )

    subsets = (chosen for count in range(len(made) + 1) for chosen in combinations(made, count))
    best = max(sum(one.worth for one in chosen) for chosen in subsets if fits(chosen))
    assert best <= most_on_time(made, grid=64) + 1e-9
    assert most_on_time(made, grid=64) <= sum(one.worth for one in made) + 1e-9


@settings(max_examples=60, deadline=None)
@given(works)
def test_the_base_is_charged_at_most_once_a_step(drawn: list[tuple[int, int, int, float]]):
    """At no instant do the parts of those who may share its steps add to more than one step."""
    made = [Work(float(start), float(start + span), 0.0, steps) for start, span, steps, _ in drawn]
    charged = with_base(made, 1.0)
    for instant in [one.arrival + 0.5 for one in made]:
        there = [one.seconds / one.steps for one in charged if one.arrival <= instant <= one.deadline]
        assert sum(there) <= 1.0 + 1e-9


def test_the_oracle_of_nothing_and_of_one():
    assert most_on_time([]) == 0.0 and with_base([], 1.0) == []
    request = Request(
        id=1, model="null", prompt=(0,) * 100, arrival=0.0, objective=TIERS["default"].objective
    )
    last = msgspec.structs.replace(request, arrival=10.0)
    assert bound([request, last], [5, 5], SETTING) == pytest.approx(0.1)


@pytest.mark.skipif(not DATA.is_dir(), reason="the public traces are not here (STRETTO_DATA)")
def test_the_azure_conversations_keep_their_promises():
    """A window of the trace that the project measures itself by; the whole of it says the same."""
    trace = read(DATA / "azure_2023_conv.csv.gz", requests=500)
    rate = capacity(trace, Setting())
    ours = replay(trace, Setting(load=1.0), rate=rate)
    plain = replay(trace, Setting(load=1.0, schedule="fcfs"), rate=rate)
    assert ours.tiers["all"].goodput >= 1.15 * plain.tiers["all"].goodput
    assert ours.tiers["priority"].attainment >= 0.99


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.01, 3.0), st.integers(1, 3000), st.integers(1, 60)), min_size=5, max_size=60
    ),
    st.sampled_from([0.8, 1.5, 4.0]),
)
def test_nobody_waits_beyond_the_limit(drawn: list[tuple[float, int, int]], load: float):
    """The first token comes by the limit, or the request was refused; no begun answer starves."""
    at, made = 0.0, list[Arrival]()
    for gap, prompt, output in drawn:
        at += gap
        made.append(Arrival(at, prompt, output))
    outcomes = replayed(made, msgspec.structs.replace(SETTING, load=load), rate=full())[1]
    for one in outcomes:
        ttft_s = (one.request.objective.ttft_ms or inf) / 1e3
        limit_s = longest_wait_s(ttft_s, COST.prefill(0, len(one.request.prompt)))
        assert one.reason in (Reason.LENGTH, Reason.REFUSED)
        if one.reason is Reason.LENGTH:
            assert one.first - one.request.arrival <= limit_s + 1.0
            assert max(one.gaps, default=0.0) <= 2 * PAUSE_S * 1e3


@pytest.mark.skipif(not DATA.is_dir(), reason="the public traces are not here (STRETTO_DATA)")
def test_a_late_request_of_the_azure_conversations_does_not_wait_for_the_burst_to_end():
    """1,000 requests, some of which once waited for 1,054 s (fcfs: 72 s) and paused for 88 s."""
    trace = read(DATA / "azure_2023_conv.csv.gz", requests=1000)
    report = replay(trace, Setting(load=0.7), rate=0.24717)
    for name in ("priority", "default"):
        ttft, objective = report.tiers[name].ttft_ms, CPU_TIERS[name].objective.ttft_ms
        assert ttft is not None and objective is not None and ttft.max <= 3 * objective
    assert report.tiers["all"].attainment >= 0.975
    flex, gaps = report.tiers["flex"].ttft_ms, report.tiers["all"].itl_ms
    assert flex is not None and flex.max <= FLEX_WAIT_S * 1e3
    assert gaps is not None and gaps.max <= 2 * PAUSE_S * 1e3
