"""The deadline rule against a plain definition. Engine, simulator and server must agree on it."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.deadlines import Deadline
from stretto.engine.sequence import Sequence
from stretto.simulator.report import RequestOutcome
from stretto.text.output import Times
from stretto.types import Objective, Request

MS = st.none() | st.floats(1, 2000)
OBJECTIVES = st.builds(Objective, ttft_ms=MS, itl_ms=MS, total_ms=MS)


def deadline_of(arrival: float, objective: Objective, stamps: list[float], index: int) -> float:
    """The deadline of token `index` by the definition in the glossary."""
    ttft, itl, total = objective.ttft_ms, objective.itl_ms, objective.total_ms
    whole = inf if total is None else arrival + total / 1e3
    first = inf if ttft is None else arrival + ttft / 1e3
    if index == 0:
        return min(first, whole)
    start = stamps[0] if ttft is None else first
    return min(inf if itl is None else start + index * itl / 1e3, whole)


@given(OBJECTIVES, st.floats(0, 1e4), st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_engine_simulator_and_server_compute_the_same_deadlines(
    objective: Objective, arrival: float, pauses: list[float]
) -> None:
    request = Request(id=1, model="m", prompt=(1,), arrival=arrival, objective=objective)
    engine, outcome = Sequence.of(request, 100).deadline, RequestOutcome.of(request)
    server, stamps = (
        Times.of(arrival, objective),
        [arrival + sum(pauses[: n + 1]) for n in range(len(pauses))],
    )
    slack = inf
    for index, now in enumerate(stamps):
        expected = deadline_of(arrival, objective, stamps, index)
        slack = min(slack, expected - now)
        for deadline in (engine, outcome.deadline, server.deadline):
            assert min(deadline.next, deadline.whole) == pytest.approx(expected) == deadline.of_token(index)
        engine.emit(now)
        outcome.on_token(now)
        server.mark(now, 1)
        assert engine.slack == outcome.deadline.slack == server.slack == pytest.approx(slack, abs=1e-9)
    assert engine.late == outcome.deadline.late == server.late
    if abs(slack) > 1e-6:
        assert engine.late is (slack < 0)


def test_an_early_token_does_not_move_later_deadlines() -> None:
    deadline = Deadline.of(10.0, Objective(ttft_ms=1000, itl_ms=100))
    deadline.emit(10.2)
    assert deadline.next == pytest.approx(11.1) == deadline.of_token(1)
    assert deadline.latest == pytest.approx(10.3), "the pause may not be longer than the objective either"


def test_tokens_emitted_together_are_judged_one_by_one() -> None:
    deadline = Deadline.of(10.0, Objective(ttft_ms=1000, itl_ms=100))
    deadline.emit(11.0, 3)
    deadline.emit(11.3)
    assert not deadline.late
    deadline.emit(11.41)
    assert deadline.late


def test_an_answer_that_ends_after_total_ms_is_late() -> None:
    deadline = Deadline.of(10.0, Objective(total_ms=500))
    deadline.end(10.4)
    assert not deadline.late
    deadline.end(10.6)
    assert deadline.late and deadline.slack == pytest.approx(-0.1)


def test_total_ms_tightens_the_itl_target() -> None:
    deadline = Deadline.of(10.0, Objective(itl_ms=500, total_ms=2000))
    deadline.keep_pace(11.0, 10)
    assert deadline.target_itl_s == pytest.approx(0.1)
    deadline.keep_pace(13.0, 10)
    assert deadline.target_itl_s == pytest.approx(0.0, abs=1e-9)


def test_a_pace_is_never_zero_though_the_whole_answer_is_due_now():
    """A stream that had its first token at that very instant stopped the engine: a load is a cost by pace."""
    deadline = Deadline.of(0.0, Objective(total_ms=500))
    deadline.keep_pace(0.5, 10)
    deadline.emit(0.5)
    assert not deadline.late and deadline.target_itl_s > 0.0
